"""Mixture-of-Recursions over a Llama of 730M; `:2` or `:4` recursions.

Sizes: Bae et al. 2025 (arXiv 2507.10524), appendix: between two of SmolLM's. The recipe
is that of `mor_360m`, whose steps were not chosen for this size.
"""

from effattn.configs.mor_360m import experiment
from effattn.experiment import Experiment


def get_config(arg: str | None = None) -> Experiment:
    return experiment(arg, num_layers=26, width=1536, num_heads=24, num_kv_heads=8, mlp_width=4096)
