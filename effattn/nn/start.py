"""What a document starts from where that is learned: extra keys and values, or a state.

A mixer with a method `start_shapes(length)` takes a `start` by name in its three calls: for every
name of the shapes an array [streams, *shape]. Every document of a row begins from the start of the
row's stream, wherever in the row it begins: row r of a batch is of stream r // (batch / streams).
Attention sees `length` learned keys and values before its own, neither rotated nor counted as
positions; recurrent layers begin with learned sums, or with what such keys and values leave.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.masks import Full
from effattn.pallas_kernels.attention import merge
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.sequence import SequenceParallel

Start = dict[str, jax.Array]


class Learned(NamedTuple):
    """One array of a start: its shape and logical axis names, without the axis of streams.

    reads: how many heads read each of its numbers, which the FLOPs are counted by.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    reads: int = 1


def prefix_shapes(
    length: int, num_heads: int, key_dim: int, value_dim: int, *, reads: int = 1
) -> dict[str, Learned]:
    """`length` keys and values per head."""
    axes = (None, "kv_heads", None)
    return {
        "key": Learned((length, num_heads, key_dim), axes, reads),
        "value": Learned((length, num_heads, value_dim), axes, reads),
    }


def rows_of(start: Any, batch: int) -> Any:
    """Leaves [streams, ...] as rows of a batch, [batch, ...], stream-major."""

    def repeat(leaf: jax.Array) -> jax.Array:
        streams, *rest = leaf.shape
        rows = jnp.broadcast_to(leaf[:, None], (streams, batch // streams, *rest))
        return rows.reshape(batch, *rest)

    return jax.tree.map(repeat, start)


def first_tokens(segments: jax.Array, held: jax.Array) -> jax.Array:
    """bool [batch, seq_len]: where a document begins that no earlier call has begun.

    segments: [batch, seq_len], 0 for padding. held: [batch], the segment that the row's state is
    of, 0 for none.
    """
    # As a token before the first one: -1 is no document and no padding.
    before = jnp.where(held == 0, -1, held)[:, None]
    runs, _ = runs_of_segments(jnp.concatenate([before, segments], axis=1))
    return runs[:, 1:] > runs[:, :-1]


def decode_attention(
    sequence: SequenceParallel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: Start | None,
    **options: Any,
) -> jax.Array:
    """`sequence.decode_attention`, where the query also sees the keys and values of `start`.

    The two are joined by their log-sum-exps, so no cache holds a copy of the learned keys.
    """
    if start is None:
        return sequence.decode_attention(query, key, value, **options)
    out, lse = sequence.decode_attention(query, key, value, **options, return_lse=True)
    learned = rows_of(start, len(query))
    length = jnp.full(len(query), learned["key"].shape[1], jnp.int32)
    prefix = sequence.decode_attention(
        query,
        learned["key"].astype(query.dtype),
        learned["value"].astype(query.dtype),
        lengths=length,
        mask=Full(),
        logit_soft_cap=options.get("logit_soft_cap"),
        return_lse=True,
    )
    return merge(out, lse, *prefix)[0]
