"""Linear attention on TPUs: who is taken, and the way to the two passes.

`tpu_plan.py` lays out the arrays, `tpu_chunk.py` and `tpu_features.py` have the inside of a chunk,
`tpu_forward.py` and `tpu_backward.py` the kernels, which are imported by the first call that runs.
"""

import functools
from collections.abc import Callable
from typing import Any

from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands, Result
from effattn.pallas_kernels.target import not_a_tpu, tpu_target
from effattn.pallas_kernels.tuning import LinearTuning, linear_tuning

MAX_HEAD_DIM = 256
MAX_TAYLOR_DIM = 32  # 864 features


def refuses(call: LinearAttentionCall) -> str | None:
    return not_a_tpu() or _cannot(call)


def _cannot(call: LinearAttentionCall) -> str | None:
    if call.dtype not in ("float32", "bfloat16") or call.state_dtype != "float32":
        return f"query, key and value must all be float32 or all bfloat16, got {call.dtype}"
    if call.decay == "channel":
        return "log_decay per key channel has no kernel, only one per head does"
    limit = MAX_TAYLOR_DIM if call.feature_map == "taylor" else MAX_HEAD_DIM
    if call.key_dim > limit:
        return f"key_dim must be at most {limit} with {call.feature_map!r}, got {call.key_dim}"
    if call.value_dim > MAX_HEAD_DIM:
        return f"value_dim must be at most {MAX_HEAD_DIM}, got {call.value_dim}"
    return None


def _tuning() -> LinearTuning:
    target = tpu_target()
    return linear_tuning("" if target is None else target.kind)


def forward(call: LinearAttentionCall, operands: Operands, interpret: Any = False) -> Result:
    from effattn.pallas_kernels.linear_attention import tpu_forward

    return tpu_forward.forward(call, operands, tuning=_tuning(), interpret=interpret)


def backward(
    call: LinearAttentionCall,
    operands: Operands,
    out: Any,
    denominator: Any,
    d_out: Any,
    d_state: Any,
    interpret: Any = False,
) -> Operands:
    from effattn.pallas_kernels.linear_attention import tpu_backward

    return tpu_backward.backward(
        call, operands, out, denominator, d_out, d_state, tuning=_tuning(), interpret=interpret
    )


def _backend(
    name: str, refuses: Callable[[LinearAttentionCall], str | None], **options: Any
) -> Backend:
    passes = (functools.partial(run, **options) for run in (forward, backward))
    return Backend(name, refuses, *passes)


BACKEND = _backend("tpu", refuses)
# The same kernels as ordinary XLA operations on any machine: for tests of their arithmetic.
INTERPRETED = _backend("tpu_interpret", _cannot, interpret=True)
