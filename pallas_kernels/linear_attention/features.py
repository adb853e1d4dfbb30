"""Feature maps phi with q.k replaced by phi(q).phi(k), and the two layouts of the Taylor map.

The state keeps the packed layout, `1, x, upper triangle of x x^T`: it has the dot product of the
full layout `1, x, vec(x x^T)` of the BASED paper (Arora et al. 2024, section 4) and 44% fewer rows
at key_dim 16.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

FEATURE_MAPS = ("identity", "taylor")


def num_features(feature_map: str, key_dim: int) -> int:
    """Rows of the state: key_dim, or 1 + d + d (d + 1) / 2 for the packed Taylor map."""
    if feature_map == "taylor":
        return 1 + key_dim + key_dim * (key_dim + 1) // 2
    return key_dim


def default_scale(feature_map: str, key_dim: int) -> float:
    """1 for "identity", key_dim^-1/2 for "taylor"."""
    return key_dim**-0.5 if feature_map == "taylor" else 1.0


def taylor_features(x: jax.Array, scale: float | None = None) -> jax.Array:
    """Packed phi(x), [..., d] -> [..., 1 + d + d (d + 1) / 2], for query and key alike.

    phi(q).phi(k) = 1 + s + s^2 / 2 with s = scale q.k, the second-order Taylor series of exp(s).
    Order: 1, x, then x_m x_n for m <= n by rows of the triangle (halved in the square for m = n).
    scale: None takes d^-1/2.
    """
    x = _scaled(x, scale)
    half = np.sqrt(0.5).astype(x.dtype)
    # Slices rather than a gather: the gradient of a gather is a scatter, slow everywhere.
    squares = []
    for m in range(x.shape[-1]):
        row = jnp.concatenate([x[..., m : m + 1] * half, x[..., m + 1 :]], axis=-1)
        squares.append(x[..., m : m + 1] * row)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, *squares], axis=-1)


def taylor_features_full(x: jax.Array, scale: float | None = None) -> jax.Array:
    """The paper's layout, [..., d] -> [..., 1 + d + d^2]: 1, x / d^(1/4), vec(x x^T) / (2 d)^(1/2).

    vec is by rows: index m d + n holds x_m x_n. Same dot products as `taylor_features`.
    """
    x = _scaled(x, scale)
    squares = x[..., :, None] * x[..., None, :] * np.sqrt(0.5).astype(x.dtype)
    squares = squares.reshape(*x.shape[:-1], x.shape[-1] ** 2)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares], axis=-1)


def unpack_taylor_state(packed: jax.Array, key_dim: int, axis: int = -2) -> jax.Array:
    """Rows of a packed Taylor state, laid out as the full map has them: 1 + d + d^2 along `axis`.

    packed: `LinearState.kv` with axis=-2, or `LinearState.normalizer` with axis=-1. A row x_m x_n
    with m < n stands in two places of the full map, each with weight 1 / sqrt(2) of ours.
    """
    wanted = num_features("taylor", key_dim)
    if packed.shape[axis] != wanted:
        raise ValueError(
            f"packed: got {packed.shape[axis]} rows, expected {wanted} for key_dim={key_dim}"
        )
    position = np.zeros((key_dim, key_dim), np.int32)
    rows, columns = np.triu_indices(key_dim)
    position[rows, columns] = position[columns, rows] = np.arange(len(rows))
    weight = np.where(np.eye(key_dim, dtype=bool), 1.0, math.sqrt(0.5)).reshape(-1)
    linear, squares = jnp.split(jnp.moveaxis(packed, axis, -1), [1 + key_dim], axis=-1)
    squares = squares[..., position.reshape(-1)] * weight.astype(packed.dtype)
    return jnp.moveaxis(jnp.concatenate([linear, squares], axis=-1), -1, axis)


def apply_feature_map(feature_map: str, x: jax.Array, scale: float) -> jax.Array:
    """phi(key), or phi(query) up to the factor that `query_scale` names."""
    return taylor_features(x, scale) if feature_map == "taylor" else x


def query_scale(feature_map: str, scale: float) -> float:
    """What is left of `scale` outside the feature map; the Taylor map has it on both sides."""
    return 1.0 if feature_map == "taylor" else scale


def _scaled(x: jax.Array, scale: float | None) -> jax.Array:
    scale = default_scale("taylor", x.shape[-1]) if scale is None else scale
    return x * np.asarray(math.sqrt(scale), x.dtype)
