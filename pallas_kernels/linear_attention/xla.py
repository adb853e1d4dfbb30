"""Linear attention chunk by chunk with plain XLA operations; memory is linear in seq_len.

The backward keeps the inputs only: it recomputes the state at each chunk's entry in one cheap
sweep, then goes through the chunks in reverse, differentiating `chunk_forward` where it stands, so
there is one definition of the mathematics (in `chunk.py`). A row that fits one chunk has neither
scan nor state; a last chunk that is not full runs by itself instead of being padded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.chunks import cut, joined
from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands, Result
from effattn.pallas_kernels.linear_attention.chunk import (
    Chunk,
    chunk_backward,
    chunk_forward,
    state_after,
)
from effattn.pallas_kernels.linear_attention.features import num_features
from effattn.pallas_kernels.linear_attention.state import LinearState


def _chunk_size(call: LinearAttentionCall) -> int:
    """Tokens per chunk; the whole row where one quadratic piece is cheaper than chunks and states.

    Per token, chunks of c cost about c (d + e) for scores and 4 f e for the state, f being the
    features; one piece costs seq_len (d + e). (2 CPU cores, forward and backward: 64, 128 and 256
    are within 20% of each other at d = e = 128 and for BASED at d = 16, e = 64.)
    """
    if call.chunk_size is not None:
        return min(call.chunk_size, call.seq_len)
    if call.decay == "channel":
        return min(64, call.seq_len)  # pairs in a block of 16 are written out per channel
    features = num_features(call.feature_map, call.key_dim)
    state_cost = 4 * features * call.value_dim / (call.key_dim + call.value_dim)
    return call.seq_len if call.seq_len <= 128 + state_cost else 128


def forward(call: LinearAttentionCall, operands: Operands) -> Result:
    row, head_decay = _row(call, operands)
    state = _merge(call, operands.state)
    size = _chunk_size(call)

    def step(state, chunk):
        parts, state = chunk_forward(call, state, _with(chunk, head_decay))
        return state, parts

    if size == call.seq_len:
        state, (out, denominator) = step(state, row)
        return Result(out, denominator, _split(call, state))
    whole, tail = cut(row, size)
    state, parts = jax.lax.scan(step, _or_zeros(call, state, operands), whole)
    state, tail_parts = (state, None) if tail is None else step(state, tail)
    out, denominator = joined(parts, tail_parts)
    return Result(out, denominator, _split(call, state))


def backward(call: LinearAttentionCall, operands: Operands, out, denominator, d_out, d_state):
    row, head_decay = _row(call, operands)
    state = _merge(call, operands.state)
    d_after = _merge_cotangent(call, d_state)
    size = _chunk_size(call)

    def step(d_after, x):
        state, chunk, outputs = x
        return chunk_backward(call, state, _with(chunk, head_decay), *outputs, d_after)

    outputs = (out, denominator, d_out)
    if size == call.seq_len:
        d_before, d_arrays = step(d_after, (state, row, outputs))
    else:
        entry = _or_zeros(call, state, operands)
        d_after = _or_zeros(call, d_after, operands)
        (whole, whole_outputs), tail = cut((row, outputs), size)
        entry, entries = jax.lax.scan(
            lambda s, chunk: (state_after(call, s, _with(chunk, head_decay)), s), entry, whole
        )
        d_tail = None
        if tail is not None:
            d_after, d_tail = step(d_after, (entry, *tail))
        d_before, d_whole = jax.lax.scan(
            step, d_after, (entries, whole, whole_outputs), reverse=True
        )
        d_arrays = joined(d_whole[:3], d_tail and d_tail[:3])
        d_decay, d_tail_decay = d_whole[3], d_tail and d_tail[3]
        if head_decay is None:
            d_decay = joined(d_decay, d_tail_decay)
        else:  # one number per head for all chunks: its cotangent is a sum
            d_decay = d_decay.sum(axis=0)
            d_decay = d_decay if d_tail is None else d_decay + d_tail_decay
        d_arrays = (*d_arrays, d_decay)
    d_before = None if state is None else _split(call, d_before)
    return Operands(*d_arrays, d_before, None, None)


def _row(call: LinearAttentionCall, operands: Operands) -> tuple[Chunk, Any]:
    """(the row as one chunk, per-head decay): what is the same for every chunk is kept apart."""
    query, key, value, log_decay, _, runs, valid = operands
    before = None
    if runs is not None:
        before = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], axis=1)
    head_decay, log_decay = (log_decay, None) if call.decay == "head" else (None, log_decay)
    row = Chunk(query, key, value, log_decay, runs, valid, before)
    return row, head_decay


def _with(chunk: Chunk, head_decay: Any) -> Chunk:
    return chunk if head_decay is None else chunk._replace(log_decay=head_decay)


def _merge(call: LinearAttentionCall, state: LinearState | None) -> jax.Array | None:
    """[b, g, r, f, e], with the normalizer as one more column."""
    if state is None:
        return None
    merged = state.kv
    if call.normalize:
        merged = jnp.concatenate([merged, state.normalizer[..., None]], axis=-1)
    return merged.reshape(call.batch, call.num_key_heads, -1, *merged.shape[2:])


def _split(call: LinearAttentionCall, merged: jax.Array) -> LinearState:
    state = merged.reshape(call.batch, call.num_heads, *merged.shape[3:])
    return LinearState(state[..., :-1], state[..., -1]) if call.normalize else LinearState(state)


def _merge_cotangent(call: LinearAttentionCall, d_state: LinearState) -> jax.Array | None:
    """None where neither part of the final state was used."""
    d_kv, d_normalizer = d_state
    if d_kv is None and d_normalizer is None:
        return None
    shape = (call.batch, call.num_heads, num_features(call.feature_map, call.key_dim))
    d_kv = jnp.zeros((*shape, call.value_dim), call.state_dtype) if d_kv is None else d_kv
    if call.normalize and d_normalizer is None:
        d_normalizer = jnp.zeros(shape, call.state_dtype)
    return _merge(call, LinearState(d_kv, d_normalizer))


def _or_zeros(call: LinearAttentionCall, state: jax.Array | None, operands: Operands) -> jax.Array:
    """`state`, or zeros in its place."""
    if state is not None:
        return state
    g, r = call.num_key_heads, call.num_heads // call.num_key_heads
    columns = call.value_dim + int(call.normalize)
    shape = (call.batch, g, r, num_features(call.feature_map, call.key_dim), columns)
    # Like the operands: inside shard_map a scan's carry must vary over the axes they vary over.
    arrays = jax.tree.leaves(operands[:4])
    return sum(jnp.zeros_like(x, shape=shape, dtype=call.state_dtype) for x in arrays)


def _refuses(call: LinearAttentionCall) -> str | None:
    return None


BACKEND = Backend("xla", _refuses, forward, backward)
