"""The quickstart's hybrid, larger and longer: about half an hour on two CPU cores."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig


def get_config() -> Experiment:
    return Experiment(
        model=BasedModelConfig(
            num_layers=8,
            width=256,
            pattern=("conv", "linear", "conv", "window"),
            num_heads=4,
            feature_dim=16,
            window=64,
        ),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=50,
            final_fraction=0.05,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=3000, log_every=20, eval_every=500, checkpoint_every=500),
    )
