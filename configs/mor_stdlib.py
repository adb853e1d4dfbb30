"""Mixture-of-Recursions, small, on the sources of the standard library, byte by byte.

Two private layers and two shared ones, which run over all tokens, two thirds and one third of them.
What is scored is the causal mode, so the loss on the routers weighs more than the paper's 0.001:
with few steps the routers have to learn early what the causal mode will decide by.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mor import MoRConfig


def get_config() -> Experiment:
    return Experiment(
        model=MoRConfig(
            num_layers=8,
            width=160,
            num_heads=4,
            num_kv_heads=None,
            num_recursions=3,
            sampling_coeff=0.1,
            gap_every=50,
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
