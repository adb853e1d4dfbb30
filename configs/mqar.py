"""Multi-query associative recall by one mixer: `mqar.py:based`, `:attention` or `:window`.

16 key-value pairs, then each key once more, at T = 128 and a vocabulary of 512 (Arora et al. 2023,
"Zoology"). Two layers: a short convolution brings each key to its value, the mixer looks it up.
BASED and attention solve it; a window of 16 cannot reach the pairs. Muon leaves the long plateau in
which nothing is recalled after some 100 steps, where AdamW had not after 270.
"""

from typing import Any

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig

SEQ_LEN = 128

# Beside BASED's own Taylor layer, attention is a window that sees the whole sequence.
MIXERS: dict[str, dict[str, Any]] = {
    "based": {"pattern": ("conv", "linear")},
    "attention": {"pattern": ("conv", "window"), "window": SEQ_LEN},
    "window": {"pattern": ("conv", "window"), "window": 16},
}


def get_config(mixer: str = "based") -> Experiment:
    check_in("mixer", mixer, MIXERS)
    return Experiment(
        model=BasedModelConfig(
            num_layers=2, width=64, num_heads=2, feature_dim=16, **MIXERS[mixer]
        ),
        data=DataConfig(
            source="mqar", vocab_size=512, num_pairs=16, batch_size=64, seq_len=SEQ_LEN
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=50,
            final_fraction=0.05,
            weight_decay=0.0,
        ),
        train=TrainConfig(steps=400, log_every=20, checkpoint_every=None),
    )
