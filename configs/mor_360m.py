"""Mixture-of-Recursions over SmolLM-360M, expert choice, as published; `:2` or `:4` recursions.

Sizes and recipe: raymin0223/mixture_of_recursions, conf/pretrain (SmolLM-360M, middle cycle, linear
routers, sigmoid x 0.1, a loss on the routers). The steps are those of equal FLOPs at this size:
26.5, 29.7 and 29.8 B tokens of FineWeb-Edu for 2, 3 and 4 recursions. FineWeb-Edu is not shipped:
set data.source to JSON lines and data.tokenizer to SmolLM's tokenizer.json (49152 tokens).
"""

from typing import Any

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mor import MoRConfig

STEPS = {2: 12_619, 3: 14_161, 4: 14_216}


def experiment(arg: str | None, **sizes: Any) -> Experiment:
    """The recipe over a model of these sizes. arg: recursions, 3 unless given."""
    recursions = 3 if arg is None else int(arg)
    if recursions not in STEPS:
        raise ValueError(f"recursions: got {arg}, expected one of {', '.join(map(str, STEPS))}")
    return Experiment(
        model=MoRConfig(**sizes, num_recursions=recursions, remat="names"),
        data=DataConfig(
            source="fineweb_edu/*.jsonl",
            field="text",
            tokenizer="smollm/tokenizer.json",
            vocab_size=49_152,
            batch_size=1024,
            seq_len=2048,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=3e-3,
            schedule="wsd",
            warmup_steps=86,
            decay_fraction=0.2,
            final_fraction=0.0,
            weight_decay=0.1,
            clip=1.0,
            b1=0.9,
            b2=0.95,
        ),
        train=TrainConfig(steps=STEPS[recursions], eval_every=1000, compute_dtype="bfloat16"),
    )


def get_config(arg: str | None = None) -> Experiment:
    return experiment(arg, num_layers=32, width=960, num_heads=15, num_kv_heads=5, mlp_width=2560)
