"""A state that passes along a row from device to device, without waiting for one another.

Every device says what its part of the row makes of nothing, and what it does to what comes in.
These N summaries are gathered, and each device folds those of the parts before its own: what is
moved does not grow with the tokens. Documents begin and end anywhere, parts may be padding alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.pallas_kernels.prefix_scan.state import where_rows


class Documents(NamedTuple):
    """Of a device's part of every row, [batch] each. first, last: the segments of its first and
    last token that is no padding, 0 where there is none. whole: no other document than `first`."""

    first: jax.Array
    last: jax.Array
    whole: jax.Array


def documents_of(segment_ids: jax.Array | None, like: jax.Array) -> Documents:
    """segment_ids: [batch, tokens] of the part, None for one document; like: [batch, ...]."""
    if segment_ids is None:
        one = jnp.ones(like.shape[:1], jnp.int32)
        return Documents(one, one, one > 0)
    runs, valid = runs_of_segments(segment_ids)
    some = jnp.any(valid, axis=1)
    row = jnp.arange(len(valid))
    at = jnp.argmax(valid, axis=1), valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    first, last = (jnp.where(some, segment_ids[row, place], 0) for place in at)
    return Documents(first, last, runs[:, -1] == 0)


def gathered(tree: Any, axis: str) -> Any:
    """Every device's arrays, [devices, ...]."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis), tree)


def row_ends(documents: Documents) -> tuple[jax.Array, jax.Array]:
    """The first and the last document of whole rows, from the parts' documents [ways, batch]."""
    ways = len(documents.first)
    first = last = jnp.zeros_like(documents.first[0])
    for j in range(ways):
        last = jnp.where(documents.last[j] == 0, last, documents.last[j])
        k = ways - 1 - j
        first = jnp.where(documents.first[k] == 0, first, documents.first[k])
    return first, last


def fold(
    parts: Any,
    documents: Documents,
    me: jax.Array,
    *,
    before: Any,
    empty: Any,
    after: Callable[[Any, Any, jax.Array], Any],
) -> tuple[Any, Any]:
    """(the state before this device's tokens, the state after all), trees of [batch, ...].

    parts, documents: of all devices, [ways, ...]. before: what the caller holds, which belongs to
    the row's first document; None for nothing, which is `empty`. after(part, state, whole): the
    state after a part, from the one before; where it is not `whole`, what came in ends within it.
    """
    held, _ = row_ends(documents)
    state = empty if before is None else before
    mine = empty
    for j in range(len(documents.first)):
        part = jax.tree.map(lambda x, j=j: x[j], (parts, documents))
        summary, (first, last, whole) = part
        entering = choose(first == held, state, empty)
        mine = jax.tree.map(lambda m, e, j=j: jnp.where(me == j, e, m), mine, entering)
        some = first != 0
        state = choose(some, after(summary, entering, whole), state)
        held = jnp.where(some, last, held)
    return mine, state


def choose(rows: jax.Array, one: Any, other: Any) -> Any:
    """`one` where rows [batch] is True, `other` elsewhere; trees of [batch, ...]."""
    return jax.tree.map(lambda a, b: where_rows(rows, a, b), one, other)


def total_of(
    number: jax.Array, at_first: Any, at_last: Any, first: jax.Array, last: jax.Array, kind: str
) -> Any:
    """What all parts hold of the document or run `number` [batch], added ("sum") or the "max".

    first, last: of all parts, [ways, batch], the numbers at their ends, and at_first, at_last:
    trees of [ways, batch, ...], what each holds of these. Inside of a part nothing goes on.
    """
    in_first, in_last = first == number, (last == number) & (last != first)

    def total(one: jax.Array, other: jax.Array) -> jax.Array:
        integer = jnp.issubdtype(one.dtype, jnp.integer)
        lowest = jnp.iinfo(one.dtype).min if integer else -jnp.inf
        nothing = jnp.full_like(one, 0 if kind == "sum" else lowest)
        one, other = where_rows(in_first, one, nothing), where_rows(in_last, other, nothing)
        if kind == "sum":
            return jnp.sum(one + other, axis=0)
        return jnp.max(jnp.maximum(one, other), axis=0)

    return jax.tree.map(total, at_first, at_last)
