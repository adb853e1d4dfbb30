"""A small Routing Transformer on the sources of the standard library."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.routing import RoutingModelConfig


def get_config() -> Experiment:
    return Experiment(
        model=RoutingModelConfig(
            num_layers=6, width=160, num_heads=4, window=64, num_clusters=8, decay=0.99
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
        train=TrainConfig(steps=1500, log_every=10, eval_every=500, checkpoint_every=500),
    )
