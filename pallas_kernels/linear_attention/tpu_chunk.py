"""What the two passes of the TPU kernels do alike inside a chunk."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn.pallas_kernels.linear_attention.tpu_features import kernel_features
from effattn.pallas_kernels.linear_attention.tpu_plan import SUBLANES, Plan
from effattn.pallas_kernels.tuning import LANES

_NEVER = -1e30  # an exponent whose exponential is 0


def product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """The matrix product over one axis of each, in float32; float32 factors are not rounded."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(left, right, axes, precision, jnp.float32)


def rows_of(x: jax.Array, head: int, dim: int) -> jax.Array:
    return x[head * dim : (head + 1) * dim]


def lanes_of(x: jax.Array, head: int, dim: int) -> jax.Array:
    return x[:, head * dim : (head + 1) * dim]


def shares_lanes(dim: int, width: int) -> bool:
    """Whether several whole heads of `dim` channels stand in one register's lanes, of `width`."""
    return dim < LANES and LANES % dim == 0 and width % LANES == 0


def alone_in_lanes(x: jax.Array, head: int, dim: int) -> jax.Array:
    """The channels of a head as a factor of a product over channels, [tokens, dim] or, where heads
    share lanes, all [tokens, 128] of them with the others' channels at 0: a shift of lanes is
    dearer than the zeros, which the matrix unit would have had anyway."""
    if not shares_lanes(dim, x.shape[1]):
        return lanes_of(x, head, dim)
    window = window_of(x, head, dim)
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return jnp.where(lane // dim == head % (LANES // dim), window, jnp.zeros_like(window))


def window_of(x: jax.Array, head: int, dim: int) -> jax.Array:
    """What meets `alone_in_lanes` in a product: the lanes of the head, with all that share them."""
    if not shares_lanes(dim, x.shape[1]):
        return lanes_of(x, head, dim)
    start = head * dim // LANES * LANES
    return x[:, start : start + LANES]


def window_rows_of(x: jax.Array, head: int, dim: int) -> jax.Array:
    """`window_of` of an array whose channels are rows."""
    if not shares_lanes(dim, x.shape[0]):
        return rows_of(x, head, dim)
    start = head * dim // LANES * LANES
    return x[start : start + LANES]


class Piece(NamedTuple):
    """Scores of one head that are made at once: tokens `lanes` of one side, against which stand
    tokens `down` of the other in sublanes. last: of its head."""

    head: int
    start: int
    stop: int
    down_start: int
    down_stop: int
    last: bool

    @property
    def lanes(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def down(self) -> slice:
        return slice(self.down_start, self.down_stop)


def pieces_of(plan: Plan, *, queries_in_lanes: bool) -> list[Piece]:
    """All of a chunk, head by head; keys later than all queries of a piece are left out."""
    pieces = []
    for head in range(plan.heads):
        for start in range(0, plan.chunk, plan.strip):
            stop = start + plan.strip
            down = (0, stop) if queries_in_lanes else (start, plan.chunk)
            pieces.append(Piece(head, start, stop, *down, stop == plan.chunk))
    return pieces


class Pairs(NamedTuple):
    """How a chunk's tokens see each other and the state, from `Steps`.

    by_row, by_column: running log decay as [rows, chunk] and [chunk, rows], None without decay.
    runs: (of queries [1, chunk], of keys [1, chunk]), and the same as columns, None where all
    tokens belong together. entered, left: runs that the state before and after belongs to.
    """

    by_row: jax.Array | None
    by_column: jax.Array | None
    run_rows: tuple[jax.Array, jax.Array] | None
    run_columns: tuple[jax.Array, jax.Array] | None
    entered: Any
    left: Any

    def by_blocks(
        self,
        piece: Piece,
        compute: Callable[[slice, slice, Callable[[jax.Array], jax.Array]], tuple[jax.Array, ...]],
        queries_in_lanes: bool,
    ) -> tuple[jax.Array, ...]:
        """Arrays [down, lanes] of a piece from their blocks of 128 by 128.

        compute(rows, columns, weigh) makes those blocks; weigh(x) is x times exp(G_query - G_key),
        0 where the key is later or of another run. Blocks without any pair are 0 and not computed,
        and those without a forbidden one are not masked.
        """
        columns: list[tuple[jax.Array, ...]] = []
        for at in range(0, piece.stop - piece.start, LANES):
            parts: list[tuple[jax.Array, ...] | None] = []
            for under in range(0, piece.down_stop - piece.down_start, LANES):
                # First key minus first query.
                apart = piece.down_start + under - piece.start - at
                if not queries_in_lanes:
                    apart = -apart
                if apart > 0:
                    parts.append(None)
                    continue
                rows, lanes = slice(under, under + LANES), slice(at, at + LANES)
                weigh = self._weigh(piece, rows, lanes, apart == 0, queries_in_lanes)
                parts.append(compute(rows, lanes, weigh))
            some = next(part for part in parts if part is not None)
            zeros = tuple(jnp.zeros_like(x) for x in some)
            filled = [zeros if part is None else part for part in parts]
            columns.append(tuple(jnp.concatenate(x, 0) for x in zip(*filled, strict=True)))
        return tuple(jnp.concatenate(x, 1) for x in zip(*columns, strict=True))

    def _weigh(
        self, piece: Piece, rows: slice, lanes: slice, diagonal: bool, queries_in_lanes: bool
    ) -> Callable[[jax.Array], jax.Array]:
        """rows, lanes: within the piece."""
        down = slice(piece.down_start + rows.start, piece.down_start + rows.stop)
        along = slice(piece.start + lanes.start, piece.start + lanes.stop)
        allowed = None
        if diagonal:
            row = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)
            column = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
            allowed = row <= column if queries_in_lanes else column <= row
        if self.run_rows is not None and self.run_columns is not None:
            # Rows of numbers run along lanes, columns along sublanes.
            side = 0 if queries_in_lanes else 1
            same = self.run_columns[1 - side][down] == self.run_rows[side][:, along]
            allowed = same if allowed is None else allowed & same
        if self.by_row is None or self.by_column is None:
            return lambda x: x if allowed is None else jnp.where(allowed, x, 0)
        head = piece.head
        exponent = self.by_row[head : head + 1, along] - self.by_column[down, head : head + 1]
        exponent = exponent if queries_in_lanes else -exponent
        if allowed is not None:
            # The exponent, not its exponential: above the diagonal that would overflow.
            exponent = jnp.where(allowed, exponent, _NEVER)
        factor = jnp.exp(exponent)
        return lambda x: x * factor

    def from_state(self, head: int, piece: Piece | None = None) -> jax.Array | None:
        """[1, queries]: by what the state reaches each query; None for 1."""
        at = slice(None) if piece is None else piece.lanes
        factor = None if self.by_row is None else jnp.exp(self.by_row[head : head + 1, at])
        if self.run_rows is None:
            return factor
        return _times(factor, (self.run_rows[0][:, at] == self.entered).astype(jnp.float32))

    def to_state(self, head: int, piece: Piece | None = None) -> jax.Array | None:
        """[1, keys]: by what each key enters the state; None for 1."""
        at = slice(None) if piece is None else piece.lanes
        factor = None
        if self.by_row is not None:
            row = self.by_row[head : head + 1]
            factor = jnp.exp(row[:, -1:] - row[:, at])
        if self.run_rows is None:
            return factor
        return _times(factor, (self.run_rows[1][:, at] == self.left).astype(jnp.float32))

    def kept(self, head: int) -> jax.Array | None:
        """[1, 1]: what stays of the state; None for all."""
        factor = None if self.by_row is None else jnp.exp(self.by_row[head : head + 1, -1:])
        if self.run_rows is None:
            return factor
        same = jnp.where(self.entered == self.left, 1.0, 0.0)
        return jnp.full((1, 1), same) if factor is None else factor * same


def _times(factor: jax.Array | None, other: jax.Array) -> jax.Array:
    return other if factor is None else factor * other


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
    return x if factor is None else x * factor


def read_pairs(plan: Plan, refs: list[Any], chunk: Any) -> Pairs:
    """refs: of `Blocks.steps`. chunk: its number."""
    refs = list(refs)
    by_row = by_column = run_rows = run_columns = entered = left = None
    if plan.call.decay != "none":
        by_row = refs.pop(0)[...]
        by_column = by_row.T
    if plan.has_runs:
        runs, bounds = refs.pop(0)[...], refs.pop(0)
        columns = runs.T
        run_rows = runs[0:1], runs[1:2]
        run_columns = columns[:, 0:1], columns[:, 1:2]
        entered, left = (bounds[0, chunk + i].astype(jnp.float32) for i in range(2))
    return Pairs(by_row, by_column, run_rows, run_columns, entered, left)


def with_ones(plan: Plan, rows: jax.Array) -> jax.Array:
    """[value_dim, chunk] -> [columns, chunk]: below the values a row of ones, if one is kept."""
    if not plan.call.normalize:
        return rows
    return with_row(rows, jnp.ones((1, rows.shape[1]), rows.dtype))


def with_row(rows: jax.Array, row: jax.Array) -> jax.Array:
    """[value_dim, chunk] and [1, chunk] -> [value_dim + 16, chunk], zeros below."""
    first = lax.broadcasted_iota(jnp.int32, (SUBLANES, row.shape[1]), 0) == 0
    below = jnp.where(first, row.astype(jnp.float32), 0).astype(rows.dtype)
    return jnp.concatenate([rows, below], axis=0)


def taylor_weights(plan: Plan, scores: jax.Array) -> jax.Array:
    """1 + s + s^2 / 2 of raw scores."""
    s = scores * plan.call.scale
    return 1 + s * (1 + 0.5 * s)


def taylor_slope(plan: Plan, scores: jax.Array) -> jax.Array:
    """The derivative of `taylor_weights` by the raw scores."""
    return plan.call.scale + scores * plan.call.scale**2


def taylor_input(plan: Plan, x: jax.Array) -> jax.Array:
    """[key_dim, chunk] of one head, as `kernel_features` takes it."""
    return x.astype(jnp.float32) * plan.call.scale**0.5


def features_of(plan: Plan, x: jax.Array) -> jax.Array:
    """phi of [key_dim, chunk], in the dtype of x: [features, chunk]."""
    if plan.call.feature_map == "identity":
        return x
    return kernel_features(taylor_input(plan, x)).astype(x.dtype)


def write_strips(plan: Plan, ref: Any, found: dict[tuple[int, int], jax.Array]) -> None:
    """ref: [chunk, heads * dim]; found: (head, first token of a strip) -> [dim, strip]."""
    for start in range(0, plan.chunk, plan.strip):
        rows = [x for (_, at), x in sorted(found.items(), key=lambda item: item[0]) if at == start]
        ref[start : start + plan.strip] = jnp.concatenate(rows, axis=0).T.astype(ref.dtype)
