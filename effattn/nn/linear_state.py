"""Linear attention in a layer: its sums for rows whose documents begin and end anywhere.

The op knows documents inside a call; between calls the state remembers whose sums it holds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.batch import TokenInfo
from effattn.nn.layers import statistics_dtype
from effattn.nn.start import Learned, Start, first_tokens, rows_of
from effattn.pallas_kernels.linear_attention import (
    LinearState,
    init_linear_state,
    linear_attention_step,
)
from effattn.parallel.sequence import SequenceParallel


class DocumentState(NamedTuple):
    """linear: sums over the tokens of segment `segment` [batch] (0: none yet)."""

    linear: LinearState
    segment: jax.Array


def init_document_state(
    batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: Any, **options: Any
) -> DocumentState:
    """float32 sums whatever `dtype`: a bfloat16 running sum loses the recent tokens.

    options: feature_map and normalize, those of the op.
    """
    linear = init_linear_state(
        batch, num_heads, key_dim, value_dim, dtype=statistics_dtype(dtype), **options
    )
    return DocumentState(linear, jnp.zeros((batch,), jnp.int32))


def attend_on(
    sequence: SequenceParallel,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    info: TokenInfo,
    state: DocumentState,
    start: Start | None = None,
    **options: Any,
) -> tuple[jax.Array, DocumentState]:
    """`sequence.linear_attention` of whole rows that continue from `state`: (out, the next state).

    query, key, value: [batch, seq_len, heads, channels]; options: those of the op. start: of the
    shapes of `start_sums`, what a document that begins here begins with; identity feature map only.
    """
    first, last = segments_at_ends(info)
    out, linear = sequence.linear_attention(
        query,
        key,
        value,
        state=continued(state.linear, state.segment, first),
        segment_ids=info.segments,
        **options,
    )
    if start is not None:
        begins = first_tokens(info.segments, state.segment)
        out, linear = _add_start(
            sequence, out, linear, query, info, begins, start["sums"], **options
        )
    return out, DocumentState(linear, jnp.where(last == 0, state.segment, last))


def start_sums(num_heads: int, key_dim: int, value_dim: int) -> dict[str, Learned]:
    """The sums that a document begins with in place of zeros, without a feature map."""
    return {"sums": Learned((num_heads, key_dim, value_dim), ("heads", None, None))}


def _add_start(
    sequence: SequenceParallel,
    out: jax.Array,
    linear: LinearState,
    query: jax.Array,
    info: TokenInfo,
    begins: jax.Array,
    sums: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    **_: Any,
) -> tuple[jax.Array, LinearState]:
    """(out, linear) of documents that begin from `sums` [streams, ...] instead of zeros.

    The op takes a state for the first document of a row alone; but what is read is linear in the
    sums, so those of each document's beginning, decayed until here, are read beside it.
    """
    batch, seq_len, num_key_heads, _key_dim = query.shape
    num_heads, streams = out.shape[2], sums.shape[0]
    dtype = statistics_dtype(query.dtype)
    decay = jnp.zeros((num_heads,), dtype) if log_decay is None else log_decay.astype(dtype)
    if decay.ndim == 1:
        decay = jnp.broadcast_to(decay, (batch, seq_len, num_heads))
    gate = jnp.exp(decay)
    # What is left of a document's beginning; 0 in one that began in an earlier call.
    first = jnp.where(begins.reshape(batch, seq_len, *(1,) * (gate.ndim - 2)), gate, 0)
    left, left_last = sequence.gated_scan(gate, first, segment_ids=info.segments)
    if gate.ndim == 3:
        left, left_last = left[..., None], left_last[..., None]
    reads = jnp.repeat(query.astype(dtype), num_heads // num_key_heads, axis=2) * left
    reads = reads.reshape(streams, -1, *reads.shape[1:])
    read = jnp.einsum("pbshd,phde->pbshe", reads, sums.astype(dtype)).reshape(out.shape)
    out = out + (read if scale is None else scale * read).astype(out.dtype)
    kv = linear.kv + left_last[..., None] * rows_of(sums, batch).astype(linear.kv.dtype)
    return out, LinearState(kv, linear.normalizer)


def attend_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    info: TokenInfo,
    state: DocumentState,
    start: Start | None = None,
    **options: Any,
) -> tuple[jax.Array, DocumentState]:
    """One token per row, [batch, heads, channels]; invalid rows keep their state."""
    fresh = None
    if start is not None:
        kv = rows_of(start["sums"], len(query))
        fresh = LinearState(kv.astype(state.linear.kv.dtype), None)
    out, linear = linear_attention_step(
        query,
        key,
        value,
        continued(state.linear, state.segment, info.segments, fresh),
        valid=info.valid,
        **options,
    )
    segment = jnp.where(info.valid, info.segment_ids, state.segment)
    return out, DocumentState(linear, segment)


def segments_at_ends(info: TokenInfo) -> tuple[jax.Array, jax.Array]:
    """The segments of each row's first and last valid token, [batch]; 0 where there is none."""
    segments = info.segments
    index = jnp.arange(segments.shape[1])
    first = jnp.min(jnp.where(info.valid, index, len(index) - 1), axis=1, keepdims=True)
    last = jnp.max(jnp.where(info.valid, index, 0), axis=1, keepdims=True)
    first, last = (jnp.take_along_axis(segments, at, axis=1)[:, 0] for at in (first, last))
    return first, last


def continued(sums: Any, held: jax.Array, segment: jax.Array, fresh: Any = None) -> Any:
    """The sums that a token of `segment` [batch] goes on from: `sums`, a tree of [batch, ...], if
    they are those of its own segment, else `fresh` (None: zeros). Segment 0 (padding) keeps them.
    """
    keep = (segment == held) | (segment == 0)
    fresh = jax.tree.map(lambda _: 0, sums) if fresh is None else fresh
    return jax.tree.map(
        lambda s, f: jnp.where(keep.reshape(-1, *(1,) * (s.ndim - 1)), s, f), sums, fresh
    )
