"""Rotary position embedding from explicit positions, half-split (NeoX) layout."""

from typing import Any

import jax
import jax.numpy as jnp


def rotary_tables(
    positions: jax.Array, rotary_dim: int, base: float, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of `position * base**(-2 i / rotary_dim)`, i < rotary_dim / 2.

    positions: [batch, seq_len] -> two arrays [batch, seq_len, 1, rotary_dim / 2]. The angles are
    float32 at least: bfloat16 cannot tell position 257 from 256. Source: Su et al. 2021.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)
    frequencies = base ** (-jnp.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)
    angles = positions[..., None, None].astype(dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first rotary_dim channels of x, pair (i, i + rotary_dim / 2) by one angle.

    x: [batch, seq_len, num_heads, head_dim]; the channels beyond rotary_dim pass unchanged.
    """
    cos, sin = tables
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), x[..., 2 * half :]], axis=-1)
