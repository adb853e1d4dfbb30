"""Tokens in tiles, so that what is made from them never exists for a whole row at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from effattn.parallel.mesh import (
    BATCH_AXES,
    SEQUENCE_AXIS,
    STREAMS_AXIS,
    dividing_axes,
    free_axes,
    mesh_axes,
    sequence_ways,
)
from effattn.parallel.weights import gathered, parts_of

# Streams come first where a batch is laid out stream by stream.
ROW_AXES = (STREAMS_AXIS, *BATCH_AXES)


def token_tiles(x: jax.Array, tile: int) -> jax.Array:
    """[batch, seq_len, ...] -> [count, batch, about `tile`, ...], padded with zeros.

    Tiles run along the sequence: rows stay where the mesh put them. Where it splits the sequence,
    every tile has tokens of every part, and none of them moves either.
    """
    return _cut(x, _ways(x.shape[1]), tile)


def own_tiles(x: jax.Array, tile: int) -> jax.Array:
    """The same of tokens that one device holds alone."""
    return _cut(x, 1, tile)


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

    def run(layer: Callable[[jax.Array], jax.Array], ways: int, x: jax.Array) -> jax.Array:
        one = jax.checkpoint(lambda part: layer(part), prevent_cse=False)
        tiles = jax.lax.map(one, own_tiles(x, max(1, tile // ways)))
        return _joined(tiles, x.shape[1], 1)

    return on_own_tokens(run, layer, x)


def on_own_tokens(
    run: Callable[..., Any],
    layer: Any,
    *tokens: jax.Array,
    row_axes: tuple[str, ...] = ROW_AXES,
    sums: bool = False,
) -> Any:
    """`run(layer, ways, *tokens)`, on every device with its own tokens alone, and whole parameters.

    layer: a module, or another pytree. tokens: [batch, seq_len, ...] each, rows over row_axes.
    ways: how many devices share the tokens of a row. run returns trees of arrays [batch, seq_len,
    ...], or, with sums, of scalars, which are summed over the devices. Gradients of the parameters
    meet once, at the end.
    """
    rows, columns, ways = _axes_of(tokens[0], row_axes)
    if not rows and not columns:
        return run(layer, 1, *tokens)
    manual = (*rows, *columns)
    parts = parts_of(layer, manual)

    def own(layer: Any, *tokens: jax.Array) -> Any:
        out = run(gathered(layer, parts), ways, *tokens)
        return jax.tree.map(lambda x: x[None], out) if sums else out

    of_tokens = PartitionSpec(rows, columns)
    split = jax.shard_map(
        own,
        in_specs=(parts, *[of_tokens] * len(tokens)),
        out_specs=PartitionSpec(manual) if sums else of_tokens,
        axis_names={*manual},
        check_vma=False,
    )
    out = split(layer, *tokens)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), out) if sums else out


def rows_of_own_tokens(table: nnx.Variable, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`, laid out like the tokens. table: [vocab, width]. tokens: int
    [batch, seq_len]; NaN for one outside the table.

    Devices that share the width tell each other their tokens, look up their part of the vectors of
    all of them, and exchange the parts: each receives its vectors, never the table, and adds up the
    gradient of its own part alone.
    """
    rows, columns, _ = _axes_of(tokens, (*BATCH_AXES, STREAMS_AXIS))
    if not rows and not columns:
        return jnp.take(table[...], tokens, axis=0)
    part = parts_of(table, (*rows, *columns))
    vocab, width = mesh_axes(part)
    if vocab:
        raise ValueError(f"table: its rows lie over {vocab}, like the tokens; expected others")

    def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if not width:
            return jnp.take(table, tokens, axis=0)
        all_tokens = jax.lax.all_gather(tokens, width)
        parts = jnp.take(table, all_tokens, axis=0)
        return jax.lax.all_to_all(parts, width, split_axis=0, concat_axis=3, tiled=True)[0]

    split = jax.shard_map(
        look_up,
        in_specs=(part, PartitionSpec(rows, columns)),
        out_specs=PartitionSpec(rows, columns),
        axis_names={*rows, *columns},
        check_vma=False,
    )
    return split(table[...], tokens)


def _axes_of(
    x: jax.Array, row_axes: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """(mesh axes of the rows of x [batch, seq_len, ...], of its tokens, ways of the latter);
    both empty where they split nothing."""
    free, (batch, seq_len) = free_axes(), x.shape[:2]
    rows = dividing_axes(row_axes, free, batch)
    columns = dividing_axes((SEQUENCE_AXIS,), free, seq_len)
    if all(free[axis] == 1 for axis in (*rows, *columns)):
        return (), (), 1
    return rows, columns, math.prod(free[axis] for axis in columns)


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
