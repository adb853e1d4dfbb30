"""What a backend of the two scans is given, and what it gives back.

softmax_scan:
    forward(call, scores, values, state, runs)                       -> SoftmaxResult
    backward(call, scores, values, state, runs, result, d_out, d_state)
                                          -> cotangents of scores, values and state
gated_scan:
    forward(call, gate, x, state)               -> h [b, s, *c], in the state's dtype
    backward(call, gate, x, state, h, d_h)      -> cotangents of gate, x and state

scores, gate and every state come in the state's dtype, values and x in their own.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from effattn.pallas_kernels.prefix_scan.state import SoftmaxState


@dataclass(frozen=True)
class SoftmaxScanCall:
    """The static part of a call of `softmax_scan`: `refuses` reads nothing else.

    scores: [b, s, h], -inf at padding. values: [b, s, h, e], 0 at padding. runs: int32 [b, s],
    counts from 0 up at each change of document, None for one run; `state` belongs to run 0.
    """

    batch: int
    seq_len: int
    num_heads: int
    value_dim: int
    dtype: str  # of values
    state_dtype: str
    segmented: bool
    chunk_size: int | None


class SoftmaxResult(NamedTuple):
    """out: like values, 0 where nothing was seen. state: after the last token.

    maximum, denominator: [b, s, h] in the state's dtype, those of the state after each token.
    """

    out: Any
    maximum: Any
    denominator: Any
    state: SoftmaxState


@dataclass(frozen=True)
class GatedScanCall:
    """The static part of a call of `gated_scan`: `refuses` reads nothing else.

    x: [b, s, *channels]; gate: [b, s, *gate_channels], as many axes, of size 1 where it is shared.
    Packing is in the gate already: 0 at a document's first token, 1 at padding.
    """

    batch: int
    seq_len: int
    channels: tuple[int, ...]
    gate_channels: tuple[int, ...]
    dtype: str  # of x
    state_dtype: str
    chunk_size: int | None
