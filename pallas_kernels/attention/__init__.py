"""Softmax attention with masks over positions: `attention`, `explain` and `merge`.

`decode_attention` is that of the newest tokens over a cache, `explain_decode` its explanation.
`neighborhood_attention` is attention over a grid of 1-3 axes, `simulate` counts its tiles.
"""

from effattn.pallas_kernels.attention.api import attention, explain
from effattn.pallas_kernels.attention.decode import decode_attention, explain_decode
from effattn.pallas_kernels.attention.merge import merge
from effattn.pallas_kernels.attention.neighborhood import neighborhood_attention
from effattn.pallas_kernels.attention.simulator import simulate

__all__ = [
    "attention",
    "decode_attention",
    "explain",
    "explain_decode",
    "merge",
    "neighborhood_attention",
    "simulate",
]
