"""Three ways to read text at equal FLOPs per byte: `hnet`, `transformer` (bytes), `bpe` (tokens).

Of `scripts/hnet_study.py`, which makes the tokenizer; all three see about as many bytes at once and
in all. The token model may spend more on a token, which stands for about three bytes.
"""

from effattn.checks import check_in
from effattn.configs import hnet_stdlib
from effattn.experiment import Experiment
from effattn.models.transformer import TransformerConfig

NAMES = ("hnet", "transformer", "bpe")


def get_config(arg: str | None = None) -> Experiment:
    name = "hnet" if arg is None else arg
    check_in("config argument", name, NAMES)
    experiment = hnet_stdlib.get_config()
    experiment.train.steps, experiment.train.checkpoint_every = 600, 300
    if name == "transformer":
        experiment.model = TransformerConfig(num_layers=4, width=128, num_heads=4)
    if name == "bpe":
        experiment.model = TransformerConfig(num_layers=8, width=160, num_heads=4)
        experiment.data.seq_len = 100
    return experiment
