"""A small Llama-style transformer on the sources of the standard library, to set BASED against."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig


def get_config() -> Experiment:
    return Experiment(
        model=TransformerConfig(num_layers=6, width=160, num_heads=4),
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
