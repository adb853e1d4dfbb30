"""Tokens in tiles, so that what is made from them never exists for a whole row at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effattn.parallel.mesh import constrain_tokens, sequence_ways


def token_tiles(x: jax.Array, tile: int) -> jax.Array:
    """[batch, seq_len, ...] -> [count, batch, about `tile`, ...], padded with zeros.

    Tiles run along the sequence: rows stay where the mesh put them. Where it splits the sequence,
    every tile has tokens of every part, and none of them moves either.
    """
    batch, seq_len = x.shape[:2]
    ways = _ways(seq_len)
    part, tile = seq_len // ways, max(1, tile // ways)
    count = -(-part // tile)
    x = x.reshape(batch, ways, part, *x.shape[2:])
    padding = [(0, 0), (0, 0), (0, count * tile - part), *[(0, 0)] * (x.ndim - 3)]
    x = jnp.pad(x, padding).reshape(batch, ways, count, tile, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(count, batch, ways * tile, *x.shape[4:])


def from_tiles(tiles: jax.Array, seq_len: int) -> jax.Array:
    """The inverse of `token_tiles`: [batch, seq_len, ...], the padding cut off."""
    count, batch, tokens = tiles.shape[:3]
    ways = _ways(seq_len)
    x = tiles.reshape(count, batch, ways, tokens // ways, *tiles.shape[3:])
    x = jnp.moveaxis(x, 0, 2).reshape(batch, ways, -1, *tiles.shape[3:])
    return x[:, :, : seq_len // ways].reshape(batch, seq_len, *tiles.shape[3:])


def _ways(seq_len: int) -> int:
    ways = sequence_ways()
    return ways if seq_len % ways == 0 else 1


def over_tiles(f: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int) -> jax.Array:
    """`f(x)` for an f that looks at each token alone, a tile at a time, forward and backward.

    x: [batch, seq_len, ...]. What f makes on the way is made again in the backward pass.
    Source: Bekman et al. 2025, Arctic Long Sequence Training (arXiv 2506.13996), tiled MLP.
    """
    if tile >= x.shape[1]:
        return f(x)

    def one(part: jax.Array) -> jax.Array:
        return constrain_tokens(f(constrain_tokens(part)))

    tiles = jax.lax.map(jax.checkpoint(one, prevent_cse=False), token_tiles(x, tile))
    return from_tiles(tiles, x.shape[1])


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
