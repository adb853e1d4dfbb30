"""Softmax attention with masks over positions: `attention`, `explain` and `merge`."""

from effattn.pallas_kernels.attention.api import attention, explain
from effattn.pallas_kernels.attention.merge import merge

__all__ = ["attention", "explain", "merge"]
