"""TransNormerLLM, small, on the sources of the standard library, byte by byte.

As `based_stdlib`, with linear attention that fades at a fixed rate per head and layer. The argument
`hybrid` makes the last of every four layers softmax attention, MiniMax's way:
`lightning_stdlib.py:hybrid`.
"""

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.lightning import LightningModelConfig

PATTERNS = {"lightning": ("lightning",), "hybrid": ("lightning",) * 3 + ("softmax",)}


def get_config(layers: str = "lightning") -> Experiment:
    check_in("layers", layers, PATTERNS)
    return Experiment(
        model=LightningModelConfig(
            num_layers=4, width=128, num_heads=4, pattern=PATTERNS[layers], mlp_width=256
        ),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            adam_ratio=0.3,
            schedule="linear",
            warmup_steps=30,
            final_fraction=0.0,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=1000, log_every=10, checkpoint_every=250),
    )
