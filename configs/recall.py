"""Recall against the size of the state: `recall.py:taylor8+window32` names the layers.

16 key-value pairs, then each key once more (Arora et al. 2023, "Zoology"), by two or three layers:
a short convolution brings each key to its value, linear attention over so many channels and a
window of so many tokens look it up. "taylor" is BASED's, "elu" plain linear attention, "attention"
sees the whole sequence. As figure 2 of Arora et al. 2024 (arXiv 2402.18668), small.
"""

import re
from typing import Any

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig

SEQ_LEN = 64


def get_config(layers: str = "taylor8+window32") -> Experiment:
    pattern: list[str] = ["conv"]
    options: dict[str, Any] = {}
    for layer in layers.split("+"):
        found = re.fullmatch(r"(taylor|elu|window)(\d+)|attention", layer)
        if found is None:
            raise ValueError(
                f"layers: got {layers!r}, expected taylorN, eluN (channels of a query), windowN "
                "(tokens to the left) or attention, or two of them with a + between"
            )
        kind, size = found[1], found[2]
        if kind in ("taylor", "elu"):
            pattern.append("linear")
            options |= {"feature_map": kind, "feature_dim": int(size)}
        else:
            pattern.append("window")
            options["window"] = SEQ_LEN if kind is None else int(size)
    return Experiment(
        model=BasedModelConfig(
            num_layers=len(pattern), width=64, num_heads=1, pattern=tuple(pattern), **options
        ),
        data=DataConfig(source="mqar", vocab_size=64, num_pairs=16, batch_size=64, seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            schedule="cosine",
            warmup_steps=30,
            final_fraction=0.05,
            weight_decay=0.0,
        ),
        # With a third layer 300 steps can end before the lookup is found: taylor2+window8 had 0.07.
        train=TrainConfig(
            steps=300 if len(pattern) == 2 else 600,
            log_every=20,
            checkpoint_every=None,
            tensorboard=False,
        ),
    )
