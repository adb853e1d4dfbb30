"""A small transformer with adaptive computation modules on the standard library's sources.

`--config=configs/acm_stdlib.py:duo` takes Duo-LLM's modules instead.
"""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.adaptive_width import AdaptiveWidthConfig


def get_config(arg: str | None = None) -> Experiment:
    return Experiment(
        model=AdaptiveWidthConfig(num_layers=6, width=160, num_heads=4, mlp=arg or "acm"),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=1500, log_every=10, eval_every=500, checkpoint_every=500),
    )
