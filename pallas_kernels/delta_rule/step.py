"""One decoding step of the delta rule, whose cost ignores the length."""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.checks import Dims, check_shape
from effattn.pallas_kernels.linear_attention.decay import check_log_decay


def delta_rule_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `delta_rule`: (out like value, state after the token).

    query, key: [batch, num_heads or a divisor of it, key_dim]; value: [batch, num_heads,
    value_dim]; beta, log_decay: [batch, num_heads]; state: [batch, num_heads, key_dim, value_dim],
    zeros before the first token. valid: bool [batch]; a row with valid=False keeps its state and
    gets out = 0. Raises ValueError naming the argument that does not fit.
    """
    dims: Dims = {}
    check_shape("query", query, "b g d", dims)
    check_shape("key", key, "b g d", dims)
    check_shape("value", value, "b h e", dims)
    check_shape("beta", beta, "b h", dims)
    repeats = key_head_repeats(query.shape[1], value.shape[1])
    dtype = state_dtype(query, key, value)
    check_delta_state(state, dtype, dims)
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    q, k = (jnp.repeat(x.astype(dtype), repeats, axis=1) for x in (query, key))
    decayed = state
    if log_decay is not None:
        check_shape("log_decay", log_decay, "b h", dims)
        check_log_decay(log_decay)
        decayed = state * jnp.exp(log_decay.astype(dtype))[..., None, None]
    error = value.astype(dtype) - jnp.einsum("bhde,bhd->bhe", decayed, k)
    after = decayed + k[..., None] * (beta.astype(dtype)[..., None] * error)[..., None, :]
    out = scale * jnp.einsum("bhde,bhd->bhe", after, q)
    if valid is not None:
        check_shape("valid", valid, "b", dims)
        after = jnp.where(valid[:, None, None, None], after, state)
        out = jnp.where(valid[:, None, None], out, 0)
    return out.astype(value.dtype), after


def state_dtype(*arrays: jax.Array) -> Any:
    """float32 at least."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def check_delta_state(state: jax.Array, dtype: Any, dims: Dims) -> None:
    """Raises ValueError unless `state` has the shape that `dims` asks for, and `dtype`."""
    check_shape("state", state, "b h d e", dims)
    if state.dtype != dtype:
        raise ValueError(
            f"state: got {state.dtype}, expected {jnp.dtype(dtype)}: states are float32, or "
            "float64 beside float64 inputs"
        )


def key_head_repeats(num_key_heads: int, num_heads: int) -> int:
    """How many value heads share a key head. Head j reads key head j // repeats."""
    if num_heads % num_key_heads:
        raise ValueError(
            f"value: got {num_heads} heads, expected a multiple of the {num_key_heads} of `key`"
        )
    return num_heads // num_key_heads
