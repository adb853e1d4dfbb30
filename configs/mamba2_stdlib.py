"""Mamba-2, small, on the sources of the standard library, byte by byte; as `based_stdlib`."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mamba2 import Mamba2Config


def get_config() -> Experiment:
    return Experiment(
        model=Mamba2Config(num_layers=6, width=128, head_dim=32, state_dim=32),
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
