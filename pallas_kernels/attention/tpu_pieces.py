"""The logits of one block, piece by piece: what a flash kernel does between two copies.

Logits are held as [keys, queries]. The statistics of a query are then one row vector, in the layout
in which they lie in HBM, the maximum and the sum over keys run across registers and not lanes, and
of the five products of the backward pass only dq's has a transposed operand.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effattn.masks import FULL, PARTIAL
from effattn.pallas_kernels.attention.call import AttentionCall
from effattn.pallas_kernels.attention.tpu_visits import MASKED, PATTERNS, WHOLE, Pattern

# Finite: exp2(MASKED_LOGIT - MASKED_LOGIT) is 1 where -inf - -inf would be nan, and what a query
# sums up before it meets an allowed key is multiplied by exp2(MASKED_LOGIT - logit) = 0.
MASKED_LOGIT = -0.5 * float(jnp.finfo(jnp.float32).max)
LOG2_E = math.log2(math.e)


class Piece(NamedTuple):
    """Keys [kv, kv + kv_size) by queries [q, q + q_size) of a block. masked: which strips of its
    keys need the mask, as (start, size) within the piece."""

    q: int
    q_size: int
    kv: int
    kv_size: int
    masked: tuple[tuple[int, int], ...]


def pattern_of(code: int, patterns: tuple[Pattern, ...], strips: int, columns: int) -> Pattern:
    """The kinds of a block's parts under a code."""
    if code >= PATTERNS:
        return patterns[code - PATTERNS]
    kind = {WHOLE: FULL, MASKED: PARTIAL}[code]
    return ((kind,) * columns,) * strips


def pieces_of(pattern: Pattern, strip: int, longest: int) -> list[Piece]:
    """The pieces that hold what is not EMPTY, none with more than `longest` keys."""
    pieces = []
    for row, kinds in enumerate(pattern):
        for start, stop in _runs(kinds, longest // strip):
            masked = tuple(
                (first * strip, (last - first) * strip)
                for first, last in _runs([kind == PARTIAL for kind in kinds[start:stop]], longest)
            )
            pieces.append(Piece(row * strip, strip, start * strip, (stop - start) * strip, masked))
    return pieces


def _runs(wanted: Sequence[int | bool], longest: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs that are wanted, cut at `longest`. EMPTY is 0."""
    start = 0
    while start < len(wanted):
        stop = start
        while stop < len(wanted) and wanted[stop] and stop - start < longest:
            stop += 1
        if stop > start:
            yield start, stop
        start = max(stop, start + 1)


def product(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    """The matrix product over one axis of each, summed in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def scaled_query(call: AttentionCall, query: jax.Array) -> jax.Array:
    """The query with all that multiplies its logits: in base 2, or under the soft cap.

    Rounded to the query's dtype, as every rival does it: the product's operand is no wider.
    """
    cap = call.logit_soft_cap
    factor = call.scale * LOG2_E if cap is None else call.scale / cap
    return (query.astype(jnp.float32) * factor).astype(query.dtype)


def capped(call: AttentionCall, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(logits in base 2, slope of the soft cap or None) from the product with `scaled_query`."""
    if call.logit_soft_cap is None:
        return logits, None
    squashed = jnp.tanh(logits)
    return squashed * (call.logit_soft_cap * LOG2_E), 1 - squashed * squashed


class Places(NamedTuple):
    """Reads the mask's words and the segment ids of a part of a block: functions of (start, size)
    that give [1, size] for queries and [size, 1] for keys, or None. present: [size, 1], which keys
    are there and no padding; None where all are."""

    q_words: Callable[[int, int], tuple[jax.Array, ...]]
    kv_words: Callable[[int, int], tuple[jax.Array, ...]]
    q_segment_ids: Callable[[int, int], jax.Array] | None
    kv_segment_ids: Callable[[int, int], jax.Array] | None
    present: Callable[[int, int], jax.Array] | None


def mask_logits(call: AttentionCall, logits: jax.Array, piece: Piece, places: Places) -> jax.Array:
    """The logits of a piece with MASKED_LOGIT where the mask forbids."""
    if not piece.masked:
        return logits
    q_words = places.q_words(piece.q, piece.q_size)
    parts, done = [], 0
    for start, size in piece.masked:
        if start > done:
            parts.append(logits[done:start])
        at = piece.kv + start
        allowed = call.mask.allowed_by_words(q_words, places.kv_words(at, size))
        if places.q_segment_ids is not None and places.kv_segment_ids is not None:
            q_ids = places.q_segment_ids(piece.q, piece.q_size)
            allowed &= (q_ids == places.kv_segment_ids(at, size)) & (q_ids != 0)
        if places.present is not None:
            allowed &= places.present(at, size)
        parts.append(jnp.where(allowed, logits[start : start + size], MASKED_LOGIT))
        done = start + size
    if done < piece.kv_size:
        parts.append(logits[done:])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)
