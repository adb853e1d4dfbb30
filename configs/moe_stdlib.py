"""A mixture of experts, small, on the sources of the standard library, byte by byte.

Eight experts of which a byte takes two. On a CPU, training counts slots: a product over rows sorted
by expert costs there as much as all experts.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.moe import MoEConfig
from effattn.nn.moe import ExpertsConfig


def get_config() -> Experiment:
    return Experiment(
        model=MoEConfig(
            num_layers=4,
            width=128,
            num_heads=4,
            experts=ExpertsConfig(
                count=8,
                top_k=2,
                mlp_width=192,
                routing="capacity",
                capacity_factor=1.5,
                group_size=256,
            ),
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
