"""A small word-pooled model on the sources of the standard library."""

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.word_pooled import WordPooledConfig
from effattn.nn.compact import CapacityConfig


def get_config() -> Experiment:
    return Experiment(
        model=WordPooledConfig(
            encoder_layers=2,
            num_layers=4,
            decoder_layers=2,
            width=128,
            num_heads=4,
            backbone_width=192,
            backbone_heads=4,
            longest_word=16,
            capacity=CapacityConfig(mode="bucket", rungs=(0.25, 0.5, 1.0)),
        ),
        data=DataConfig(source="stdlib", batch_size=8, seq_len=512),
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
