"""Packed rows: which document each token belongs to and which token stands before it, sums over
documents, and a prefix laid before each document."""

from typing import Any

import jax
import jax.numpy as jnp


def runs_of_segments(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(runs int32 [b, s], valid bool [b, s]) as `Operands` wants them.

    A run goes up where the id differs from that of the last token that is not padding.
    """
    valid = segment_ids != 0
    index = jnp.where(valid, jnp.arange(segment_ids.shape[1], dtype=jnp.int32), -1)
    last = jax.lax.cummax(index, axis=1)
    before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    change = valid & (before >= 0) & (previous_id != segment_ids)
    return jnp.cumsum(change, axis=1, dtype=jnp.int32), valid


def reduce_runs(x: jax.Array, runs: jax.Array, kind: str) -> jax.Array:
    """The "sum" or "max" over each token's run, at the token; a maximum is not differentiable.

    x: [batch, seq_len, ...]; runs: int [batch, seq_len], from 0 up, by 1 at most, never down.
    """
    reduce = {"sum": jax.ops.segment_sum, "max": jax.ops.segment_max}[kind]

    def row(x: jax.Array, runs: jax.Array) -> jax.Array:
        return reduce(x, runs, num_segments=len(runs), indices_are_sorted=True)[runs]

    return jax.vmap(row)(x, runs)


def previous_valid(tree: Any, valid: jax.Array, first: Any) -> tuple[Any, Any]:
    """(for every token the last valid one before it, the last valid one of all).

    tree: arrays [batch, seq_len, ...]; valid: bool [batch, seq_len]; first: arrays [batch, ...],
    what stands before the row.
    """
    latest = jax.lax.cummax(jnp.where(valid, jnp.arange(1, valid.shape[1] + 1), 0), axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    # Slot 0 is what stands before, slot t + 1 is token t.
    slots = jax.tree.map(lambda f, x: jnp.concatenate([f[:, None], x], axis=1), first, tree)
    row = jnp.arange(len(valid))[:, None]
    return (
        jax.tree.map(lambda x: x[row, before], slots),
        jax.tree.map(lambda x: x[row, latest[:, -1:]][:, 0], slots),
    )


def prepend_prefix(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None,
    segment_ids: jax.Array | None,
    prefix_key: jax.Array,
    prefix_value: jax.Array,
    prefix_segment_ids: jax.Array | None,
) -> tuple[tuple, jax.Array | int]:
    """((query, key, value, log_decay, segment_ids) with the prefix as tokens, where ours now are).

    A prefix is seen by every query of its document and decays nothing, so it is the same as
    that many tokens before the document's first, whose own queries nobody reads. The second value
    is an offset, or int32 [b, s] where packed rows had to be reordered.
    """
    batch, prefix_len = prefix_key.shape[:2]
    seq_len = query.shape[1]
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (batch, seq_len, log_decay.shape[0]))
        log_decay = _concatenate(_zeros_like(log_decay, prefix_len), log_decay)
    query = _concatenate(_zeros_like(query, prefix_len), query)
    key, value = _concatenate(prefix_key, key), _concatenate(prefix_value, value)
    if segment_ids is None and prefix_segment_ids is None:
        return (query, key, value, log_decay, None), prefix_len

    if segment_ids is None:
        segment_ids = jnp.ones((batch, seq_len), jnp.int32)
    runs, valid = runs_of_segments(segment_ids)
    same = prefix_segment_ids[:, :, None] == jnp.where(valid, segment_ids, 0)[:, None, :]
    same &= (prefix_segment_ids != 0)[:, :, None]
    run_of_prefix = jnp.where(same, runs[:, None, :], -1).max(axis=2)
    prefix_segment_ids = jnp.where(run_of_prefix < 0, 0, prefix_segment_ids)
    rank = _concatenate(2 * jnp.maximum(run_of_prefix, 0), 2 * runs + 1)
    order = jnp.argsort(rank, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)[:, prefix_len:]
    ids = _concatenate(prefix_segment_ids, segment_ids)
    arrays = (query, key, value, log_decay, ids)
    return tuple(None if x is None else _take(x, order) for x in arrays), place


def take_tokens(x: jax.Array, place: jax.Array | int) -> jax.Array:
    """The tokens that `prepend_prefix` says are ours."""
    return x[:, place:] if isinstance(place, int) else _take(x, place)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _concatenate(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first.astype(second.dtype), second], axis=1)


def _zeros_like(x: jax.Array, length: int) -> jax.Array:
    return jnp.zeros_like(x, shape=(x.shape[0], length, *x.shape[2:]))
