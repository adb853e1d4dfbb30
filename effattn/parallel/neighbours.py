"""What layers read of the tokens beside a token, where tokens lie over devices.

`halo_over`: the rows right before and behind each device's part, by permutes that do not wrap.
`previous_over`: for each token the last one that is no padding before it, however far.
`reduce_runs_over`: sums or maxima over runs of tokens; those at a part's two ends alone go on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.pallas_kernels.linear_attention.packing import previous_valid, reduce_runs
from effattn.pallas_kernels.prefix_scan.state import where_rows
from effattn.parallel.mesh import BATCH_AXES, STREAMS_AXIS, dividing_axes, free_axes
from effattn.parallel.passing import choose, gathered, total_of
from effattn.parallel.sequence import shard_map


def halo_over(
    axis: str, ways: int, x: jax.Array, width: int, behind: int, first: jax.Array | None
) -> jax.Array:
    """`SequenceParallel.halo` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves width + behind tokens. Raises ValueError where the sequence does not divide.
    """
    check_multiple("seq_len", x.shape[1], f"mesh axis {axis!r}", ways)

    def run(x: jax.Array, first: jax.Array | None) -> jax.Array:
        size = x.shape[1]
        before = _from_others(axis, ways, x, width, 1)
        after = _from_others(axis, ways, x, behind, -1)
        if first is not None:
            # The parts within `width` tokens of the row's beginning see of what stands before it.
            passed = jax.lax.axis_index(axis) * size
            shifted = jnp.concatenate([first.astype(x.dtype), jnp.zeros_like(first, x.dtype)], 1)
            shifted = jax.lax.dynamic_slice_in_dim(shifted, jnp.minimum(passed, width), width, 1)
            inside = jnp.arange(width) + passed < width
            inside = jnp.broadcast_to(inside, shifted.shape[:2])
            before = where_rows(inside, shifted, before)
        return jnp.concatenate([before, x, after], axis=1)[:, None]

    specs = P(None, axis), None if first is None else P()
    return shard_map(run, {axis: ways}, (x, first), specs, P(None, axis))


def _from_others(axis: str, ways: int, x: jax.Array, rows: int, step: int) -> jax.Array:
    """The `rows` tokens before this device's (step 1) or behind them (-1); zeros outside the row.

    One permute where a part holds that many tokens, which is nearly always.
    """
    size, parts, hop = x.shape[1], [x[:, :0]], 0
    while rows > 0:
        hop += 1
        taken = min(rows, size)
        edge = x[:, size - taken :] if step == 1 else x[:, :taken]
        pairs = [(i, i + step * hop) for i in range(ways) if 0 <= i + step * hop < ways]
        edge = jax.lax.ppermute(edge, axis, pairs) if pairs else jnp.zeros_like(edge)
        parts = [edge, *parts] if step == 1 else [*parts, edge]
        rows -= taken
    return jnp.concatenate(parts, axis=1)


def previous_over(axis: str, ways: int, tree: Any, valid: jax.Array, first: Any) -> tuple[Any, Any]:
    """`SequenceParallel.previous` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves ways - 1 tokens. Raises ValueError where the sequence does not divide.
    """
    check_multiple("seq_len", valid.shape[1], f"mesh axis {axis!r}", ways)

    def run(tree: Any, valid: jax.Array, first: Any) -> Any:
        _, newest = previous_valid(tree, valid, first)
        newest, some = gathered((newest, jnp.any(valid, axis=1)), axis)
        me = jax.lax.axis_index(axis)
        entering = latest = first
        for j in range(ways):
            entering = jax.tree.map(lambda x, e, j=j: jnp.where(me == j, x, e), latest, entering)
            latest = choose(some[j], jax.tree.map(lambda x, j=j: x[j], newest), latest)
        return previous_valid(tree, valid, entering)[0], latest

    # Rows are split here too: XLA's partitioner ends the process over the look-up where rows and
    # channels are left to it (jax 0.12.0.1, H-Net on a mesh of 2 x 2 x 2).
    free = free_axes()
    rows = dividing_axes((STREAMS_AXIS, *BATCH_AXES), free, len(valid))
    axes = {axis: ways, **{name: free[name] for name in rows}}
    tokens, row = P(rows, axis), P(rows)
    return shard_map(run, axes, (tree, valid, first), (tokens, tokens, row), (tokens, row))


def reduce_runs_over(axis: str, ways: int, x: jax.Array, runs: jax.Array, kind: str) -> jax.Array:
    """`reduce_runs` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves 2 (ways - 1) tokens. Raises ValueError where the sequence does not divide.
    """
    check_multiple("seq_len", x.shape[1], f"mesh axis {axis!r}", ways)

    def run(x: jax.Array, runs: jax.Array) -> jax.Array:
        local = reduce_runs(x, runs - runs[:, :1], kind)
        numbers = runs[:, 0], runs[:, -1]
        held = local[:, 0], local[:, -1]
        (at_first, at_last), (first, last) = gathered((held, numbers), axis)
        for number in numbers:
            total = total_of(number, at_first, at_last, first, last, kind)
            total = jnp.broadcast_to(total[:, None], local.shape)
            local = where_rows(runs == number[:, None], total, local)
        return local

    tokens = P(None, axis)
    return shard_map(run, {axis: ways}, (x, runs), (tokens, tokens), tokens)
