"""How many tiles of scores neighborhood attention has to visit, before any kernel runs.

The count of Generalized Neighborhood Attention (Hassani et al. 2025), made from the windows'
definition. A neighborhood is a product over axes, and so is a tile: what a pair of tiles holds is
known axis by axis, and counting costs the axes' lengths, not their product.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from effattn.checks import check_at_least, check_same_length
from effattn.masks import Neighborhood, neighborhood_window

Axes = tuple[int, ...]


class Simulation(NamedTuple):
    """visited: pairs of a query tile and a key tile with a pair of tokens that the mask allows.

    dense: pairs of tiles that attention without a mask visits, tokens in plain order. partial:
    visited pairs that need the mask (some of their pairs is forbidden, or a slot is padding).
    ideal_share: allowed pairs of tokens / all pairs. speedup_bound: dense / visited, what a kernel
    can win at most with these tiles. block_sparse: no visited pair needs the mask.
    """

    visited: int
    dense: int
    partial: int
    ideal_share: float
    speedup_bound: float
    block_sparse: bool


class _AxisCounts(NamedTuple):
    visited: int
    full: int
    allowed: int


def simulate(
    axes: Axes,
    window: Axes,
    stride: Axes | None = None,
    dilation: Axes | None = None,
    causal: tuple[bool, ...] | None = None,
    q_tile: Axes | None = None,
    kv_tile: Axes | None = None,
) -> Simulation:
    """The tiles that a neighborhood visits, one entry per axis in every argument.

    axes, window, stride, dilation, causal: as in `effattn.masks.Neighborhood`. q_tile, kv_tile:
    tokens of a tile, counted inside a dilation group; None for q_tile: one token, for kv_tile: that
    of q_tile. Raises ValueError for what Neighborhood refuses and for tiles that do not fit it.
    """
    mask = Neighborhood(axes, window, stride, dilation, causal)
    q_tile = (1,) * len(axes) if q_tile is None else q_tile
    kv_tile = q_tile if kv_tile is None else kv_tile
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        check_same_length(name, tile, len(axes), "axis")
        for size in tile:
            check_at_least(name, size, 1)
    per_axis = mask.per_axis()
    counts = [
        _axis_counts(*axis, q, kv) for axis, q, kv in zip(per_axis, q_tile, kv_tile, strict=True)
    ]
    visited, full, allowed = (math.prod(x) for x in zip(*counts, strict=True))
    tokens = math.prod(axes)
    dense = -(-tokens // math.prod(q_tile)) * -(-tokens // math.prod(kv_tile))
    return Simulation(
        visited=visited,
        dense=dense,
        partial=visited - full,
        ideal_share=allowed / tokens**2,
        speedup_bound=dense / visited,
        block_sparse=visited == full,
    )


@functools.lru_cache(maxsize=4096)
def _axis_counts(
    n: int, window: int, stride: int, dilation: int, causal: bool, q_tile: int, kv_tile: int
) -> _AxisCounts:
    """Visited and full pairs of tiles and allowed pairs of tokens on one axis, over its groups."""
    lengths = [-(-(n - group) // dilation) for group in range(dilation)]
    total = _AxisCounts(0, 0, 0)
    for length in set(lengths):
        i = np.arange(length)
        first, last = neighborhood_window(np, i, length, window, stride, causal)
        # Both ends grow with i, and windows of neighbours meet: a tile's first and last query
        # bound the keys that any of its queries sees (outer) and those that all see (inner).
        start = i[::q_tile]
        end = np.minimum(start + q_tile, length) - 1
        visited = last[end] // kv_tile - first[start] // kv_tile + 1
        full = (last[start] + 1) // kv_tile - -(-first[end] // kv_tile)
        part = visited.sum(), np.maximum(full, 0).sum(), (last - first + 1).sum()
        times = lengths.count(length)
        total = _AxisCounts(*(a + times * int(b) for a, b in zip(total, part, strict=True)))
    return total


class TileCosts(NamedTuple):
    """What the choice of a tile goes by.

    least, most: tokens of a tile. multiple: what divides them. pair: what a visited pair of tiles
    costs beside its scores, counted in scores. scores: of all heads of a pair, at most.
    """

    least: int
    most: int
    multiple: int
    pair: int
    scores: int | None


# By platform. On a CPU and a GPU attention is the XLA backend, whose own sizes have these limits
# and the measurements behind them. On a TPU a step of a flash kernel costs some 0.5 k cycles beside
# 1.4 k for 512 x 512 scores (static cycles of blocks of 128 to 1024 on v5e).
COSTS = {
    "cpu": TileCosts(64, 512, 8, 3000, 2**20),
    "gpu": TileCosts(256, 1024, 128, 2**17, 2**26),
    "tpu": TileCosts(256, 1024, 128, 2**17, None),
}


def tile_for(mask: Neighborhood, platform: str, rows: int) -> Axes:
    """The default tile of neighborhood attention. rows: batch x heads of the call."""
    costs = COSTS.get(platform, COSTS["gpu"])
    if costs.scores is not None:
        side = math.isqrt(costs.scores // rows)
        # Rounded down to a power of two, so that near sizes share one search.
        most = min(costs.most, 2 ** max(0, side.bit_length() - 1))
        costs = costs._replace(most=max(costs.least, most))
    return choose_tile(mask, costs)


@functools.lru_cache(maxsize=1024)
def choose_tile(mask: Neighborhood, costs: TileCosts) -> Axes:
    """The tile, for queries and keys alike, that makes the mask's visited pairs cheapest.

    Sides tried are powers of two, the stride, the window and the whole of a dilation group; a small
    grid is one tile. Of equally cheap tiles the one with the longest rows is taken.
    """
    per_axis = mask.per_axis()
    groups = tuple(-(-n // d) for n, _, _, d, _ in per_axis)
    tokens = math.prod(groups)
    if tokens <= costs.least and groups == mask.axes:
        return groups
    least = min(costs.least, -(-tokens // costs.multiple) * costs.multiple)
    sides = []
    for length, (_, window, stride, _, _) in zip(groups, per_axis, strict=True):
        powers = (2**i for i in range(length.bit_length() + 1))
        sides.append(sorted({x for x in (*powers, stride, window, length) if x < 2 * length}))

    def cost(tile: Axes) -> tuple[int, Axes]:
        counts = (
            _axis_counts(*axis, side, side) for axis, side in zip(per_axis, tile, strict=True)
        )
        visited = math.prod(count.visited for count in counts)
        price = visited * (math.prod(tile) ** 2 + costs.pair)
        return price, tuple(-side for side in reversed(tile))

    tiles = [
        tile
        for tile in itertools.product(*sides)
        if least <= math.prod(tile) <= costs.most and math.prod(tile) % costs.multiple == 0
    ]
    # The whole of a group, its rows filled up, where groups are too small for any of these.
    step = costs.multiple // math.gcd(math.prod(groups[:-1]), costs.multiple)
    filled = (*groups[:-1], -(-groups[-1] // step) * step)
    return min(tiles, key=cost, default=filled)
