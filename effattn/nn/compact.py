"""Running a layer on the rows that something chose, at a shape that was known before.

How many tokens a router, a segmenter or a delete gate keeps is known only while the program runs,
and its shapes must be known before. So the kept rows are moved together into a buffer of a static
capacity, and what happens when they are more than fit is one of four modes, never a silent loss:

exact    the buffer is as long as the sequence. Never too small; saves no product with weights, but
         rows beyond the last kept one are padding, whose blocks attention skips.
bucket   a ladder of capacities up to the sequence's length; the smallest that fits is taken, in
         one of several compiled branches. Exact, and as cheap as its rung.
error    one capacity. Where more are kept, the result is wrong and says so: a training step with
         `capacity_error` above 0 changes no parameter, and the run ends.
demote   one capacity; beyond it nothing more is kept. Another model than without, but a causal one:
         whether a row is kept hangs on what was kept before it, and decoding can count along.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.batch import TokenInfo
from effattn.checks import check_in
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.mesh import sequence_ways

MODES = ("exact", "bucket", "error", "demote")


class Capacity(NamedTuple):
    """What `CapacityConfig` says, frozen: a static part of a module."""

    mode: str = "exact"
    rungs: tuple[float, ...] = (1.0,)
    share: float = 0.5
    pooled: bool = False

    def ladder(self, length: int) -> tuple[int, ...]:
        """The capacities to choose from, in rows, for buffers of a sequence of `length`."""
        shares = {"exact": (1.0,), "bucket": self.rungs}.get(self.mode, (self.share,))
        sizes = {min(length, max(1, -int(-length * share // 1))) for share in shares}
        return tuple(sorted(sizes))


@dataclass(kw_only=True)
class CapacityConfig:
    """mode: exact | bucket | error | demote, see this module.

    rungs: "bucket": the ladder, as shares of the sequence's length; the last is 1. share: "error",
    "demote": the capacity as a share of the sequence's length. pooled: one buffer for all rows of
    a batch, which then bounds their sum and not the longest of them; "demote" still counts in
    every row by itself, or one sequence would hang on another.
    """

    mode: str = "exact"
    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)
    share: float = 0.5
    pooled: bool = False

    def build(self, name: str = "capacity") -> Capacity:
        """Raises ValueError that names the field (as `name.field`), what it is and the rule."""
        check_in(f"{name}.mode", self.mode, MODES)
        rungs = tuple(self.rungs)
        rising = all(low < high for low, high in zip(rungs, rungs[1:], strict=False))
        if not rungs or rungs[0] <= 0 or rungs[-1] != 1 or not rising:
            raise ValueError(
                f"{name}.rungs: got {rungs}, expected rising shares above 0, of which the last is "
                "1: a ladder that ends lower could overflow"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"{name}.share: got {self.share}, expected 0 < share <= 1")
        return Capacity(self.mode, rungs, float(self.share), bool(self.pooled))


class CapacityReport(NamedTuple):
    """int32 scalars. kept: rows that were to be kept. capacity: rows of all buffers together.

    overflow: rows that were to be kept and found no room: wrong results in mode "error", demoted
    in mode "demote", 0 in the others.
    """

    kept: jax.Array
    capacity: jax.Array
    overflow: jax.Array

    def metrics(self, name: str, capacity: Capacity) -> dict[str, jax.Array]:
        """For `Output.metrics`; a training step refuses to commit on `capacity_error` > 0."""
        out = {
            f"{name}_count": self.kept.astype(jnp.float32),
            f"{name}_capacity": self.capacity.astype(jnp.float32),
            f"{name}_overflow": self.overflow.astype(jnp.float32),
        }
        if capacity.mode == "error":
            out["capacity_error"] = out[f"{name}_overflow"]
        return out


# ---- moving rows


def sources(keep: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Where the rows of a buffer come from.

    keep: bool [batch, seq_len]. Returns (source [batch, capacity]: the slots of the first
    `capacity` kept rows in order, seq_len where there are no more; count [batch]: kept rows,
    which may be more than the capacity), int32.
    """
    batch, length = keep.shape
    rank = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    place = jnp.where(keep, rank - 1, capacity)  # a place outside the buffer is dropped
    slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    source = jnp.full((batch, capacity), length, jnp.int32)
    row = jnp.arange(batch)[:, None]
    return source.at[row, place].set(slots, mode="drop"), rank[:, -1]


def compact(tree: Any, keep: jax.Array, capacity: int) -> tuple[Any, jax.Array, jax.Array]:
    """The kept rows of [batch, seq_len, ...] arrays moved together, in order; zeros behind them.

    Returns (arrays [batch, capacity, ...], source and count as of `sources`).
    """
    source, count = sources(keep, capacity)
    return gather(tree, source), source, count


def gather(tree: Any, source: jax.Array) -> Any:
    """Rows `source` [batch, capacity] of [batch, seq_len, ...] arrays, zeros for source = seq_len.

    No row may be named twice: the gradient moves every row back, it adds none up.
    """

    def move(x: jax.Array) -> jax.Array:
        return _move(x, source, _inverse(source, x.shape[1]))

    return jax.tree.map(move, tree)


def scatter(tree: Any, source: jax.Array, length: int) -> Any:
    """The inverse of `compact`: [batch, capacity, ...] -> [batch, length, ...], zeros elsewhere."""
    inverse = _inverse(source, length)
    return jax.tree.map(lambda x: _move(x, inverse, source), tree)


def hold(tree: Any, keep: jax.Array) -> Any:
    """Every slot the last kept row at or before it; zeros before the first.

    tree: arrays [batch, capacity, ...] of the kept rows in order. keep: bool [batch, seq_len], not
    more of them than the capacity. Returns arrays [batch, seq_len, ...].
    """
    place = jnp.cumsum(keep, axis=1, dtype=jnp.int32) - 1
    return jax.tree.map(lambda x: _take(x, jnp.where(place < 0, x.shape[1], place)), tree)


def _inverse(source: jax.Array, length: int) -> jax.Array:
    """[batch, length]: the place in the buffer of every slot, the buffer's size for none."""
    batch, capacity = source.shape
    places = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), source.shape)
    inverse = jnp.full((batch, length), capacity, jnp.int32)
    return inverse.at[jnp.arange(batch)[:, None], source].set(places, mode="drop")


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, i]] and zeros where index is x's length."""
    row = jnp.arange(x.shape[0])[:, None]
    return x.at[row, index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _move(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """`_take(x, index)`; its gradient takes too, where XLA's own would add rows one by one."""
    return _take(x, index)


def _move_forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[Any, Any]:
    return _take(x, index), inverse


def _move_backward(inverse: jax.Array, dy: jax.Array) -> tuple[Any, None, None]:
    # An integer's cotangent is of type float0, and is nothing to move.
    return (_take(dy, inverse) if dy.dtype != jax.dtypes.float0 else None), None, None


_move.defvjp(_move_forward, _move_backward)


# ---- running on them


def divisible(size: int, length: int) -> int:
    """Rows of a buffer that holds `size`, no more than `length`, and that a sequence axis divides,
    also one whose devices split their part in two."""
    unit = 2 * sequence_ways() if sequence_ways() > 1 else 1
    return min(-(-size // unit) * unit, length)


Inner = Callable[[Any, TokenInfo], tuple[Any, Any]]


def with_capacity(
    inner: Inner, x: Any, info: TokenInfo, keep: jax.Array, capacity: Capacity
) -> tuple[Any, Any, CapacityReport]:
    """Runs `inner` on the kept rows alone.

    inner: (arrays [batch, C, ...], their TokenInfo) -> (y: arrays [batch, C, ...], aux). Its rows
    are the kept ones in order, with valid=False and segment 0 behind the last. It must be right
    for any C, and aux of one shape for all. With `capacity.pooled` it sees one row, [1, C, ...], in
    which every document of every row has a segment of its own.
    x: pytree of [batch, seq_len, ...]. info: of x; `inner` is given the kept rows of it, so
    `positions` are whatever the caller wants to be read there. keep: bool [batch, seq_len]; what is
    not valid is never kept.

    Returns (y at full length: kept rows in their slots and zeros elsewhere, aux, the report).
    """
    batch, length = keep.shape
    keep = keep & info.valid
    per_row = jnp.sum(keep, axis=1, dtype=jnp.int32)
    if capacity.mode == "demote":
        keep = demoted(keep, capacity)
    shape = keep.shape
    if capacity.pooled:
        x, info, keep = _pooled(x, info, keep)
    ladder = capacity.ladder(length)
    if capacity.pooled:
        scale = batch if capacity.mode == "demote" else 0
        ladder = tuple(n * scale for n in ladder) if scale else capacity.ladder(batch * length)

    def run(size: int) -> Callable[[Any, TokenInfo, jax.Array], tuple[Any, Any]]:
        def branch(x: Any, info: TokenInfo, keep: jax.Array) -> tuple[Any, Any]:
            rows, source, _ = compact(x, keep, divisible(size, keep.shape[1]))
            given = TokenInfo(*gather(tuple(info._replace(segment_ids=info.segments)), source))
            y, aux = inner(rows, given)
            return scatter(y, source, keep.shape[1]), aux

        return branch

    needed = jnp.max(jnp.sum(keep, axis=1, dtype=jnp.int32))
    if len(ladder) == 1:
        y, aux = run(ladder[0])(x, info, keep)
        chosen = jnp.int32(ladder[0])
    else:
        # The maximum is over the whole batch: on a mesh all devices take the same branch.
        rung = jnp.sum(needed > jnp.array(ladder[:-1]), dtype=jnp.int32)
        # Every branch would hand out what the backward passes of all branches read, zeros where
        # they are others'. So each keeps its inputs alone and computes again: a training step of
        # H-Net at a chunk per 4 bytes, 85 % of its FLOPs on the inside, takes 0.52 of that of
        # "exact" instead of 0.76 (2 cores, jax 0.12; `scripts/hnet_step_time.py`).
        branches = [jax.checkpoint(run(size), prevent_cse=False) for size in ladder]
        y, aux = jax.lax.switch(rung, branches, x, info, keep)
        chosen = jnp.array(ladder, jnp.int32)[rung]
    if capacity.mode == "demote":
        missing = jnp.maximum(per_row - capacity.ladder(length)[0], 0)
    else:  # of a bucket's last rung this is 0
        missing = jnp.maximum(jnp.sum(keep, axis=1, dtype=jnp.int32) - chosen, 0)
    if capacity.pooled:
        y = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[2:]), y)
    report = CapacityReport(jnp.sum(per_row), chosen * len(keep), jnp.sum(missing))
    return y, aux, jax.tree.map(jax.lax.stop_gradient, report)


def demoted(
    keep: jax.Array,
    capacity: Capacity,
    *,
    before: jax.Array | None = None,
    length: int | None = None,
) -> jax.Array:
    """What mode "demote" leaves of `keep`: the first rows of every sequence, up to the capacity.

    before: int [batch], rows kept in earlier calls of the same sequence. length: of the whole
    sequence where `keep` is a part of it.
    """
    limit = capacity.ladder(keep.shape[1] if length is None else length)[0]
    rank = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
    if before is not None:
        rank = rank + before[:, None]
    return keep & (rank <= limit)


def _pooled(x: Any, info: TokenInfo, keep: jax.Array) -> tuple[Any, TokenInfo, jax.Array]:
    """All rows as one; the documents of all rows are segments of their own."""

    def flat(a: jax.Array) -> jax.Array:
        return a.reshape(1, -1, *a.shape[2:])

    runs, valid = runs_of_segments(info.segments)
    batch, length = runs.shape
    first = (length + 1) * jnp.arange(batch, dtype=jnp.int32)[:, None]
    info = info._replace(segment_ids=jnp.where(valid, first + runs + 1, 0), valid=valid)
    return jax.tree.map(flat, x), TokenInfo(*map(flat, info)), flat(keep)
