"""The public calls of the scans: checks, packed rows, choice of a backend, and their VJPs.

The mathematics is in `reference.py`; `call.py` says what a backend is given. The VJPs are written
by hand: jax cannot differentiate its own `associative_scan` inside `shard_map`, and would keep
every step of a loop.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from effattn.checks import Dims, check_at_least, check_shape
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.pallas_kernels.prefix_scan.call import (
    GatedScanCall,
    SoftmaxResult,
    SoftmaxScanCall,
)
from effattn.pallas_kernels.prefix_scan.state import (
    SoftmaxState,
    check_same_shape,
    check_softmax_state,
    matched_gate,
    scan_dtype,
    where_rows,
)
from effattn.pallas_kernels.varying import varying_alike

# In order of preference.
SOFTMAX_BACKENDS = {
    "xla": "effattn.pallas_kernels.prefix_scan.xla:SOFTMAX",
    "reference": "effattn.pallas_kernels.prefix_scan.reference:SOFTMAX",
}
GATED_BACKENDS = {
    "xla": "effattn.pallas_kernels.prefix_scan.xla:GATED",
    "reference": "effattn.pallas_kernels.prefix_scan.reference:GATED",
}


def softmax_scan(
    scores: jax.Array,
    values: jax.Array,
    *,
    state: SoftmaxState | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, SoftmaxState]:
    """Softmax average of every prefix: out_t = sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j).

    It is causal attention whose scores do not depend on the token that reads.

    scores: [batch, seq_len, num_heads], finite, or -inf for a token that is never seen.
    values: [batch, seq_len, num_heads, value_dim].
    state: what came before the first document of each row; None for nothing.
    segment_ids: int [batch, seq_len], one number per document. The sums start anew where the
    number changes. Tokens of segment 0 are padding, wherever they stand: they neither add nor
    separate, and their out is 0.
    chunk_size: tokens walked one after the other while chunks walk side by side; None lets the
    backend choose. implementation: "auto", or one of SOFTMAX_BACKENDS.

    Returns (out like values, the SoftmaxState after each row's last token that is not padding).
    Sums are in float32, or float64 for such inputs; no score overflows. Differentiable in scores,
    values and state. Raises ValueError naming the argument.
    Source: Feng et al. 2024, Attention as an RNN (arXiv 2405.13956).
    """
    call, operands, valid = _prepare_softmax(scores, values, state, segment_ids, chunk_size)
    backend = dispatch.choose("softmax_scan", SOFTMAX_BACKENDS, call, implementation)
    out, state = _softmax(backend, call, *operands)
    return (out if valid is None else where_rows(valid, out, jnp.zeros_like(out))), state


def gated_scan(
    gate: jax.Array,
    x: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """The recurrence h_t = gate_t h_{t-1} + x_t, for every channel by itself.

    An exponential moving average is `gated_scan(gate, (1 - gate) * x)`.

    x: [batch, seq_len, *channels]. gate: as many axes, each that of x or of size 1; gates in
    [0, 1] are the usual ones, any are taken.
    state: [batch, *channels], h before the first document of each row; None for zeros.
    segment_ids: int [batch, seq_len], one number per document; h starts from zero where the number
    changes. Tokens of segment 0 are padding: they leave h alone, and theirs is 0.
    chunk_size: as in `softmax_scan`. implementation: "auto", or one of GATED_BACKENDS.

    Returns (h like x, the state [batch, *channels] after each row's last token that is not
    padding). The recurrence is in float32, or float64 for such inputs. Differentiable in gate, x
    and state. Raises ValueError naming the argument.
    """
    call, operands, valid = _prepare_gated(gate, x, state, segment_ids, chunk_size)
    backend = dispatch.choose("gated_scan", GATED_BACKENDS, call, implementation)
    h = _gated(backend, call, *operands)
    out = h if valid is None else where_rows(valid, h, jnp.zeros_like(h))
    return out.astype(x.dtype), h[:, -1]


def explain_softmax_scan(*args: Any, **kwargs: Any) -> str:
    """What each backend says to such a call of `softmax_scan`, in order of preference."""
    return _explain(softmax_scan, _prepare_softmax, SOFTMAX_BACKENDS, args, kwargs)


def explain_gated_scan(*args: Any, **kwargs: Any) -> str:
    """What each backend says to such a call of `gated_scan`, in order of preference."""
    return _explain(gated_scan, _prepare_gated, GATED_BACKENDS, args, kwargs)


def _explain(op: Any, prepare: Any, backends: dispatch.Table, args: Any, kwargs: Any) -> str:
    bound = inspect.signature(op).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {k: v for k, v in bound.arguments.items() if k != "implementation"}
    return dispatch.explain(backends, prepare(**arguments)[0])


def _prepare_softmax(
    scores: jax.Array,
    values: jax.Array,
    state: SoftmaxState | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[SoftmaxScanCall, tuple, jax.Array | None]:
    """(call, operands of the backend, which tokens are no padding or None for all)."""
    dims: Dims = {}
    check_shape("scores", scores, "b s h", dims)
    check_shape("values", values, "b s h e", dims)
    _check_lengths(scores.shape[1], chunk_size)
    if state is not None:
        check_softmax_state(state, dims)
    runs = valid = None
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "b s", dims)
        runs, valid = runs_of_segments(segment_ids)
        # A weight of 0 does not keep an infinity or a nan in the padding out of a sum.
        values = where_rows(valid, values, jnp.zeros_like(values))
        scores = where_rows(valid, scores, jnp.full_like(scores, -jnp.inf))
    dtype = scan_dtype(scores, values)
    if state is None:
        zeros = jnp.zeros_like(values[:, 0], dtype=dtype)
        state = SoftmaxState(zeros[..., 0] - jnp.inf, zeros[..., 0], zeros)
    scores, state = jax.tree.map(lambda x: x.astype(dtype), (scores, SoftmaxState(*state)))
    batch, seq_len, num_heads, value_dim = values.shape
    call = SoftmaxScanCall(
        batch=batch, seq_len=seq_len, num_heads=num_heads, value_dim=value_dim,
        dtype=str(values.dtype), state_dtype=str(dtype), segmented=valid is not None,
        chunk_size=chunk_size,
    )  # fmt: skip
    return call, (*varying_alike((scores, values, state)), runs), valid


def _prepare_gated(
    gate: jax.Array,
    x: jax.Array,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[GatedScanCall, tuple, jax.Array | None]:
    """(call, operands of the backend, which tokens are no padding or None for all)."""
    if x.ndim < 2:
        raise ValueError(f"x: expected [batch, seq_len, *channels], got {tuple(x.shape)}")
    gate = matched_gate(gate, x, leading=2)
    _check_lengths(x.shape[1], chunk_size)
    dtype = scan_dtype(gate, x)
    channels = x.shape[2:]
    if state is None:
        state = jnp.zeros_like(x[:, 0])
    else:
        check_same_shape("state", state, (x.shape[0], *channels))
    gate, state = gate.astype(dtype), state.astype(dtype)
    valid = None
    if segment_ids is not None:
        check_shape(
            "segment_ids", segment_ids, "b s", {"b": (x.shape[0], "x"), "s": (x.shape[1], "x")}
        )
        runs, valid = runs_of_segments(segment_ids)
        previous = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], axis=1)
        gate = where_rows(runs != previous, jnp.zeros_like(gate), gate)
        gate = where_rows(valid, gate, jnp.ones_like(gate))
        x = where_rows(valid, x, jnp.zeros_like(x))
    call = GatedScanCall(
        batch=x.shape[0], seq_len=x.shape[1], channels=channels, gate_channels=gate.shape[2:],
        dtype=str(x.dtype), state_dtype=str(dtype), chunk_size=chunk_size,
    )  # fmt: skip
    return call, varying_alike((gate, x, state)), valid


def _check_lengths(seq_len: int, chunk_size: int | None) -> None:
    check_at_least("seq_len", seq_len, 1)
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)


# ---- differentiation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(
    backend: dispatch.Backend,
    call: SoftmaxScanCall,
    scores: jax.Array,
    values: jax.Array,
    state: SoftmaxState,
    runs: jax.Array | None,
) -> tuple[jax.Array, SoftmaxState]:
    result = backend.forward(call, scores, values, state, runs)
    return result.out, result.state


def _softmax_forward(
    backend: dispatch.Backend, call: SoftmaxScanCall, *operands: Any
) -> tuple[Any, Any]:
    result: SoftmaxResult = backend.forward(call, *operands)
    return (result.out, result.state), (operands, result)


def _softmax_backward(
    backend: dispatch.Backend, call: SoftmaxScanCall, residuals: Any, cotangents: Any
) -> Any:
    operands, result = residuals
    return (*backend.backward(call, *operands, result, *cotangents), None)


_softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated(
    backend: dispatch.Backend,
    call: GatedScanCall,
    gate: jax.Array,
    x: jax.Array,
    state: jax.Array,
) -> jax.Array:
    return backend.forward(call, gate, x, state)


def _gated_forward(
    backend: dispatch.Backend, call: GatedScanCall, *operands: Any
) -> tuple[Any, Any]:
    h = backend.forward(call, *operands)
    return h, (operands, h)


def _gated_backward(
    backend: dispatch.Backend, call: GatedScanCall, residuals: Any, d_h: jax.Array
) -> Any:
    operands, h = residuals
    return backend.backward(call, *operands, h, d_h)


_gated.defvjp(_gated_forward, _gated_backward)
