"""BASED 360M as published: 362.6 M parameters with GPT-2's 50257 tokens.

Values: HazyResearch/based, train/configs/experiment/reference/based-360m.yaml (10 B tokens of the
Pile). The Pile is not shipped: set data.source to JSON lines and data.tokenizer to GPT-2's
tokenizer.json.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig

LINEAR = (1, 6, 11, 16, 21)
WINDOW = (2, 7, 12, 17, 22)
NUM_LAYERS = 27


def get_config(arg: str | None = None) -> Experiment:
    kinds = {**dict.fromkeys(LINEAR, "linear"), **dict.fromkeys(WINDOW, "window")}
    return Experiment(
        model=BasedModelConfig(
            num_layers=NUM_LAYERS,
            width=1024,
            num_heads=16,
            mlp_width=2048,
            pattern=tuple(kinds.get(layer, "conv") for layer in range(NUM_LAYERS)),
            feature_dim=16,
            window=128,  # the reference's window_size 256 is halved inside
            conv_kernel=3,
            conv_expand=4,
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
