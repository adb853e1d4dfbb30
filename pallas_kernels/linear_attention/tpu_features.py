"""Feature maps inside a TPU kernel: tokens in lanes, features in sublanes, nothing in HBM.

The Taylor map's squares go by blocks of 8 channels, so that each register of features is one
channel, spread over the sublanes, times one register of channels. A block with itself gives all 64
ordered products, two blocks give each product once: 216 rows at key_dim 16 where the packed map of
`features.py` has 153, both within the two passes of 128 that the matrix unit makes of them.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from effattn.pallas_kernels.linear_attention.features import num_features

_BLOCK = 8  # sublanes of a float32 register
_HALF = math.sqrt(0.5)


def _pairs(key_dim: int) -> Iterator[tuple[int, int, float]]:
    """(channel, first channel of a block, weight) of every register of squares, in order."""
    for first in range(0, key_dim, _BLOCK):
        for second in range(first, key_dim, _BLOCK):
            for channel in range(first, first + _BLOCK):
                yield channel, second, _HALF if first == second else 1.0


def num_kernel_features(feature_map: str, key_dim: int) -> int:
    """Rows of `kernel_features`. key_dim: a multiple of 8."""
    if feature_map == "identity":
        return key_dim
    return _BLOCK * len(list(_pairs(key_dim))) + key_dim + _BLOCK


def kernel_features(x: jax.Array) -> jax.Array:
    """Taylor features [features, tokens] of x [key_dim, tokens] float32: squares, x, 1."""
    rows = [
        (x[m : m + 1] * weight) * x[block : block + _BLOCK]
        for m, block, weight in _pairs(x.shape[0])
    ]
    return jnp.concatenate([*rows, x, _ones_row(x.shape[1], _BLOCK, x.dtype)], axis=0)


def kernel_features_backward(x: jax.Array, d_features: jax.Array) -> jax.Array:
    """The cotangent of x from that of `kernel_features(x)`.

    d_features: with the same numbers for x_m x_n and x_n x_m, as every sum of features has them.
    """
    blocks = range(0, x.shape[0], _BLOCK)
    pairs = list(_pairs(x.shape[0]))
    start = _BLOCK * len(pairs)
    d_blocks = {b: d_features[start + b : start + b + _BLOCK] for b in blocks}
    # Of a block with a later one: one number per channel, collected as rows of the channel's block.
    own: dict[int, list[jax.Array]] = {m: [] for m in range(x.shape[0])}
    for at, (m, block, weight) in enumerate(pairs):
        d = d_features[_BLOCK * at : _BLOCK * (at + 1)]
        if block == m // _BLOCK * _BLOCK:
            # The channel stands on both sides of such products, symmetrically.
            d_blocks[block] += d * (x[m : m + 1] * (2 * weight))
        else:
            d_blocks[block] += d * x[m : m + 1]
            own[m].append(jnp.sum(d * x[block : block + _BLOCK], 0, keepdims=True))
    for b in blocks:
        if own[b]:
            rows = [sum(own[m][1:], own[m][0]) for m in range(b, b + _BLOCK)]
            d_blocks[b] += jnp.concatenate(rows, 0)
    return jnp.concatenate([d_blocks[b] for b in blocks], axis=0)


def _ones_row(tokens: int, rows: int, dtype: jnp.dtype) -> jax.Array:
    """[rows, tokens]: ones in the first row, zeros below."""
    return (jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 0) == 0).astype(dtype)


@functools.lru_cache(maxsize=32)
def packed_from_kernel(key_dim: int, padded: int) -> np.ndarray:
    """T [packed features, kernel features] of the Taylor map, T T^T = 1.

    A state in the packed layout is T times one in the kernel's, and T^T leads back to a state that
    gives the same outputs; cotangents go the same ways. padded: key_dim as the kernel has it.
    """
    table = np.zeros((num_features("taylor", key_dim), num_kernel_features("taylor", padded)))
    # Places of the packed map: 1, x, then x_m x_n for m <= n.
    place = np.zeros((key_dim, key_dim), np.int64)
    rows, columns = np.triu_indices(key_dim)
    place[rows, columns] = place[columns, rows] = 1 + key_dim + np.arange(len(rows))
    at = 0
    for m, block, weight in _pairs(padded):
        for n in range(block, block + _BLOCK):
            if m < key_dim and n < key_dim:
                table[place[m, n], at] = 1.0 if m == n or weight == 1.0 else _HALF
            at += 1
    table[1 + np.arange(key_dim), at + np.arange(key_dim)] = 1
    table[0, at + padded] = 1
    table.setflags(write=False)
    return table
