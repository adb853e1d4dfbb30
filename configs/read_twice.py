"""Which token do two sets share? `read_twice.py:once2` reads once, in order, over 2 channels.

A long first set must be remembered whole, a short one costs little, so a small recurrent state
answers by order: Arora et al. 2024, "Just read twice" (arXiv 2407.05483), section 3. "twice" shows
both sets two times over before the answer (`generate.read_twice`), "prefix" reads them once with
layers that see the whole row ahead (JRT-RNN). Both sets are of one alphabet: with halves of their
own, as in the authors' code, the answer can be told without remembering anything.
"""

import re

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig

SHORT, LONG = 3, 12
ROW = SHORT + LONG + 3


def get_config(reading: str = "once2") -> Experiment:
    found = re.fullmatch(r"(once|twice|prefix)(\d+)", reading)
    if found is None:
        raise ValueError(
            f"reading: got {reading!r}, expected once, twice or prefix and the channels of a "
            "query, such as once2"
        )
    kind, feature_dim = found[1], int(found[2])
    times = 2 if kind == "twice" else 1
    mixer = "prefix" if kind == "prefix" else "linear"
    return Experiment(
        model=BasedModelConfig(
            num_layers=4,
            width=64,
            num_heads=1,
            # Where a set is told from the other, the tokens are compared, the answer is picked.
            pattern=("conv", mixer, mixer, mixer),
            head_dim=8,  # with the channels of a query, what bounds the state
            feature_dim=feature_dim,
            enc_length=ROW,
        ),
        data=DataConfig(
            source="set_disjointness",
            vocab_size=32,
            set_sizes=(SHORT, LONG, LONG, SHORT),
            set_halves=False,
            set_times=times,
            batch_size=128,
            seq_len=ROW * times,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            weight_decay=0.0,
        ),
        train=TrainConfig(steps=250, log_every=20, checkpoint_every=None, tensorboard=False),
    )
