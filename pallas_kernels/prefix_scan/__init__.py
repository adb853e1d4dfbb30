"""Scans over prefixes: `softmax_scan` and `gated_scan` for sequences, their steps for decoding."""

from effattn.pallas_kernels.prefix_scan.api import (
    explain_gated_scan,
    explain_softmax_scan,
    gated_scan,
    softmax_scan,
)
from effattn.pallas_kernels.prefix_scan.state import (
    SoftmaxState,
    gated_scan_step,
    init_softmax_state,
    softmax_scan_step,
)

__all__ = [
    "SoftmaxState",
    "explain_gated_scan",
    "explain_softmax_scan",
    "gated_scan",
    "gated_scan_step",
    "init_softmax_state",
    "softmax_scan",
    "softmax_scan_step",
]
