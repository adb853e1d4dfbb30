"""The public call of linear attention: checks, packed rows and prefixes, choice of a backend.

The mathematics is in `reference.py`; `call.py` says what a backend is given.
"""

import functools
import inspect
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from effattn.checks import Dims, check_at_least, check_in, check_shape
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands
from effattn.pallas_kernels.linear_attention.decay import check_log_decay
from effattn.pallas_kernels.linear_attention.features import (
    FEATURE_MAPS,
    default_scale,
    num_features,
)
from effattn.pallas_kernels.linear_attention.packing import (
    prepend_prefix,
    runs_of_segments,
    take_tokens,
)
from effattn.pallas_kernels.linear_attention.state import (
    PER_CHANNEL_NEEDS_IDENTITY,
    LinearState,
    check_state,
    repeats_of_key_heads,
    state_dtype,
)
from effattn.pallas_kernels.varying import varying_alike

# In order of preference.
BACKENDS = {
    "tpu": "effattn.pallas_kernels.linear_attention.tpu:BACKEND",
    "xla": "effattn.pallas_kernels.linear_attention.xla:BACKEND",
    "reference": "effattn.pallas_kernels.linear_attention.reference:BACKEND",
    "tpu_interpret": "effattn.pallas_kernels.linear_attention.tpu:INTERPRETED",
}


def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    feature_map: str = "identity",
    normalize: bool = False,
    eps: float = 1e-12,
    scale: float | None = None,
    state: LinearState | None = None,
    prefix_key: jax.Array | None = None,
    prefix_value: jax.Array | None = None,
    prefix_segment_ids: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, LinearState]:
    """Causal linear attention: out_t = scale phi(q_t)^T S_t, the sum S decayed at each step.

    S_t = exp(log_decay_t) S_{t-1} + phi(k_t) v_t^T: the newest token enters undecayed.

    query, key: [batch, seq_len, num_key_heads, key_dim]. value: [batch, seq_len, num_heads,
    value_dim], num_heads a multiple of num_key_heads; head j reads key head j // (their ratio).
    log_decay: natural logarithm, <= 0 (-inf forgets all): [num_heads], [batch, seq_len, num_heads]
    or, per key channel, [batch, seq_len, num_heads, key_dim]. None: no decay.
    feature_map: "identity", or "taylor" with phi(q).phi(k) = 1 + s + s^2 / 2, s = scale q.k, made
    here from the raw query and key; it takes no decay per channel.
    normalize: divide by scale phi(q_t)^T z_t + eps, z the sum of phi(k), decayed as S is.
    scale: None takes 1 for "identity" and key_dim^-1/2 for "taylor" (there it must be > 0).
    state: what came before the first document of each row; None for nothing.
    segment_ids: int [batch, seq_len], one number per document. The sums start anew where the
    number changes. Tokens of segment 0 are padding, wherever they stand: they neither add nor
    decay nor separate, and their out is 0.
    prefix_key, prefix_value: [batch, prefix_len, ...], a second set that every query sees, at all
    positions; it enters the sums, also the returned ones, before the document's first token.
    prefix_segment_ids: int [batch, prefix_len], the document that each belongs to, 0 for padding.
    Needed beside segment_ids, where with a prefix no document may stand in two places; without
    segment_ids the tokens count as segment 1.
    chunk_size: tokens handled as one quadratic piece; None lets the backend choose.
    implementation: "auto", or one of BACKENDS.

    Returns (out like value, the LinearState after each row's last token that is not padding).
    Sums are in float32, or float64 for such inputs. Raises ValueError naming the argument.
    Sources: Katharopoulos et al. 2020; Qin et al. 2024, Lightning Attention-2 (chunks); Arora et
    al. 2024, BASED (Taylor); Arora et al. 2024, JRT (prefix); Yang et al. 2024, GLA (channels).
    """
    call, operands, place = _prepare(
        query=query, key=key, value=value, log_decay=log_decay, feature_map=feature_map,
        normalize=normalize, eps=eps, scale=scale, state=state, prefix_key=prefix_key,
        prefix_value=prefix_value, prefix_segment_ids=prefix_segment_ids, segment_ids=segment_ids,
        chunk_size=chunk_size,
    )  # fmt: skip
    backend = dispatch.choose("linear_attention", BACKENDS, call, implementation)
    out, state = _run(backend, call, operands)
    return (out if place is None else take_tokens(out, place)), state


def explain(*args: Any, **kwargs: Any) -> str:
    """What each backend says to such a call of `linear_attention`, in order of preference."""
    bound = inspect.signature(linear_attention).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {k: v for k, v in bound.arguments.items() if k != "implementation"}
    return dispatch.explain(BACKENDS, _prepare(**arguments)[0])


def _prepare(
    *, query, key, value, log_decay, feature_map, normalize, eps, scale, state, prefix_key,
    prefix_value, prefix_segment_ids, segment_ids, chunk_size,
) -> tuple[LinearAttentionCall, Operands, Any]:  # fmt: skip
    """(call, operands, where our tokens stand among the operands' or None for everywhere)."""
    check_in("feature_map", feature_map, FEATURE_MAPS)
    dims: Dims = {}
    check_shape("query", query, "b s g d", dims)
    check_shape("key", key, "b s g d", dims)
    check_shape("value", value, "b s h e", dims)
    repeats_of_key_heads(query.shape[2], value.shape[2])
    check_at_least("query: seq_len", query.shape[1], 1)
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)
    dims["f"] = (num_features(feature_map, query.shape[3]), "feature_map and `key`")
    if state is not None:
        check_state("state", state, normalize, dims, state_dtype(query, key, value))
    if log_decay is not None:
        axes = {1: "h", 3: "b s h", 4: "b s h d"}.get(log_decay.ndim, "b s h")
        check_shape("log_decay", log_decay, axes, dims)
        check_log_decay(log_decay)
        if log_decay.ndim == 4 and feature_map != "identity":
            raise ValueError(PER_CHANNEL_NEEDS_IDENTITY)
    if segment_ids is not None:
        check_shape("segment_ids", segment_ids, "b s", dims)
    scale = default_scale(feature_map, query.shape[3]) if scale is None else float(scale)
    if feature_map == "taylor" and not scale > 0:
        raise ValueError(f"scale: got {scale}, expected more than 0 with feature_map='taylor'")

    place = None
    prefix = (prefix_key, prefix_value, prefix_segment_ids)
    if any(x is not None for x in prefix):
        _check_prefix(*prefix, segment_ids, dims)
        (query, key, value, log_decay, segment_ids), place = prepend_prefix(
            query, key, value, log_decay, segment_ids, *prefix
        )

    dtype = state_dtype(query, key, value)
    runs = valid = None
    if segment_ids is not None:
        runs, valid = runs_of_segments(segment_ids)
    decay = "none"
    if log_decay is not None:
        log_decay = log_decay.astype(dtype)
        if valid is not None:
            shape = (*valid.shape, *log_decay.shape[2 if log_decay.ndim > 1 else 0 :])
            heard = valid.reshape(*valid.shape, *(1,) * (len(shape) - 2))
            log_decay = jnp.where(heard, jnp.broadcast_to(log_decay, shape), 0)
        decay = {1: "head", 3: "token", 4: "channel"}[log_decay.ndim]

    batch, seq_len, num_key_heads, key_dim = query.shape
    call = LinearAttentionCall(
        batch=batch, seq_len=seq_len, num_key_heads=num_key_heads, num_heads=value.shape[2],
        key_dim=key_dim, value_dim=value.shape[3], dtype=str(value.dtype), state_dtype=str(dtype),
        feature_map=feature_map, normalize=normalize, eps=float(eps), scale=scale, decay=decay,
        segmented=valid is not None, has_state=state is not None, chunk_size=chunk_size,
    )  # fmt: skip
    # Before the rule of differentiation: what devices share gets the sum of their gradients.
    return call, varying_alike(Operands(query, key, value, log_decay, state, runs, valid)), place


def _check_prefix(prefix_key, prefix_value, prefix_segment_ids, segment_ids, dims: Dims) -> None:
    for name, array in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if array is None:
            raise ValueError(f"{name}: got None, expected an array: a prefix has keys and values")
    check_shape("prefix_key", prefix_key, "b m g d", dims)
    check_shape("prefix_value", prefix_value, "b m h e", dims)
    if prefix_segment_ids is not None:
        check_shape("prefix_segment_ids", prefix_segment_ids, "b m", dims)
    elif segment_ids is not None:
        raise ValueError(
            "prefix_segment_ids: got None, expected [batch, prefix_len] ids beside segment_ids, "
            "so that no prefix reaches another document"
        )


# --- differentiation ----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(backend: dispatch.Backend, call: LinearAttentionCall, operands: Operands):
    result = backend.forward(call, operands)
    return result.out, result.state


def _run_forward(backend, call, operands):
    decay = operands.log_decay
    # A residual is an array or nothing: there is one where the decay needs a gradient.
    wanted = None if decay is None or not decay.perturbed else jnp.zeros(())
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=_is_primal)
    result = backend.forward(call, operands)
    return (result.out, result.state), (operands, result.out, result.denominator, wanted)


def _run_backward(backend, call, residuals, cotangents):
    operands, out, denominator, wanted = residuals
    call = replace(call, decay_gradient=wanted is not None)
    d_out, d_state = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    # A state that nobody used costs nothing: its cotangent is None, not an array of zeros.
    d_state = LinearState(*(None if isinstance(x, SymbolicZero) else x for x in d_state))
    return (backend.backward(call, operands, out, denominator, d_out, d_state),)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


_run.defvjp(_run_forward, _run_backward, symbolic_zeros=True)
