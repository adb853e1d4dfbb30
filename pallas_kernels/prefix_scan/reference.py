"""The definitions: both recurrences, one token at a time, differentiated by jax.

softmax_scan: (m, u, w) and a token (s, 1, v) make, with m' = max(m, s),
    (m', u exp(m - m') + exp(s - m'), w exp(m - m') + exp(s - m') v)          out = w / u
gated_scan:
    h_t = gate_t h_{t-1} + x_t
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.prefix_scan.call import (
    GatedScanCall,
    SoftmaxResult,
    SoftmaxScanCall,
)
from effattn.pallas_kernels.prefix_scan.state import (
    SoftmaxState,
    add_token,
    average,
    where_rows,
)


def _softmax_forward(
    call: SoftmaxScanCall, scores: Any, values: Any, state: SoftmaxState, runs: Any
) -> SoftmaxResult:
    runs = jnp.zeros(scores.shape[:2], jnp.int32) if runs is None else runs
    zero = jnp.zeros((), call.state_dtype)
    empty = SoftmaxState(zero - jnp.inf, zero, zero)

    def token(carry: Any, x: Any) -> Any:
        state, run = carry
        score, value, run_t = x
        state = jax.tree.map(lambda s, e: where_rows(run_t == run, s, e), state, empty)
        state = add_token(state, score, value)
        return (state, run_t), (average(state), state.maximum, state.denominator)

    by_token = _time_first((scores, values.astype(call.state_dtype), runs))
    carry = (state, jnp.zeros_like(runs[:, 0]))
    (state, _), outputs = jax.lax.scan(token, carry, by_token)
    out, maximum, denominator = _time_first(outputs)
    return SoftmaxResult(out.astype(call.dtype), maximum, denominator, state)


def _softmax_backward(
    call: SoftmaxScanCall, scores: Any, values: Any, state: Any, runs: Any, result: Any,
    d_out: Any, d_state: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    def outputs(scores: Any, values: Any, state: SoftmaxState) -> Any:
        result = _softmax_forward(call, scores, values, state, runs)
        return result.out, result.state

    return jax.vjp(outputs, scores, values, state)[1]((d_out, d_state))


def _gated_forward(call: GatedScanCall, gate: Any, x: Any, state: Any) -> Any:
    def token(h: Any, token: Any) -> Any:
        gate_t, x_t = token
        h = gate_t * h + x_t
        return h, h

    by_token = _time_first((gate, x.astype(call.state_dtype)))
    return _time_first(jax.lax.scan(token, state, by_token)[1])


def _gated_backward(
    call: GatedScanCall, gate: Any, x: Any, state: Any, h: Any, d_h: Any
) -> tuple[Any, Any, Any]:
    return jax.vjp(lambda *arrays: _gated_forward(call, *arrays), gate, x, state)[1](d_h)


def _time_first(tree: Any) -> Any:
    """[b, s, ...] <-> [s, b, ...]."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def _refuses(call: SoftmaxScanCall | GatedScanCall) -> str | None:
    return None


SOFTMAX = Backend("reference", _refuses, _softmax_forward, _softmax_backward)
GATED = Backend("reference", _refuses, _gated_forward, _gated_backward)
