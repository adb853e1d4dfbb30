"""What a backend of the delta rule is given, and what it gives back.

    forward(call, operands)                  -> (out like value, state after)
    backward(call, operands, d_out, d_state) -> Operands of cotangents

The cotangents have None where the operand is None and for `runs`; `d_state` is None where nobody
used the final state. Residuals are the inputs alone.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Operands(NamedTuple):
    """The arrays of a call.

    query, key: [b, s, g, d]; value: [b, s, h, e], h a multiple of g. beta: [b, s, h]; log_decay:
    None or [b, s, h], both in the state's dtype. state: [b, h, d, e], or None to start from zeros.
    runs: int32 [b, s], counts from 0 up at each change of document; padding carries on the run
    before it. `state` belongs to run 0. At padding everything else is 0, so that it reads nothing,
    writes nothing and decays nothing.
    """

    query: Any
    key: Any
    value: Any
    beta: Any
    log_decay: Any
    state: Any
    runs: Any


@dataclass(frozen=True)
class DeltaRuleCall:
    """The static part of a call: `refuses` reads nothing else."""

    batch: int
    seq_len: int
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    dtype: str  # of value
    state_dtype: str
    scale: float
    decay: bool
    segmented: bool
    has_state: bool
    chunk_size: int | None

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.num_heads, self.key_dim, self.value_dim)
