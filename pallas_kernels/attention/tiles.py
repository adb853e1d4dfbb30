"""Tokens of a 1-3 axis grid in the order of multi-axis tiles: each tile's tokens stand together.

A neighborhood of a tile then is a few whole tiles, so that attention over a grid becomes attention
over a list of blocks. Dilation groups stand apart, one after another, because no token sees another
group. The way there is padding, a reshape and a transpose, and so is the way back: XLA's gradients
of these are copies too, where that of a gather would be a scatter.
"""

import functools
import math
from dataclasses import dataclass
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from effattn.checks import check_at_least, check_same_length


@dataclass(frozen=True)
class Tiling:
    """Which slot each token of a grid gets: dilation groups, tiles, places in a tile, row-major.

    axes: the grid. tile: tokens per axis of one tile, counted inside a dilation group. Each axis is
    filled up to whole tiles of every group; the slots without a token are padding.
    """

    axes: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("tile", "dilation"):
            check_same_length(f"Tiling.{name}", getattr(self, name), len(self.axes), "axis")
            for size in getattr(self, name):
                check_at_least(f"Tiling.{name}", size, 1)

    @property
    def tokens_per_tile(self) -> int:
        return math.prod(self.tile)

    @property
    def tiles_per_axis(self) -> tuple[int, ...]:
        """Tiles of one dilation group; the longest group sets it for all of an axis."""
        return tuple(
            -(-n // (t * d)) for n, t, d in zip(self.axes, self.tile, self.dilation, strict=True)
        )

    @property
    def num_slots(self) -> int:
        sizes = (self.tiles_per_axis, self.tile, self.dilation)
        return math.prod(chain.from_iterable(sizes))

    @property
    def is_plain(self) -> bool:
        """Whether slots are tokens in row-major order, the last tile perhaps cut short."""
        return len(self.axes) == 1 and self.dilation == (1,)

    def permute(self, x: jax.Array) -> jax.Array:
        """[batch, *axes, ...] -> [batch, num_slots, ...], zeros in the padding."""
        rank = len(self.axes)
        missing = [
            (0, count * t * d - n) for n, t, d, count in zip(self.axes, *self._split(), strict=True)
        ]
        x = jnp.pad(x, [(0, 0), *missing, *[(0, 0)] * (x.ndim - rank - 1)])
        rest = x.shape[rank + 1 :]
        x = x.reshape(x.shape[0], *self._split_shape(), *rest)
        x = jnp.transpose(x, self._order(x.ndim))
        return x.reshape(x.shape[0], self.num_slots, *rest)

    def restore(self, x: jax.Array) -> jax.Array:
        """[batch, num_slots, ...] -> [batch, *axes, ...], the inverse of `permute`."""
        rest = x.shape[2:]
        split = self._split_shape()
        order = self._order(1 + len(split) + len(rest))
        inside = [split[axis - 1] for axis in order[1 : 1 + len(split)]]
        x = x.reshape(x.shape[0], *inside, *rest)
        x = jnp.transpose(x, np.argsort(order).tolist())
        counts = zip(*self._split(), strict=True)
        x = x.reshape(x.shape[0], *(math.prod(sizes) for sizes in counts), *rest)
        return x[(slice(None), *(slice(n) for n in self.axes))]

    def kv_positions(self) -> np.ndarray:
        """int32 [num_slots]: each slot's row-major index in the grid; padding stands outside."""
        return _positions(self, False)

    def q_positions(self) -> np.ndarray:
        """Like `kv_positions`, but padding repeats a token of its tile, whose output is dropped.

        So a tile's queries see no more than its tokens do. A tile of padding alone stands outside.
        """
        return _positions(self, True)

    def _split(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.tile, self.dilation, self.tiles_per_axis

    def _split_shape(self) -> list[int]:
        """Coordinate (T t + j) d + g of an axis as its three parts (T, j, g), axis after axis."""
        parts = zip(self.tiles_per_axis, self.tile, self.dilation, strict=True)
        return list(chain.from_iterable(parts))

    def _order(self, ndim: int) -> list[int]:
        rank = len(self.axes)
        by_part = [[1 + 3 * axis + part for axis in range(rank)] for part in range(3)]
        tiles, places, groups = by_part
        return [0, *groups, *tiles, *places, *range(1 + 3 * rank, ndim)]


@functools.lru_cache(maxsize=128)
def _positions(tiling: Tiling, repeat: bool) -> np.ndarray:
    rank = len(tiling.axes)
    position: np.ndarray = np.zeros((1,) * 3 * rank, np.int64)
    outside: np.ndarray = np.zeros((1,) * 3 * rank, bool)
    counts = tiling.tiles_per_axis
    for axis, (n, t, d) in enumerate(zip(tiling.axes, tiling.tile, tiling.dilation, strict=True)):
        group, tile, place = np.ogrid[:d, : counts[axis], :t]
        last = -(-(n - group) // d) - 1  # of the group
        inside = tile * t + place
        missing = (tile * t if repeat else inside) > last
        coordinate = np.minimum(inside, last) * d + group
        shape = [1] * 3 * rank
        shape[axis], shape[rank + axis], shape[2 * rank + axis] = d, counts[axis], t
        position = position * n + coordinate.reshape(shape)
        outside = outside | np.broadcast_to(missing, coordinate.shape).reshape(shape)
    position = np.where(outside, math.prod(tiling.axes), position).astype(np.int32).reshape(-1)
    position.setflags(write=False)  # it is shared by all who ask
    return position
