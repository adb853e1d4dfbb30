"""Both scans with plain XLA operations, on one engine: `recur`, h_t = gate_t h_{t-1} + x_t.

With the running maxima m known, the softmax's sums are such a recurrence too, its gate
exp(m_{t-1} - m_t) and its inputs exp(s_t - m_t) times v_t and 1: every factor is at most 1, so
nothing overflows at any score. The backward passes are the same recurrence from the other end.
Memory is linear in seq_len.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.prefix_scan.call import (
    GatedScanCall,
    SoftmaxResult,
    SoftmaxScanCall,
)
from effattn.pallas_kernels.prefix_scan.state import SoftmaxState
from effattn.pallas_kernels.varying import varying_alike

# ---- the engine


def _chunk_size(call: SoftmaxScanCall | GatedScanCall) -> int:
    """Tokens per chunk; the whole row for a plain loop over its tokens.

    An accelerator pays for every step of a loop, so all chunks of a row walk side by side: chunks
    of c make 2 c + seq_len / c steps, fewest near sqrt(seq_len / 2). A CPU pays for memory, and the
    plain loop touches it once.
    """
    if call.chunk_size is not None:
        return min(call.chunk_size, call.seq_len)
    if jax.default_backend() == "cpu":
        return call.seq_len
    size = 16
    while 2 * size * size <= call.seq_len // 2:
        size *= 2
    return min(size, call.seq_len)


def recur(
    gate: jax.Array,
    tokens: Any,
    entry: Any,
    chunk_size: int,
    *,
    enter: Callable[[Any], Any],
    leave: Callable[[Any, Any, Any], Any],
    reverse: bool = False,
) -> tuple[Any, Any]:
    """h_t = gate_t h_{t-1} + enter(token_t); if reverse, from the last token on.

    gate: [b, s, ...]; tokens: arrays [b, s, ...]; entry: h before the first token that is walked,
    arrays [b, ...] with at least the axes of gate, which broadcasts against the first of them.
    enter(token) is like entry; leave(h_{t-1}, h_t, token_t) comes back, stacked along axis 1, with
    the last h. What they compute is computed in the loop: before it, XLA on CPU would do the
    exponential of a weight once per channel that the weight is for.
    """
    length = gate.shape[1]
    # A gate of 1 and a token of zeros change nothing, from either end.
    walked = _chunks(gate, chunk_size, 1), jax.tree.map(lambda x: _chunks(x, chunk_size, 0), tokens)

    def advance(h: Any, token: Any) -> Any:
        return _advance(token[0], h, enter(token[1]))

    entries = jax.tree.map(lambda x: x[:, None], entry)
    if chunk_size < length:
        gates = walked[0]

        def ends(carry: Any, token: Any) -> Any:
            return token[0] * carry[0], advance(carry[1], token)

        zeros = jax.tree.map(
            lambda x: jnp.repeat(jnp.zeros_like(x), gates.shape[1], axis=1), entries
        )
        chunks, _ = _walk(ends, (jnp.ones_like(gates[:, :, 0]), zeros), walked, 2, reverse)

        def across(h: Any, chunk: Any) -> Any:
            return _advance(chunk[0], h, chunk[1])

        _, entries = _walk(across, entry, chunks, 1, reverse, lambda before, after, chunk: before)
    last, kept = _walk(
        advance,
        entries,
        walked,
        2,
        reverse,
        lambda before, after, token: leave(before, after, token[1]),
    )
    kept = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length], kept)
    return jax.tree.map(lambda x: x[:, 0 if reverse else -1], last), kept


def _advance(gate: jax.Array, h: Any, inputs: Any) -> Any:
    return jax.tree.map(
        lambda h, x: gate.reshape(*gate.shape, *(1,) * (x.ndim - gate.ndim)) * h + x, h, inputs
    )


def _walk(
    advance: Callable[[Any, Any], Any],
    carry: Any,
    tokens: Any,
    axis: int,
    reverse: bool,
    keep: Callable[[Any, Any, Any], Any] = lambda before, after, token: None,
) -> tuple[Any, Any]:
    """(the last carry, keep(carry before, carry after, token) stacked along `axis`).

    carry = advance(carry, token) for the tokens along `axis`. Unlike `lax.scan` this reads and
    writes rows where they stand: its transposed copies take four times as long as the recurrence
    (8 x 1024 x 512, 2 cores: 61 ms with them, 9 without, 5 to multiply two such arrays).
    """
    length = jax.tree.leaves(tokens)[0].shape[axis]

    def at(place: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, place, axis, keepdims=False), tokens
        )

    def step(i: jax.Array, state: Any) -> Any:
        before, kept = state
        place = length - 1 - i if reverse else i
        token = at(place)
        after = advance(before, token)
        kept = jax.tree.map(
            lambda whole, row: jax.lax.dynamic_update_index_in_dim(whole, row, place, axis),
            kept,
            keep(before, after, token),
        )
        return after, kept

    rows = jax.eval_shape(lambda: keep(carry, advance(carry, at(0)), at(0)))
    room = jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:axis], length, *x.shape[axis:]), x.dtype), rows
    )
    carry, room, tokens = varying_alike((carry, room, tokens))
    return jax.lax.fori_loop(0, length, step, (carry, room))


def _chunks(x: jax.Array, size: int, fill: int) -> jax.Array:
    """[b, s, ...] -> [b, number of chunks, size, ...]."""
    if x.shape[1] % size:
        padding = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, padding, constant_values=fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


# ---- gated_scan


def _gated_forward(call: GatedScanCall, gate: Any, x: Any, state: Any) -> Any:
    _, h = recur(
        gate,
        x,
        state,
        _chunk_size(call),
        enter=lambda x: x.astype(call.state_dtype),
        leave=lambda before, h, x: h,
    )
    return h


def _gated_backward(
    call: GatedScanCall, gate: Any, x: Any, state: Any, h: Any, d_h: Any
) -> tuple[Any, Any, Any]:
    """d_x_t = d_h_t + c_{t+1} and d_gate_t = d_x_t h_{t-1}, with c_t = gate_t d_x_t."""
    d_state, d_x = recur(
        gate,
        (gate, d_h),
        jnp.zeros_like(state),
        _chunk_size(call),
        enter=lambda token: token[0] * token[1],
        leave=lambda c, after, token: token[1] + c,
        reverse=True,
    )
    before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    shared = [i for i, size in enumerate(gate.shape) if size != x.shape[i]]
    d_gate = jnp.sum(d_x * before, axis=shared, keepdims=True)
    return d_gate, d_x.astype(x.dtype), d_state


# ---- softmax_scan


def _maxima(scores: jax.Array, state: SoftmaxState, runs: Any) -> tuple[jax.Array, jax.Array]:
    """(m [b, s, h]: the largest score of the run so far, gate: exp(m_{t-1} - m_t), 0 at resets)."""
    first = jnp.maximum(scores[:, :1], state.maximum[:, None])
    scores = jnp.concatenate([first, scores[:, 1:]], axis=1)
    if runs is None:
        maxima = jax.lax.cummax(scores, axis=1)
    else:
        previous = jnp.concatenate([jnp.zeros_like(runs[:, :1]), runs[:, :-1]], axis=1)
        reset = jnp.broadcast_to((runs != previous)[..., None], scores.shape)

        def later(a: Any, b: Any) -> Any:
            return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

        _, maxima = jax.lax.associative_scan(later, (reset, scores), axis=1)
    before = jnp.concatenate([state.maximum[:, None], maxima[:, :-1]], axis=1)
    if runs is not None:
        before = jnp.where(reset, -jnp.inf, before)
    # Where nothing was seen yet there is nothing to keep; -inf - -inf would be nan.
    gate = jnp.exp(before - _finite(maxima))
    return maxima, gate


def _finite(maxima: jax.Array) -> jax.Array:
    return jnp.where(maxima == -jnp.inf, 0, maxima)


def _softmax_forward(
    call: SoftmaxScanCall, scores: Any, values: Any, state: SoftmaxState, runs: Any
) -> SoftmaxResult:
    maxima, gate = _maxima(scores, state, runs)
    weights = jnp.exp(scores - _finite(maxima))

    def enter(token: Any) -> Any:
        weight, value = token
        return weight, weight[..., None] * value.astype(call.state_dtype)

    def leave(before: Any, sums: Any, token: Any) -> Any:
        denominator, numerator = sums
        return denominator, (numerator / _nonzero(denominator)).astype(call.dtype)

    sums, (denominator, out) = recur(
        gate, (weights, values), tuple(state[1:]), _chunk_size(call), enter=enter, leave=leave
    )
    return SoftmaxResult(out, maxima, denominator, SoftmaxState(maxima[:, -1], *sums))


def _softmax_backward(
    call: SoftmaxScanCall, scores: Any, values: Any, state: SoftmaxState, runs: Any,
    result: SoftmaxResult, d_out: Any, d_state: SoftmaxState,
) -> tuple[Any, Any, SoftmaxState]:  # fmt: skip
    """The maxima cancel, so they are constants: the rest is the transpose of one recurrence.

    With d_t the cotangents of (u_t, w_t) that token t alone causes and c_t those that reach back
    beyond it, c_t = gate_t (d_t + c_{t+1}).
    """
    dtype = call.state_dtype
    _, gate = _maxima(scores, state, runs)
    weights = jnp.exp(scores - _finite(result.maximum))

    def own(token: Any) -> Any:
        d_out, out, denominator = token[3:]
        d_numerator = d_out.astype(dtype) / _nonzero(denominator)
        return -jnp.sum(d_numerator * out.astype(dtype), axis=-1), d_numerator

    def enter(token: Any) -> Any:
        d_denominator, d_numerator = own(token)
        return token[0] * d_denominator, token[0][..., None] * d_numerator

    def leave(reaching: Any, after: Any, token: Any) -> Any:
        d_denominator, d_numerator = jax.tree.map(jnp.add, own(token), reaching)
        weight, value = token[1:3]
        d_score = d_denominator + jnp.sum(value.astype(dtype) * d_numerator, axis=-1)
        return weight * d_score, (weight[..., None] * d_numerator).astype(values.dtype)

    tokens = (gate, weights, values, d_out, result.out, result.denominator)
    (d_denominator, d_numerator), (d_scores, d_values) = recur(
        gate,
        tokens,
        tuple(d_state[1:]),
        _chunk_size(call),
        enter=enter,
        leave=leave,
        reverse=True,
    )
    d_maximum = state.denominator * d_denominator + jnp.sum(state.numerator * d_numerator, axis=-1)
    return d_scores, d_values, SoftmaxState(d_maximum, d_denominator, d_numerator)


def _nonzero(denominator: jax.Array) -> jax.Array:
    """[..., 1], with 1 where nothing was seen: its numerator is 0."""
    return jnp.where(denominator == 0, 1, denominator)[..., None]


def _refuses(call: SoftmaxScanCall | GatedScanCall) -> str | None:
    return None


SOFTMAX = Backend("xla", _refuses, _softmax_forward, _softmax_backward)
GATED = Backend("xla", _refuses, _gated_forward, _gated_backward)
