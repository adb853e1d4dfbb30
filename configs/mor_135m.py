"""Mixture-of-Recursions over SmolLM-135M; `:2` or `:4` recursions.

Sizes: Bae et al. 2025 (arXiv 2507.10524), appendix. The recipe is that
of `mor_360m`, whose steps were not chosen for this size.
"""

from effattn.configs.mor_360m import experiment
from effattn.experiment import Experiment


def get_config(arg: str | None = None) -> Experiment:
    return experiment(arg, num_layers=30, width=576, num_heads=9, num_kv_heads=3, mlp_width=1536)
