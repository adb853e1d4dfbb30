"""Four models of `scripts/mor_study.py`, at equal training FLOPs on the standard library's bytes.

:vanilla    eight layers, each with its own parameters
:recursive  the same depth from four: two private, two that run three times
:expert     the same four, where recursions take 1, 2/3 and 1/3 of the tokens
:token      the same four, where every token chooses its depth
"""

import copy
from typing import Any

from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.mor import MoRConfig
from effattn.train.flops import training_flops

NAMES = ("vanilla", "recursive", "expert", "token")
SIZES: dict[str, Any] = {"num_layers": 8, "width": 128, "num_heads": 4, "num_kv_heads": None}
MODELS = {
    "vanilla": MoRConfig(**SIZES, routing="none", num_recursions=1, sharing="cycle"),
    "recursive": MoRConfig(**SIZES, routing="none"),
    "expert": MoRConfig(**SIZES, sampling_coeff=0.1),
    "token": MoRConfig(**SIZES, routing="token", z_coeff=1e-5),
}
VANILLA_STEPS, BATCH_SIZE, SEQ_LEN, VOCAB_SIZE = 300, 8, 256, 257


def get_config(arg: str | None = None) -> Experiment:
    name = "expert" if arg is None else arg
    check_in("mor_study", name, NAMES)
    # Numbers of the shapes alone: what the vanilla model spends in its steps, spent by this one.
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN}
    cost, budget = (training_flops(MODELS[n], **sizes) for n in (name, "vanilla"))
    assert cost is not None and budget is not None
    return Experiment(
        model=copy.deepcopy(MODELS[name]),
        data=DataConfig(source="stdlib", batch_size=BATCH_SIZE, seq_len=SEQ_LEN),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.01,
            adam_ratio=0.3,
            schedule="linear",
            warmup_steps=30,
            final_fraction=0.0,
            weight_decay=0.05,
        ),
        train=TrainConfig(
            steps=round(VANILLA_STEPS * budget / cost), log_every=10, checkpoint_every=250
        ),
    )
