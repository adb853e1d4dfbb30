"""What a backend of linear attention is given, and what it gives back.

    forward(call, operands)                                  -> Result
    backward(call, operands, out, denominator, d_out, d_state) -> Operands of cotangents

The cotangents have None where the operand is None, for `runs` and `valid`, and may have it for a
`log_decay` without `decay_gradient`; `d_state` has None
where nobody used the final state. Residuals are the inputs, `out` and `denominator`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from effattn.pallas_kernels.linear_attention.state import LinearState


class Operands(NamedTuple):
    """The arrays of a call.

    query, key: [b, s, g, d]; value: [b, s, h, e], h a multiple of g. log_decay: None, [h],
    [b, s, h] or [b, s, h, d], 0 at padding. state: a LinearState, or None to start from zeros.
    runs: int32 [b, s], counts from 0 up at each change of document; padding carries on the run
    before it. `state` belongs to run 0. valid: bool [b, s], False at padding.
    """

    query: Any
    key: Any
    value: Any
    log_decay: Any
    state: LinearState | None
    runs: Any
    valid: Any


class Result(NamedTuple):
    """out: like value, normalised, 0 at padding. state: after the last valid token.

    denominator: [b, s, h] in the state's dtype, with eps, 1 at padding; None without `normalize`.
    """

    out: Any
    denominator: Any
    state: LinearState


@dataclass(frozen=True)
class LinearAttentionCall:
    """The static part of a call: `refuses` reads nothing else."""

    batch: int
    seq_len: int
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: str  # of value
    state_dtype: str
    feature_map: str
    normalize: bool
    eps: float
    scale: float
    decay: str  # "none" | "head" | "token" | "channel"
    segmented: bool
    has_state: bool
    chunk_size: int | None
    decay_gradient: bool = True  # whether the backward pass is asked for that of log_decay
