"""The public call of the delta rule: checks, packed rows, choice of a backend.

The mathematics is in `reference.py`; `call.py` says what a backend is given.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from effattn.checks import Dims, check_at_least, check_shape
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.delta_rule.call import DeltaRuleCall, Operands
from effattn.pallas_kernels.delta_rule.step import (
    check_delta_state,
    key_head_repeats,
    state_dtype,
)
from effattn.pallas_kernels.linear_attention.decay import check_log_decay
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.pallas_kernels.varying import varying_alike

# In order of preference.
BACKENDS = {
    "xla": "effattn.pallas_kernels.delta_rule.xla:BACKEND",
    "reference": "effattn.pallas_kernels.delta_rule.reference:BACKEND",
}


def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Linear attention whose state is corrected, not only added to: out_t = scale S_t^T q_t.

    S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T with S'_t = exp(log_decay_t) S_{t-1}: what the
    state recalls for k_t moves the share beta_t of the way to v_t, if k_t is a unit vector. The
    state diverges where beta_t |k_t|^2 > 2, so keys are to be normalised by the caller.

    query, key: [batch, seq_len, num_key_heads, key_dim]. value: [batch, seq_len, num_heads,
    value_dim], num_heads a multiple of num_key_heads; head j reads key head j // (their ratio).
    beta: [batch, seq_len, num_heads].
    log_decay: natural logarithm, <= 0 (-inf forgets all), [batch, seq_len, num_heads]; None: no
    decay. scale: None takes key_dim^-1/2.
    state: [batch, num_heads, key_dim, value_dim], what came before the first document of each row;
    None for nothing. float32, or float64 beside float64 inputs.
    segment_ids: int [batch, seq_len], one number per document. The state starts anew where the
    number changes. Tokens of segment 0 are padding, wherever they stand: they neither write nor
    decay nor separate, and their out is 0.
    chunk_size: tokens handled as one quadratic piece; None lets the backend choose.
    implementation: "auto", or one of BACKENDS.

    Returns (out like value, the state after each row's last token that is not padding). Raises
    ValueError naming the argument; a positive log_decay is found where its numbers are known.
    Sources: Yang et al. 2024, Parallelizing Linear Transformers with the Delta Rule (chunks);
    Yang, Kautz and Hatamizadeh 2024, Gated Delta Networks (decay).
    """
    call, operands = _prepare(
        query=query, key=key, value=value, beta=beta, log_decay=log_decay, scale=scale,
        state=state, segment_ids=segment_ids, chunk_size=chunk_size,
    )  # fmt: skip
    backend = dispatch.choose("delta_rule", BACKENDS, call, implementation)
    return _run(backend, call, operands)


def explain(*args: Any, **kwargs: Any) -> str:
    """What each backend says to such a call of `delta_rule`, in order of preference."""
    bound = inspect.signature(delta_rule).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {k: v for k, v in bound.arguments.items() if k != "implementation"}
    return dispatch.explain(BACKENDS, _prepare(**arguments)[0])


def _prepare(
    *, query: Any, key: Any, value: Any, beta: Any, log_decay: Any, scale: float | None,
    state: Any, segment_ids: Any, chunk_size: int | None,
) -> tuple[DeltaRuleCall, Operands]:  # fmt: skip
    dims: Dims = {}
    check_shape("query", query, "b s g d", dims)
    check_shape("key", key, "b s g d", dims)
    check_shape("value", value, "b s h e", dims)
    check_shape("beta", beta, "b s h", dims)
    key_head_repeats(query.shape[2], value.shape[2])
    check_at_least("query: seq_len", query.shape[1], 1)
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    dtype = state_dtype(query, key, value)
    if state is not None:
        check_delta_state(state, dtype, dims)
    beta = beta.astype(dtype)
    if log_decay is not None:
        check_shape("log_decay", log_decay, "b s h", dims)
        check_log_decay(log_decay)
        log_decay = log_decay.astype(dtype)
    runs = None
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "b s", dims)
        runs, valid = runs_of_segments(segment_ids)
        query, key, value, beta, log_decay = (
            None
            if x is None
            else jnp.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, 0)
            for x in (query, key, value, beta, log_decay)
        )

    batch, seq_len, num_key_heads, key_dim = query.shape
    call = DeltaRuleCall(
        batch=batch, seq_len=seq_len, num_key_heads=num_key_heads, num_heads=value.shape[2],
        key_dim=key_dim, value_dim=value.shape[3], dtype=str(value.dtype), state_dtype=str(dtype),
        scale=key_dim**-0.5 if scale is None else float(scale), decay=log_decay is not None,
        segmented=runs is not None, has_state=state is not None, chunk_size=chunk_size,
    )  # fmt: skip
    # Before the rule of differentiation: what devices share gets the sum of their gradients.
    return call, varying_alike(Operands(query, key, value, beta, log_decay, state, runs))


# --- differentiation ----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend: dispatch.Backend, call: DeltaRuleCall, operands: Operands) -> Any:
    return backend.forward(call, operands)


def _run_forward(backend: dispatch.Backend, call: DeltaRuleCall, operands: Any) -> Any:
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=_is_primal)
    return backend.forward(call, operands), operands


def _run_backward(
    backend: dispatch.Backend, call: DeltaRuleCall, operands: Operands, cotangents: Any
) -> tuple[Operands]:
    d_out, d_state = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(operands.value)
    # A state that nobody used costs nothing: its cotangent is None, not an array of zeros.
    d_state = None if isinstance(d_state, SymbolicZero) else d_state
    return (backend.backward(call, operands, d_out, d_state),)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)
