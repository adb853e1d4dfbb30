"""Linear attention over devices: states travel, tokens do not.

Every device sums its part of the row into one state, all states are gathered, and each device folds
those of the parts before its own into the state that its tokens start from. What is moved does not
grow with the tokens. Source: Sun et al. 2025, LASP-2 (arXiv 2502.07563); decay, documents and the
prefix that a document sees from everywhere in it are ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.pallas_kernels.prefix_scan.state import where_rows
from effattn.parallel.mesh import dividing_axes, free_axes
from effattn.parallel.passing import (
    Documents,
    choose,
    documents_of,
    fold,
    gathered,
    row_ends,
    total_of,
)
from effattn.parallel.sequence import shard_map

PREFIX = ("prefix_key", "prefix_value", "prefix_segment_ids")


class Summary(NamedTuple):
    """state: after a part, from nothing. fading: [batch, heads] or [batch, heads, channels], the
    sum of its log decays, None without."""

    state: LinearState
    fading: jax.Array | None


def linear_attention_over(
    axis: str,
    ways: int,
    batch_axes: tuple[str, ...],
    head_axes: tuple[str, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, LinearState]:
    """`linear_attention` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves (ways - 1) states, and twice as many more for a prefix. A prefix as long as the row lies
    over the axis as well, each of its tokens at the place of one of its document's (rows that break
    this are nan); one of another length is whole on each device. Raises ValueError where the
    sequence does not divide, or a prefix meets a decay.
    """
    check_multiple("seq_len", query.shape[1], f"mesh axis {axis!r}", ways)
    log_decay = options.get("log_decay")
    prefix_key = options.get("prefix_key")
    if prefix_key is not None and log_decay is not None:
        raise ValueError(
            "log_decay: got an array, expected None beside prefix_key where tokens lie over devices"
        )
    free = free_axes()
    batch, num_key_heads, num_heads = query.shape[0], key.shape[2], value.shape[2]
    rows = dividing_axes(batch_axes, free, batch)
    heads = dividing_axes(head_axes, free, num_heads if num_key_heads == 1 else num_key_heads)
    key_heads = () if num_key_heads == 1 else heads
    of_keys, of_values, of_state = P(rows, axis, key_heads), P(rows, axis, heads), P(rows, heads)
    split = prefix_key is not None and prefix_key.shape[1] == query.shape[1]
    along = axis if split else None
    places = {
        "log_decay": P(heads) if log_decay is not None and log_decay.ndim == 1 else of_values,
        "segment_ids": P(rows, axis),
        "state": of_state,
        "prefix_key": P(rows, along, key_heads),
        "prefix_value": P(rows, along, heads),
        "prefix_segment_ids": P(rows, along),
    }
    traced = {n: x for n, x in options.items() if n in places and x is not None}
    static = {n: x for n, x in options.items() if n not in places}

    def run(query: jax.Array, key: jax.Array, value: jax.Array, traced: Any) -> Any:
        given = dict(traced)
        before = given.pop("state", None)
        prefix = {name: given.pop(name) for name in PREFIX if name in given}
        # Its outputs are not read, and are not computed.
        _, state = linear_attention(query, key, value, **static, **given)
        own = Summary(state, _fading(given, query.shape[:2], value.shape[2]))
        mine = documents_of(given.get("segment_ids"), query)
        parts, documents = gathered((own, mine), axis)
        me = jax.lax.axis_index(axis)
        zeros = jax.tree.map(jnp.zeros_like, state)
        entering, last = fold(parts, documents, me, before=before, empty=zeros, after=_after_part)
        if not prefix:
            out, _ = linear_attention(query, key, value, **static, **given, state=entering)
            return out, last
        operands = (query, key, value), {**static, **given}
        sums = _prefix_sums(axis if split else None, operands, prefix, mine, documents)
        out = _with_prefix(operands, prefix, sums, mine, entering, split)
        return out, jax.tree.map(jnp.add, last, sums(row_ends(documents)[1]))

    specs = of_keys, of_keys, of_values, {name: places[name] for name in traced}
    out_specs = of_values, of_state
    return shard_map(run, free, (query, key, value, traced), specs, out_specs)


def _fading(given: dict[str, Any], shape: tuple[int, ...], num_heads: int) -> jax.Array | None:
    log_decay = given.get("log_decay")
    if log_decay is None:
        return None
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    segments = given.get("segment_ids")
    valid = jnp.ones(shape, bool) if segments is None else segments != 0
    if log_decay.ndim == 1:
        fading = jnp.sum(valid, axis=1)[:, None] * log_decay
    else:
        fading = jnp.sum(where_rows(valid, log_decay, jnp.zeros_like(log_decay)), axis=1)
    return jnp.broadcast_to(fading, (shape[0], num_heads, *fading.shape[2:]))


def _after_part(part: Summary, entering: LinearState, whole: jax.Array) -> LinearState:
    if part.fading is not None:
        factor = jnp.exp(part.fading)
        factor = factor if factor.ndim == 3 else factor[..., None]  # [batch, heads, features | 1]
        normalizer = None if entering.normalizer is None else entering.normalizer * factor
        entering = LinearState(entering.kv * factor[..., None], normalizer)
    entering = choose(whole, entering, jax.tree.map(jnp.zeros_like, entering))
    return jax.tree.map(jnp.add, entering, part.state)


# ---- a prefix: keys and values that all tokens of their document see


def _prefix_sums(
    axis: str | None, operands: Any, prefix: Any, mine: Documents, documents: Documents
) -> Callable[[jax.Array], LinearState]:
    """The function from [batch], the first or the last document of a part, to what its prefix
    leaves in its state, wherever that lies; zeros for 0.

    axis: over which the prefix lies, None where each device has it whole.
    """

    def here(number: jax.Array) -> LinearState:
        (query, _, _), options = operands
        key, value, ids = (prefix[name] for name in PREFIX)
        inside = (ids == number[:, None]) & (ids != 0)
        query = jnp.broadcast_to(query[:, :1], (*key.shape[:2], *query.shape[2:]))
        options = {**options, "segment_ids": inside.astype(jnp.int32)}
        return linear_attention(query, key, value, **options)[1]

    if axis is None:
        return here
    at_first, at_last = gathered((here(mine.first), here(mine.last)), axis)
    return lambda number: total_of(
        number, at_first, at_last, documents.first, documents.last, "sum"
    )


def _with_prefix(
    operands: Any,
    prefix: dict[str, jax.Array],
    sums: Callable[[jax.Array], LinearState],
    mine: Documents,
    entering: LinearState,
    split: bool,
) -> jax.Array:
    """A part's output. The op takes a state for the first document alone, so what the last one has
    from other devices enters by a second call, on that document; those between are whole here."""
    (query, key, value), options = operands
    options = dict(options)
    segments = options.pop("segment_ids", None)
    segments = jnp.ones(query.shape[:2], jnp.int32) if segments is None else segments
    ids = prefix["prefix_segment_ids"]
    ends = (ids == mine.first[:, None]) | (ids == mine.last[:, None])
    between: dict[str, Any] = {**prefix, "prefix_segment_ids": jnp.where(ends, 0, ids)}
    state = jax.tree.map(jnp.add, entering, sums(mine.first))
    out, _ = linear_attention(
        query, key, value, segment_ids=segments, state=state, **options, **between
    )
    other = (mine.last != mine.first)[:, None] & (segments == mine.last[:, None])
    last, _ = linear_attention(
        query,
        key,
        value,
        segment_ids=jnp.where(other, segments, 0),
        state=sums(mine.last),
        **options,
    )
    out = where_rows(other, last, out)
    if split:
        astray = jnp.any((ids != 0) & (ids != segments), axis=1)
        out = where_rows(astray, jnp.full_like(out, jnp.nan), out)
    return out
