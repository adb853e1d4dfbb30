"""Aaren with short convolutions, small, on the sources of the standard library, byte by byte."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.aaren import AarenModelConfig


def get_config() -> Experiment:
    return Experiment(
        model=AarenModelConfig(num_layers=4, width=128, num_heads=4, pattern=("conv", "aaren")),
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
        train=TrainConfig(steps=500, log_every=10, checkpoint_every=250),
    )
