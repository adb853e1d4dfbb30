"""Mixture-of-Recursions over SmolLM-1.7B; `:2` or `:4` recursions.

Sizes: Bae et al. 2025 (arXiv 2507.10524), appendix. The recipe is that
of `mor_360m`, whose steps were not chosen for this size.
"""

from effattn.configs.mor_360m import experiment
from effattn.experiment import Experiment


def get_config(arg: str | None = None) -> Experiment:
    return experiment(arg, num_layers=24, width=2048, num_heads=32, num_kv_heads=32, mlp_width=8192)
