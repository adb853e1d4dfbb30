"""Linear attention: `linear_attention` for sequences, `linear_attention_step` for decoding."""

from effattn.pallas_kernels.linear_attention.api import explain, linear_attention
from effattn.pallas_kernels.linear_attention.state import (
    LinearState,
    init_linear_state,
    linear_attention_step,
)

__all__ = [
    "LinearState",
    "explain",
    "init_linear_state",
    "linear_attention",
    "linear_attention_step",
]
