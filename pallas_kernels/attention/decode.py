"""Attention of one or a few new tokens over a long cache: the op, its checks, its backends.

It is `attention` with another division of labour: the cache is read once, so time goes to memory
traffic, and rows of unequal length read what they hold. The cache is two plain arrays.
"""

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn.checks import Dims, check_at_least, check_in, check_shape
from effattn.masks import Causal, Mask
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.attention.call import check_arrays
from effattn.pallas_kernels.attention.decode_call import DecodeCall, Places

BACKENDS = {
    "tpu": "effattn.pallas_kernels.attention.decode_tpu:BACKEND",
    "xla": "effattn.pallas_kernels.attention.decode_xla:BACKEND",
}

CAUSAL = Causal()


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    lengths: Any,
    q_positions: Any = None,
    kv_positions: Any = None,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    num_splits: int | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Softmax attention of the newest tokens over a cache that already holds their keys and values.

    query: [batch, q_len, num_heads, head_dim], q_len one or a few;
    key: [batch, cache_len, num_kv_heads, head_dim];
    value: [batch, cache_len, num_kv_heads, value_dim]; num_kv_heads divides num_heads.
    lengths: int [batch]; slots [0, lengths) of a row hold tokens, the others may hold anything,
        nan included. At most cache_len.
    q_positions: int [batch, q_len], [1, q_len] or [q_len]; default: the last q_len of the row's
        tokens, lengths - q_len + arange(q_len).
    kv_positions: int [batch, cache_len], [1, cache_len] or [cache_len]; default: the slot's index.
        A ring or a compacted cache gives both. A slot that no query may see can carry a position
        that the mask forbids (under `Causal` any beyond the query's).
    mask: which positions may attend which, the same for all heads.
    scale: default head_dim ** -0.5. logit_soft_cap: cap * tanh(logits / cap), before the mask.
    num_splits: parts that the cache is cut into, computed side by side and merged; None: the
        backend's own choice. The result does not depend on it but for rounding.
    implementation: "auto", "tpu" or "xla"; see `explain_decode`.

    Only blocks of the cache in which some query of the row may see a slot are read: lengths bound
    the work, and so does a window. The dtypes of query and cache may differ.

    Returns out [batch, q_len, num_heads, value_dim] in the dtype of query; with return_lse also
    the log-sum-exp of the logits [batch, q_len, num_heads], float32 or wider. A query that may
    see nothing, as in a row of length 0, gets out 0 and lse -inf. Differentiable in query, key and
    value; the backward pass is that of `attention`.
    Raises ValueError for arguments that do not fit, and if the named implementation refuses.
    """
    dims = check_arrays(query, key, value)
    places = _check_places(dims, lengths, q_positions, kv_positions)
    call = _describe(query, key, value, places, mask, scale, logit_soft_cap, num_splits)
    backend = dispatch.choose("decode_attention", BACKENDS, call, implementation)
    out, lse = _decode(backend, call, query, key, value, places)
    return (out, lse) if return_lse else out


def explain_decode(query: Any, key: Any, value: Any, **arguments: Any) -> str:
    """Which backend `decode_attention` would take for the same arguments, and why the others not.

    Arrays may be `jax.ShapeDtypeStruct`. One line per backend, in order of preference.
    """
    parameters = inspect.signature(decode_attention).parameters
    for name in arguments:
        check_in("explain_decode", name, parameters)
    dims = check_arrays(query, key, value)
    names = ("lengths", "q_positions", "kv_positions")
    lengths, q_positions, kv_positions = (arguments.get(name) for name in names)
    if lengths is None:
        lengths = jax.ShapeDtypeStruct((dims["b"][0],), jnp.int32)
    options = ("mask", "scale", "logit_soft_cap", "num_splits")
    settings = [arguments.get(name, parameters[name].default) for name in options]
    places = jax.eval_shape(partial(_check_places, dims), lengths, q_positions, kv_positions)
    return dispatch.explain(BACKENDS, _describe(query, key, value, places, *settings))


def _describe(
    query: Any,
    key: Any,
    value: Any,
    places: Places,
    mask: Mask,
    scale: float | None,
    logit_soft_cap: float | None,
    num_splits: int | None,
) -> DecodeCall:
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: got {mask!r}, expected one Mask for all heads")
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"logit_soft_cap: got {logit_soft_cap}, expected None or more than 0")
    if num_splits is not None:
        check_at_least("num_splits", num_splits, 1)
    dtypes = [jnp.dtype(array.dtype) for array in (query, key, value)]
    return DecodeCall(
        batch=query.shape[0],
        q_len=query.shape[1],
        cache_len=key.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        query_dtype=dtypes[0],
        key_dtype=dtypes[1],
        value_dtype=dtypes[2],
        accumulator=jnp.promote_types(jnp.result_type(*dtypes), jnp.float32),
        mask=mask,
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
        has_kv_positions=places.kv_positions is not None,
        num_splits=num_splits,
    )


def _check_places(dims: Dims, lengths: Any, q_positions: Any, kv_positions: Any) -> Places:
    batch, q_len, cache_len = dims["b"][0], dims["t"][0], dims["s"][0]
    if lengths is None:
        raise ValueError("lengths: got None, expected the number of tokens in each row's cache")
    if q_positions is None and kv_positions is not None:
        raise ValueError("q_positions: got None, expected them because kv_positions are given")
    lengths = _integers("lengths", lengths, "b", dims)
    if isinstance(lengths, np.ndarray) and not ((lengths >= 0) & (lengths <= cache_len)).all():
        wrong = lengths[(lengths < 0) | (lengths > cache_len)].tolist()
        raise ValueError(f"lengths: got {wrong}, expected 0 to cache_len={cache_len}")
    lengths = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, cache_len)
    if q_positions is None:
        q_positions = lengths[:, None] - q_len + jnp.arange(q_len, dtype=jnp.int32)
    q_positions = _rows("q_positions", q_positions, "t", dims)
    if kv_positions is not None:
        kv_positions = _rows("kv_positions", kv_positions, "s", dims)
    return Places(lengths, jnp.broadcast_to(q_positions, (batch, q_len)), kv_positions)


def _integers(name: str, array: Any, spec: str, dims: Dims) -> Any:
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: got dtype {array.dtype}, expected an integer dtype")
    check_shape(name, array, spec, dict(dims))
    return array


def _rows(name: str, array: Any, letter: str, dims: Dims) -> jax.Array:
    """int32 [batch | 1, length]; one axis stands for every row."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if array.ndim == 1:
        array = array[None]
    spec = f"1 {letter}" if array.shape[:1] == (1,) else f"b {letter}"
    return jnp.asarray(_integers(name, array, spec, dims), jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode_rule(
    backend: dispatch.Backend,
    call: DecodeCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    places: Places,
) -> tuple[jax.Array, jax.Array]:
    return backend.forward(call, query, key, value, places)


def _decode_forward(
    backend: dispatch.Backend, call: DecodeCall, query: Any, key: Any, value: Any, places: Places
) -> Any:
    return backend.forward(call, query, key, value, places), (query, key, value, places)


def _decode_backward(
    backend: dispatch.Backend, call: DecodeCall, residuals: Any, cotangents: Any
) -> Any:
    return *backend.backward(call, *residuals, *cotangents), None


_decode_rule.defvjp(_decode_forward, _decode_backward)
# Compiled once per call description when used eagerly; inside another jit it is inlined.
_decode = jax.jit(_decode_rule, static_argnums=(0, 1), inline=True)
