"""The mathematics of one chunk of c tokens: quadratic inside, a state from before to after.

Everything is in head-major layout, b g r c e, where r value heads share each of g key heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall
from effattn.pallas_kernels.linear_attention.decay import ChunkDecay, chunk_decay
from effattn.pallas_kernels.linear_attention.features import apply_feature_map, query_scale

# Rows of scores made at once inside a chunk. Keys after a block of rows are skipped, so blocks of
# 64 spare 3/8 of the square of 256: 1.7x on 2 CPU cores (T=256, B=8, H=4, d=16, e=32).
_ROWS = 64


class Chunk(NamedTuple):
    """The operands of c tokens, [b, c, ...] as in `Operands`; per-head decay is [h].

    runs_before: [b, c], the run of the token before.
    """

    query: Any
    key: Any
    value: Any
    log_decay: Any
    runs: Any = None
    valid: Any = None
    runs_before: Any = None

    @property
    def entry_run(self) -> jax.Array:
        """[b], the run that the state before the chunk belongs to."""
        return self.runs_before[:, 0]


def chunk_forward(call: LinearAttentionCall, state: jax.Array | None, chunk: Chunk):
    """((out [b, c, h, e], denominator [b, c, h] or None), state after).

    state: [b, g, r, f, e] in the state's dtype, None for zeros; with `normalize` its last column,
    like that of the numerators below, is the denominator's: the sum for a value of 1.
    """
    numerators, state = _forward(call, state, chunk)
    return _finish(call, chunk, numerators), state


def chunk_backward(call, state, chunk: Chunk, out, denominator, d_out, d_after):
    """(cotangent of the state before, those of query, key, value and log_decay).

    d_after: cotangent of the state after, None where nobody used it.
    """
    d_numerators = _finish_backward(call, chunk, out, denominator, d_out)

    def outputs(state, *arrays):
        numerators, after = _forward(call, state, Chunk(*arrays, *chunk[4:]))
        return numerators if d_after is None else (numerators, after)

    _, vjp = jax.vjp(outputs, state, *chunk[:4])
    d_before, *d_arrays = vjp(d_numerators if d_after is None else (d_numerators, d_after))
    return d_before, tuple(d_arrays)


def state_after(call: LinearAttentionCall, state: jax.Array, chunk: Chunk) -> jax.Array:
    """The state after the chunk alone."""
    return _next_state(call, *_prepare(call, chunk), state)


def _forward(call: LinearAttentionCall, state: jax.Array | None, chunk: Chunk):
    """(numerators [b, g, r, c, e], state after)."""
    chunk, decay = _prepare(call, chunk)
    numerators = _inside(call, chunk, decay)
    if state is not None:
        numerators = numerators + _from_state(call, chunk, decay, state)
    return numerators, _next_state(call, chunk, decay, state)


def _prepare(call: LinearAttentionCall, chunk: Chunk) -> tuple[Chunk, ChunkDecay | None]:
    """The chunk in head-major layout and in the state's dtype, with a column of ones that sums the
    denominator; padding has value 0 in all columns."""
    query, key = (x.swapaxes(1, 2).astype(call.state_dtype) for x in (chunk.query, chunk.key))
    value = to_heads(call, chunk.value.astype(call.state_dtype))
    if call.normalize:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    if chunk.valid is not None:
        value = jnp.where(chunk.valid[:, None, None, :, None], value, 0)
    log_decay = chunk.log_decay
    if call.decay == "head":
        log_decay = log_decay.reshape(value.shape[1:3])
    elif call.decay != "none":
        log_decay = to_heads(call, log_decay)
    decay = chunk_decay(call.decay, log_decay, query.shape[2], call.state_dtype)
    return chunk._replace(query=query, key=key, value=value, log_decay=None), decay


def to_heads(call: LinearAttentionCall, x: jax.Array) -> jax.Array:
    """[b, c, h, ...] -> [b, g, r, c, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], call.num_key_heads, -1, *x.shape[3:]), 1, 3)


def _from_heads(x: jax.Array) -> jax.Array:
    """[b, g, r, c, ...] -> [b, c, h, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _features(call: LinearAttentionCall, x: jax.Array) -> jax.Array:
    return apply_feature_map(call.feature_map, x, call.scale)


def _kernel(call: LinearAttentionCall, scores: jax.Array) -> jax.Array:
    """phi(q).phi(k) from q.k."""
    scores = scores * np.asarray(call.scale, scores.dtype)
    return 1 + scores + 0.5 * scores * scores if call.feature_map == "taylor" else scores


def _inside(call: LinearAttentionCall, chunk: Chunk, decay: ChunkDecay | None) -> jax.Array:
    """What the tokens of a chunk give each other: numerators [b, g, r, c, e]."""
    query, key, value = chunk.query, chunk.key, chunk.value
    length = query.shape[2]
    outputs = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        seen = np.arange(start, stop)[:, None] >= np.arange(stop)
        if chunk.runs is not None:
            same = chunk.runs[:, start:stop, None] == chunk.runs[:, None, :stop]
            seen = (same & seen)[:, None, None]
        if call.decay == "channel":
            scores = decay.scores(query, key, start, stop)
        else:
            scores = jnp.einsum("bgid,bgjd->bgij", query[:, :, start:stop], key[:, :, :stop])
            scores = scores[:, :, None]
        weights = jnp.where(seen, _kernel(call, scores), 0)
        if decay is not None and call.decay != "channel":
            weights = weights * decay.factors(start, stop)
        weights = jnp.broadcast_to(weights, (*value.shape[:3], *weights.shape[3:]))
        outputs.append(jnp.einsum("bgrij,bgrje->bgrie", weights, value[..., :stop, :]))
    return jnp.concatenate(outputs, axis=3) if len(outputs) > 1 else outputs[0]


def _from_state(call, chunk: Chunk, decay: ChunkDecay | None, state: jax.Array) -> jax.Array:
    """What the tokens read from the state before the chunk: numerators [b, g, r, c, e]."""
    query = _features(call, chunk.query)
    query = query * np.asarray(query_scale(call.feature_map, call.scale), query.dtype)
    if call.decay == "channel":
        read = jnp.einsum("bgrcf,bgrfe->bgrce", query[:, :, None] * decay.since_entry, state)
    else:
        read = jnp.einsum("bgcf,bgrfe->bgrce", query, state)
        if decay is not None:
            read = read * decay.since_entry[..., None]
    if chunk.runs is not None:
        first = chunk.runs == chunk.entry_run[:, None]
        read = jnp.where(first[:, None, None, :, None], read, 0)
    return read


def _next_state(call, chunk: Chunk, decay: ChunkDecay | None, state: jax.Array | None):
    """The state after the chunk, [b, g, r, f, e]."""
    key = _features(call, chunk.key)
    values = chunk.value
    if chunk.runs is not None:
        last = chunk.runs == chunk.runs[:, -1:]
        values = jnp.where(last[:, None, None, :, None], values, 0)
    if call.decay == "channel":
        key = key[:, :, None] * decay.until_exit
        added = jnp.einsum("bgrcf,bgrce->bgrfe", key, values)
    else:
        if decay is not None:
            values = values * decay.until_exit[..., None]
        added = jnp.einsum("bgcf,bgrce->bgrfe", key, values)
    if state is None:
        return added
    if decay is not None:
        total = decay.total[..., None] if call.decay == "channel" else decay.total[..., None, None]
        state = state * total
    if chunk.runs is not None:
        alive = chunk.runs[:, -1] == chunk.entry_run
        state = jnp.where(alive[:, None, None, None, None], state, 0)
    return state + added


def _finish(call, chunk: Chunk, numerators: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(out, denominator), token-major; the division."""
    denominator = None
    numerators = _from_heads(numerators)
    if call.normalize:
        denominator = numerators[..., -1] + np.asarray(call.eps, numerators.dtype)
        if chunk.valid is not None:
            denominator = jnp.where(chunk.valid[..., None], denominator, 1)
        numerators = numerators[..., :-1] / denominator[..., None]
    if chunk.valid is not None:
        numerators = jnp.where(chunk.valid[..., None, None], numerators, 0)
    return numerators.astype(call.dtype), denominator


def _finish_backward(call, chunk: Chunk, out, denominator, d_out) -> jax.Array:
    """Cotangent of the numerators and, in the last column, of the denominator; head-major."""
    d_out = d_out.astype(call.state_dtype)
    if chunk.valid is not None:
        d_out = jnp.where(chunk.valid[..., None, None], d_out, 0)
    if not call.normalize:
        return to_heads(call, d_out)
    d_numerators = d_out / denominator[..., None]
    d_denominator = -(d_numerators * out.astype(call.state_dtype)).sum(axis=-1, keepdims=True)
    return to_heads(call, jnp.concatenate([d_numerators, d_denominator], axis=-1))
