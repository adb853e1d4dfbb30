"""The quickstart's hybrid, larger and longer: about twenty minutes on two CPU cores."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig


def get_config() -> Experiment:
    return Experiment(
        model=BasedModelConfig(
            num_layers=6,
            width=160,
            pattern=("conv", "linear", "conv", "window", "conv", "linear"),
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
            warmup_steps=50,
            final_fraction=0.0,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=2000, log_every=10, eval_every=1000, checkpoint_every=500),
    )
