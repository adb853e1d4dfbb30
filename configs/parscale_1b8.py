"""ParScale's 1.8B, second stage: a trained Qwen2-like decoder of 1.57 B read by P = 8 streams.

The argument is P, `parscale_1b8:2`; 1 is the decoder by itself, the first stage. Sizes: those that
give the counts without embeddings in the authors' parametric_fit.py to the parameter, 1,571,472,384
for P = 1 and 1,595,669,000 for P = 8. The recipe is ours: the paper trains the first stage on 1 T
tokens and goes on for 20 B with streams. Set train.init_from to a run of P = 1, data.source to JSON
lines and data.tokenizer to a tokenizer.json; `--config.model.freeze_base` trains prefixes and
aggregation alone, which leaves the decoder free to be read with any other P.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.parscale import ParScaleConfig
from effattn.models.transformer import TransformerConfig


def get_config(streams: str = "8") -> Experiment:
    if not streams.isdigit():
        raise ValueError(f"streams: got {streams!r}, expected a number such as 8")
    number = int(streams)
    return Experiment(
        model=ParScaleConfig(
            base=TransformerConfig(
                num_layers=36,
                width=1536,
                num_heads=16,
                num_kv_heads=2,
                mlp_width=8320,
                qkv_bias=True,
                norm_eps=1e-6,
                remat="names",
            ),
            streams=number,
            prefix_length=0 if number == 1 else 48,
        ),
        data=DataConfig(
            source="stack_v2_python/*.jsonl",
            field="text",
            tokenizer="qwen2/tokenizer.json",
            vocab_size=151_936,
            batch_size=1024,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=500,
            final_fraction=0.1,
            weight_decay=0.1,
        ),
        train=TrainConfig(steps=10_000, eval_every=1000, compute_dtype="bfloat16"),
    )
