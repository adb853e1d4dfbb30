"""BASED on the sources of the standard library, byte by byte: about four minutes on two CPU cores.

The job of `make train`. A hybrid of short convolutions, Taylor linear attention and a sliding
window (Arora et al. 2024), trained by Muon.
"""

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
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=700, log_every=10, eval_every=350, checkpoint_every=350),
    )
