"""BASED on the sources of the standard library, byte by byte: about three minutes on two CPU cores.

The job of `make train`. A hybrid of short convolutions, Taylor linear attention and a sliding
window (Arora et al. 2024), trained by Muon.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig


def get_config() -> Experiment:
    return Experiment(
        model=BasedModelConfig(
            num_layers=4,
            width=128,
            pattern=("conv", "linear", "conv", "window"),
            num_heads=4,
            feature_dim=16,
            window=64,
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
