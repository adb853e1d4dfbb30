"""Mixtral 8x7B as published: 46.7 billion parameters, of which a token uses 12.9 billion.

Sizes: Jiang et al. 2024 (arXiv 2401.04088), table 1; the rotary base of the published weights. The
recipe of its training is not published: that of `transformer_8b` stands in. The corpus is not
shipped: set data.source and data.tokenizer.
"""

from effattn.configs.transformer_8b import get_config as transformer_8b
from effattn.experiment import Experiment
from effattn.models.moe import MoEConfig
from effattn.nn.moe import ExpertsConfig


def get_config() -> Experiment:
    experiment = transformer_8b()
    experiment.model = MoEConfig(
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        rotary_base=1e6,
        tied=False,
        remat="full",
        experts=ExpertsConfig(count=8, top_k=2, mlp_width=14_336),
    )
    experiment.data.vocab_size = 32_000
    return experiment
