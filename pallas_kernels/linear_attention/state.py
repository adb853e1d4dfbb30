"""The state of linear attention as a value, and one decoding step whose cost ignores the length."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.checks import Dims, check_in, check_shape
from effattn.pallas_kernels.linear_attention.decay import check_log_decay
from effattn.pallas_kernels.linear_attention.features import (
    FEATURE_MAPS,
    apply_feature_map,
    default_scale,
    num_features,
    query_scale,
)


class LinearState(NamedTuple):
    """What linear attention remembers of the tokens so far. float32, or float64 for such inputs.

    kv: [batch, num_heads, features, value_dim], the decayed sum of phi(k) v^T.
    normalizer: [batch, num_heads, features], the decayed sum of phi(k); None without `normalize`.
    """

    kv: Any
    normalizer: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole batch, also of abstract arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tuple(self)))


def state_dtype(*arrays: jax.Array) -> Any:
    """float32 at least: a bfloat16 running sum is off by tens of percent after 2048 tokens."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def init_linear_state(
    batch: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    feature_map: str = "identity",
    normalize: bool = False,
    dtype: Any = jnp.float32,
) -> LinearState:
    """The state before the first token: zeros. dtype: of the inputs; the state has float32 or more.

    num_heads counts value heads. key_dim is that of the raw keys, before the feature map.
    """
    check_in("feature_map", feature_map, FEATURE_MAPS)
    dtype = jnp.promote_types(dtype, jnp.float32)
    features = num_features(feature_map, key_dim)
    kv = jnp.zeros((batch, num_heads, features, value_dim), dtype)
    return LinearState(kv, jnp.zeros(kv.shape[:-1], dtype) if normalize else None)


def check_state(name: str, state: LinearState, normalize: bool, dims: Dims, dtype: Any) -> None:
    """Raises ValueError unless `state` has the shapes that `dims` and `normalize` ask for, and
    `dtype`: rounded to fewer bits it would have lost the latest tokens already."""
    check_shape(f"{name}.kv", state.kv, "b h f e", dims)
    if (state.normalizer is not None) != normalize:
        got = "none" if state.normalizer is None else "one"
        wanted = "one" if normalize else "none"
        raise ValueError(
            f"{name}.normalizer: got {got}, expected {wanted} with normalize={normalize}"
        )
    if normalize:
        check_shape(f"{name}.normalizer", state.normalizer, "b h f", dims)
    for part, x in state._asdict().items():
        if x is not None and jnp.result_type(x) != dtype:
            raise ValueError(f"{name}.{part}: got {x.dtype}, expected {jnp.dtype(dtype)}")


def linear_attention_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: LinearState,
    *,
    log_decay: jax.Array | None = None,
    feature_map: str = "identity",
    normalize: bool = False,
    eps: float = 1e-12,
    scale: float | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, LinearState]:
    """One token of `linear_attention`: (out like value, state after the token).

    query, key: [batch, num_heads or a divisor of it, key_dim]; value: [batch, num_heads,
    value_dim]. log_decay: [num_heads], [batch, num_heads] or [batch, num_heads, key_dim].
    valid: bool [batch]; a row with valid=False keeps its state and gets out = 0. The other
    arguments are those of `linear_attention`. Time and memory do not depend on how many tokens
    came before. Raises ValueError where shapes do not fit.
    """
    check_in("feature_map", feature_map, FEATURE_MAPS)
    dims: Dims = {}
    check_shape("query", query, "b g d", dims)
    check_shape("key", key, "b g d", dims)
    check_shape("value", value, "b h e", dims)
    dims["f"] = (num_features(feature_map, dims["d"][0]), "feature_map and `key`")
    check_state("state", state, normalize, dims, state_dtype(query, key, value))
    repeats = repeats_of_key_heads(query.shape[1], value.shape[1])
    dtype = state_dtype(query, key, value)
    scale = default_scale(feature_map, query.shape[-1]) if scale is None else scale

    phi_query, phi_key = (
        jnp.repeat(apply_feature_map(feature_map, x.astype(dtype), scale), repeats, axis=1)
        for x in (query, key)
    )
    phi_query = phi_query * query_scale(feature_map, scale)
    v = value.astype(dtype)
    decay = jnp.ones((1, 1, 1), dtype)
    if log_decay is not None:
        if log_decay.ndim == 3 and feature_map != "identity":
            raise ValueError(PER_CHANNEL_NEEDS_IDENTITY)
        axes = {1: "h", 2: "b h", 3: "b h d"}.get(log_decay.ndim, "b h d")
        check_shape("log_decay", log_decay, axes, dims)
        check_log_decay(log_decay)
        decay = jnp.exp(log_decay.astype(dtype))
        decay = decay[None, :, None] if decay.ndim == 1 else decay
        decay = decay[:, :, None] if decay.ndim == 2 else decay
    kv = state.kv * decay[..., None] + phi_key[..., :, None] * v[..., None, :]
    out = jnp.einsum("bhf,bhfe->bhe", phi_query, kv)
    normalizer = None
    if normalize:
        normalizer = state.normalizer * decay + phi_key
        out = out / (jnp.einsum("bhf,bhf->bh", phi_query, normalizer) + eps)[..., None]
    after = LinearState(kv, normalizer)
    if valid is not None:
        check_shape("valid", valid, "b", dims)
        after = jax.tree.map(lambda new, old: _where_rows(valid, new, old), after, state)
        out = _where_rows(valid, out, jnp.zeros_like(out))
    return out.astype(value.dtype), after


PER_CHANNEL_NEEDS_IDENTITY = (
    "log_decay: got one decay per key channel, expected one per head: "
    "feature_map='taylor' mixes the channels"
)


def repeats_of_key_heads(num_key_heads: int, num_heads: int) -> int:
    """How many value heads share a key head. Head j reads key head j // repeats."""
    if num_heads % num_key_heads:
        raise ValueError(
            f"value: got {num_heads} heads, expected a multiple of the {num_key_heads} of `key`"
        )
    return num_heads // num_key_heads


def _where_rows(keep: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(keep.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
