"""The delta rule chunk by chunk with plain XLA operations; memory is linear in seq_len.

Inside a chunk the correction that token i writes depends on those of the tokens before it, through
the overlaps of their keys: a unit lower triangular system, solved in the state's dtype. The
backward keeps the inputs only: it recomputes the state at each chunk's entry in one sweep, then
goes through the chunks in reverse, differentiating `_chunk` where it stands. A row that fits one
chunk has neither scan nor state; a last chunk that is not full runs by itself, unpadded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.pallas_kernels.chunks import cut, joined
from effattn.pallas_kernels.delta_rule.call import DeltaRuleCall, Operands
from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.linear_attention.decay import chunk_decay

DEFAULT_CHUNK = 64


class _Chunk(NamedTuple):
    """The operands of c tokens, [b, c, ...]; runs_before: [b, c], the run of the token before."""

    query: Any
    key: Any
    value: Any
    beta: Any
    log_decay: Any
    runs: Any = None
    runs_before: Any = None


def forward(call: DeltaRuleCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    row, size = _row(operands), _chunk_size(call)
    state = _grouped(call, operands.state)

    def step(state: Any, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
        out, state = _chunk(call, state, chunk)
        return state, out

    if size == call.seq_len:
        state, out = step(state, row)
        return out, state.reshape(call.state_shape)
    whole, tail = cut(row, size)
    state, parts = jax.lax.scan(step, _or_zeros(call, state, operands), whole)
    state, last = (state, None) if tail is None else step(state, tail)
    return joined(parts, last), state.reshape(call.state_shape)


def backward(call: DeltaRuleCall, operands: Operands, d_out: Any, d_state: Any) -> Operands:
    row, size = _row(operands), _chunk_size(call)
    state, d_after = _grouped(call, operands.state), _grouped(call, d_state)

    def step(d_after: Any, x: Any) -> tuple[Any, Any]:
        """(cotangent of the state before, those of the chunk's arrays)."""
        state, chunk, d_out = x

        def outputs(state: Any, *arrays: Any) -> Any:
            out, after = _chunk(call, state, _Chunk._make([*arrays, *chunk[5:]]))
            return out if d_after is None else (out, after)

        _, vjp = jax.vjp(outputs, state, *chunk[:5])
        d_before, *d_arrays = vjp(d_out if d_after is None else (d_out, d_after))
        return d_before, tuple(d_arrays)

    if size == call.seq_len:
        d_before, d_arrays = step(d_after, (state, row, d_out))
    else:
        entry = _or_zeros(call, state, operands)
        d_after = _or_zeros(call, d_after, operands)
        (whole, d_whole), tail = cut((row, d_out), size)
        entry, entries = jax.lax.scan(lambda s, x: (_chunk(call, s, x)[1], s), entry, whole)
        d_tail = None
        if tail is not None:
            d_after, d_tail = step(d_after, (entry, *tail))
        d_before, d_parts = jax.lax.scan(step, d_after, (entries, whole, d_whole), reverse=True)
        d_arrays = joined(d_parts, d_tail)
    d_before = None if operands.state is None else d_before.reshape(call.state_shape)
    return Operands._make([*d_arrays, d_before, None])


def _chunk(call: DeltaRuleCall, state: Any, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
    """(out [b, c, h, e], state after); state: [b, g, r, d, e], None for zeros.

    Head-major, b g r c e: r value heads share each of g key heads.
    """
    query, key = (x.swapaxes(1, 2).astype(call.state_dtype) for x in (chunk.query, chunk.key))
    query = query * np.asarray(call.scale, query.dtype)
    value, beta = (_to_heads(call, x.astype(call.state_dtype)) for x in (chunk.value, chunk.beta))
    beta = beta[..., None]
    index = np.arange(query.shape[2])
    seen, earlier = index[:, None] >= index, index[:, None] > index
    if chunk.runs is not None:
        same = (chunk.runs[:, :, None] == chunk.runs[:, None, :])[:, None, None]
        seen, earlier = seen & same, earlier & same
    overlaps, scores = (jnp.einsum("bgid,bgjd->bgij", x, key)[:, :, None] for x in (key, query))
    decay = None
    if call.decay:
        decay = chunk_decay("token", _to_heads(call, chunk.log_decay), len(index), query.dtype)
        factors = decay.factors(0, len(index))
        overlaps, scores = overlaps * factors, scores * factors
    overlaps, scores = jnp.where(earlier, overlaps, 0), jnp.where(seen, scores, 0)

    # What a token writes into the state: beta (v - recalled), what it recalls being what came into
    # the chunk and what the tokens before it wrote.
    writes = value
    if state is not None:
        writes = value - _read(chunk, decay, key, state)
    writes = jax.lax.linalg.triangular_solve(
        beta * overlaps, beta * writes, left_side=True, lower=True, unit_diagonal=True
    )
    out = scores @ writes
    if state is not None:
        out = out + _read(chunk, decay, query, state)
    out = jnp.moveaxis(out, 3, 1).reshape(*chunk.value.shape)
    return out.astype(call.dtype), _next_state(chunk, decay, key, writes, state)


def _read(chunk: _Chunk, decay: Any, query: jax.Array, state: jax.Array) -> jax.Array:
    """What the state before the chunk gives for each token's query, [b, g, r, c, e]."""
    read = jnp.einsum("bgcd,bgrde->bgrce", query, state)
    if decay is not None:
        read = read * decay.since_entry[..., None]
    if chunk.runs is not None:
        first = chunk.runs == chunk.runs_before[:, :1]
        read = jnp.where(first[:, None, None, :, None], read, 0)
    return read


def _next_state(chunk: _Chunk, decay: Any, key: jax.Array, writes: Any, state: Any) -> jax.Array:
    """The state after the chunk, [b, g, r, d, e]."""
    if chunk.runs is not None:
        last = chunk.runs == chunk.runs[:, -1:]
        writes = jnp.where(last[:, None, None, :, None], writes, 0)
    if decay is not None:
        writes = writes * decay.until_exit[..., None]
    added = jnp.einsum("bgcd,bgrce->bgrde", key, writes)
    if state is None:
        return added
    if decay is not None:
        state = state * decay.total[..., None, None]
    if chunk.runs is not None:
        alive = chunk.runs[:, -1] == chunk.runs_before[:, 0]
        state = jnp.where(alive[:, None, None, None, None], state, 0)
    return state + added


# --- rows and chunks ----------------------------------------------------------------------------


def _chunk_size(call: DeltaRuleCall) -> int:
    return min(DEFAULT_CHUNK if call.chunk_size is None else call.chunk_size, call.seq_len)


def _row(operands: Operands) -> _Chunk:
    """The whole row as one chunk."""
    *arrays, _, runs = operands
    if runs is None:
        return _Chunk(*arrays)
    before = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], axis=1)
    return _Chunk._make([*arrays, runs, before])


def _to_heads(call: DeltaRuleCall, x: jax.Array) -> jax.Array:
    """[b, c, h, ...] -> [b, g, r, c, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], call.num_key_heads, -1, *x.shape[3:]), 1, 3)


def _grouped(call: DeltaRuleCall, state: Any) -> Any:
    """[b, h, d, e] -> [b, g, r, d, e]."""
    if state is None:
        return None
    return state.reshape(call.batch, call.num_key_heads, -1, *state.shape[2:])


def _or_zeros(call: DeltaRuleCall, state: Any, operands: Operands) -> jax.Array:
    """`state`, or zeros in its place."""
    if state is not None:
        return state
    groups = call.num_key_heads, call.num_heads // call.num_key_heads
    shape = (call.batch, *groups, call.key_dim, call.value_dim)
    # Like the operands: inside shard_map a scan's carry must vary over the axes they vary over.
    arrays = jax.tree.leaves(operands[:5])
    zeros = [jnp.zeros_like(x, shape=shape, dtype=call.state_dtype) for x in arrays]
    return functools.reduce(jnp.add, zeros)


def _refuses(call: DeltaRuleCall) -> str | None:
    return None


BACKEND = Backend("xla", _refuses, forward, backward)
