"""Linear attention over devices: each needs the state that the ones before it leave, no tokens.

Every device sums up its own tokens, all sums are gathered, [batch, heads, features, values] from
each, and each device folds those before it into the state that its own pass begins with. Bytes do
not grow with the sequence. With decay, a sum fades by all the tokens that follow it, and a document
that begins anew forgets it. Source: Sun et al. 2025, LASP-2 (arXiv 2502.07563); decay and documents
are ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.mesh import free_axes
from effattn.parallel.sequence import dividing_axes, shard_map


class Summary(NamedTuple):
    """What a device tells of its part. state: after it, from nothing. fading: [batch, heads] or
    [batch, heads, channels], the sum of its log decays, None without. first, last: [batch], the
    segments of its first and last token that is no padding, 0 where there is none. whole: [batch],
    it holds no more than one document."""

    state: LinearState
    fading: jax.Array | None
    first: jax.Array
    last: jax.Array
    whole: jax.Array


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

    Raises ValueError where the sequence does not divide, or has a prefix.
    """
    check_multiple("seq_len", query.shape[1], f"mesh axis {axis!r}", ways)
    if options.get("prefix_key") is not None:
        raise ValueError(
            "prefix_key: got an array, expected None where tokens lie over devices: a prefix would "
            "have to be on all of them"
        )
    free = free_axes()
    batch, num_key_heads, num_heads = query.shape[0], key.shape[2], value.shape[2]
    rows = dividing_axes(batch_axes, free, batch)
    heads = dividing_axes(head_axes, free, num_heads if num_key_heads == 1 else num_key_heads)
    of_keys = P(rows, axis, () if num_key_heads == 1 else heads)
    of_values, of_state = P(rows, axis, heads), P(rows, heads)
    log_decay = options.get("log_decay")
    per_head = log_decay is not None and log_decay.ndim == 1
    places = {
        "log_decay": P(heads) if per_head else of_values,
        "segment_ids": P(rows, axis),
        "state": of_state,
    }
    traced = {n: x for n, x in options.items() if n in places and x is not None}
    static = {n: x for n, x in options.items() if n not in places}

    def run(query: jax.Array, key: jax.Array, value: jax.Array, traced: Any) -> Any:
        given = dict(traced)
        before = given.pop("state", None)
        # Its outputs are not read, and are not computed.
        _, state = linear_attention(query, key, value, **static, **given)
        summary = _summary(state, given, query.shape[:2], value.shape[2])
        all_parts = jax.tree.map(lambda x: jax.lax.all_gather(x, axis), summary)
        mine, last = _fold(all_parts, jax.lax.axis_index(axis), ways, before)
        out, _ = linear_attention(query, key, value, **static, **given, state=mine)
        return out, last

    specs = of_keys, of_keys, of_values, {name: places[name] for name in traced}
    out_specs = of_values, of_state
    return shard_map(run, free, (query, key, value, traced), specs, out_specs)


def _summary(
    state: LinearState, given: dict[str, Any], shape: tuple[int, ...], num_heads: int
) -> Summary:
    segments = given.get("segment_ids")
    if segments is None:
        segments = jnp.ones(shape, jnp.int32)
    runs, valid = runs_of_segments(segments)
    index = jnp.arange(shape[1])
    some = jnp.any(valid, axis=1)
    first = jnp.argmax(valid, axis=1)
    last = jnp.argmax(jnp.where(valid, index, -1), axis=1)
    row = jnp.arange(shape[0])
    log_decay = given.get("log_decay")
    fading = None
    if log_decay is not None:
        log_decay = log_decay.astype(state.kv.dtype)
        if log_decay.ndim == 1:
            fading = jnp.sum(valid, axis=1)[:, None] * log_decay
        else:
            heard = valid.reshape(*valid.shape, *(1,) * (log_decay.ndim - 2))
            fading = jnp.sum(jnp.where(heard, log_decay, 0), axis=1)
        fading = jnp.broadcast_to(fading, (shape[0], num_heads, *fading.shape[2:]))
    first, last = (jnp.where(some, segments[row, at], 0) for at in (first, last))
    return Summary(state, fading, first, last, runs[:, -1] == 0)


def _fold(
    parts: Summary, me: jax.Array, ways: int, before: LinearState | None
) -> tuple[LinearState, LinearState]:
    """(the state before this device's tokens, the state after all), from parts [ways, ...]."""
    held = jnp.zeros_like(parts.first[0])
    for j in reversed(range(ways)):  # what the caller holds belongs to the row's first document
        held = jnp.where(parts.first[j] == 0, held, parts.first[j])
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x[0]), parts.state)
    state = zeros if before is None else before
    mine = zeros
    for j in range(ways):
        part = jax.tree.map(lambda x, j=j: x[j], parts)
        goes_on = part.first == held
        entering = _where(goes_on, state, zeros)
        mine = jax.tree.map(lambda m, e, j=j: jnp.where(me == j, e, m), mine, entering)
        faded = entering if part.fading is None else _faded(entering, part.fading)
        after = jax.tree.map(jnp.add, _where(part.whole, faded, zeros), part.state)
        some = part.first != 0
        state, held = _where(some, after, state), jnp.where(some, part.last, held)
    return mine, state


def _where(rows: jax.Array, one: LinearState, other: LinearState) -> LinearState:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, one, other)


def _faded(state: LinearState, fading: jax.Array) -> LinearState:
    factor = jnp.exp(fading)
    factor = factor if factor.ndim == 3 else factor[..., None]  # [batch, heads, features | 1]
    normalizer = None if state.normalizer is None else state.normalizer * factor
    return LinearState(state.kv * factor[..., None], normalizer)
