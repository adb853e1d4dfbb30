"""Tokens in tiles, so that what is made from them never exists for a whole row at once."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effattn.parallel.mesh import (
    BATCH_AXES,
    SEQUENCE_AXIS,
    STREAMS_AXIS,
    free_axes,
    sequence_ways,
)
from effattn.parallel.sequence import dividing_axes


def token_tiles(x: jax.Array, tile: int) -> jax.Array:
    """[batch, seq_len, ...] -> [count, batch, about `tile`, ...], padded with zeros.

    Tiles run along the sequence: rows stay where the mesh put them. Where it splits the sequence,
    every tile has tokens of every part, and none of them moves either.
    """
    return _cut(x, _ways(x.shape[1]), tile)


def _cut(x: jax.Array, ways: int, tile: int) -> jax.Array:
    batch, seq_len = x.shape[:2]
    part, tile = seq_len // ways, max(1, tile // ways)
    count = -(-part // tile)
    x = x.reshape(batch, ways, part, *x.shape[2:])
    padding = [(0, 0), (0, 0), (0, count * tile - part), *[(0, 0)] * (x.ndim - 3)]
    x = jnp.pad(x, padding).reshape(batch, ways, count, tile, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(count, batch, ways * tile, *x.shape[4:])


def from_tiles(tiles: jax.Array, seq_len: int) -> jax.Array:
    """The inverse of `token_tiles`: [batch, seq_len, ...], the padding cut off."""
    return _joined(tiles, seq_len, _ways(seq_len))


def _joined(tiles: jax.Array, seq_len: int, ways: int) -> jax.Array:
    count, batch, tokens = tiles.shape[:3]
    x = tiles.reshape(count, batch, ways, tokens // ways, *tiles.shape[3:])
    x = jnp.moveaxis(x, 0, 2).reshape(batch, ways, -1, *tiles.shape[3:])
    return x[:, :, : seq_len // ways].reshape(batch, seq_len, *tiles.shape[3:])


def _ways(seq_len: int) -> int:
    ways = sequence_ways()
    return ways if seq_len % ways == 0 else 1


def over_tiles(layer: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int) -> jax.Array:
    """`layer(x)` for a layer that looks at each token alone, a tile at a time, both ways.

    layer: a module, or another pytree that can be called. x: [batch, seq_len, ...]. tile: tokens of
    a row, over all devices that share it. What the layer makes on the way is made again in the
    backward pass. Each device runs over its own tiles, so that gradients of the layer's parameters
    are added up on it and meet once, not once per tile.
    Source: Bekman et al. 2025, Arctic Long Sequence Training (arXiv 2506.13996), tiled MLP.
    """
    if tile >= x.shape[1]:
        return layer(x)
    free = free_axes()
    rows = dividing_axes((STREAMS_AXIS, *BATCH_AXES), free, x.shape[0])
    tokens = dividing_axes((SEQUENCE_AXIS,), free, x.shape[1])
    ways = math.prod(free[axis] for axis in tokens)

    def run(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        one = jax.checkpoint(lambda part: layer(part), prevent_cse=False)
        tiles = jax.lax.map(one, _cut(x, 1, max(1, tile // ways)))
        return _joined(tiles, x.shape[1], 1)

    if all(free[axis] == 1 for axis in (*rows, *tokens)):
        return run(layer, x)
    of_x = PartitionSpec(rows, tokens)
    split = jax.shard_map(
        run,
        in_specs=(PartitionSpec(), of_x),
        out_specs=of_x,
        axis_names={*rows, *tokens},
        check_vma=False,
    )
    return split(layer, x)


def split_tokens(x: jax.Array, fraction: float) -> tuple[jax.Array, jax.Array]:
    """The first `fraction` of the tokens that each device holds, and the others."""
    batch, seq_len = x.shape[:2]
    ways = _ways(seq_len)
    part = seq_len // ways
    first = round(fraction * part)
    x = x.reshape(batch, ways, part, *x.shape[2:])
    return tuple(y.reshape(batch, -1, *x.shape[3:]) for y in (x[:, :, :first], x[:, :, first:]))  # type: ignore[return-value]


def join_tokens(first: jax.Array, rest: jax.Array) -> jax.Array:
    """The inverse of `split_tokens`."""
    batch, seq_len = first.shape[0], first.shape[1] + rest.shape[1]
    ways = _ways(seq_len)
    parts = [y.reshape(batch, ways, -1, *y.shape[2:]) for y in (first, rest)]
    return jnp.concatenate(parts, axis=2).reshape(batch, seq_len, *first.shape[2:])
