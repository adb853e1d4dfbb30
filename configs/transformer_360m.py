"""The BASED paper's Transformer++ baseline of 360M: 359.8 M parameters with GPT-2's 50257 tokens.

Values: HazyResearch/based, train/configs/experiment/reference/attn-360m.yaml (10 B tokens of the
Pile). The Pile is not shipped: set data.source to JSON lines and data.tokenizer to GPT-2's
tokenizer.json.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig


def get_config(arg: str | None = None) -> Experiment:
    return Experiment(
        model=TransformerConfig(
            num_layers=24,
            width=1024,
            num_heads=16,
            mlp_width=2816,  # 8/3 width, rounded up to a multiple of 256
            rotary_dim=32,  # half of each head
            remat="names",
        ),
        data=DataConfig(
            source="pile/*.jsonl",
            field="text",
            tokenizer="gpt2/tokenizer.json",
            vocab_size=50_257,
            batch_size=256,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=8e-4,
            schedule="cosine",
            warmup_steps=200,
            final_fraction=0.1,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=20_000, eval_every=1000, compute_dtype="bfloat16"),
    )
