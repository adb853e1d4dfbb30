"""Linear attention in a layer: its sums for rows whose documents begin and end anywhere.

The op knows documents inside a call; between calls the state remembers whose sums it holds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.batch import TokenInfo
from effattn.nn.layers import statistics_dtype
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
    **options: Any,
) -> tuple[jax.Array, DocumentState]:
    """`sequence.linear_attention` of whole rows that continue from `state`: (out, the next state).

    query, key, value: [batch, seq_len, heads, channels]; options: those of the op.
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
    return out, DocumentState(linear, jnp.where(last == 0, state.segment, last))


def attend_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    info: TokenInfo,
    state: DocumentState,
    **options: Any,
) -> tuple[jax.Array, DocumentState]:
    """One token per row, [batch, heads, channels]; invalid rows keep their state."""
    out, linear = linear_attention_step(
        query,
        key,
        value,
        continued(state.linear, state.segment, info.segments),
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


def continued(sums: Any, held: jax.Array, segment: jax.Array) -> Any:
    """The sums that a token of `segment` [batch] goes on from: `sums`, a tree of [batch, ...], if
    they are those of its own segment, else zeros. Segment 0 (padding) keeps them."""
    keep = (segment == held) | (segment == 0)
    return jax.tree.map(lambda s: jnp.where(keep.reshape(-1, *(1,) * (s.ndim - 1)), s, 0), sums)
