"""Scans whose tokens lie over devices: each scans its part, N summaries are exchanged.

softmax_scan: a part's summary is its softmax state, (maximum, denominator, numerator). gated_scan:
the last h from nothing, and the product of its gates. Both rest on the ops' own rules of
differentiation: jax 0.11.2 crashes on the automatic one of `associative_scan` inside `shard_map`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.pallas_kernels.prefix_scan import SoftmaxState, gated_scan, softmax_scan
from effattn.pallas_kernels.prefix_scan.state import matched_gate, scan_dtype, where_rows
from effattn.parallel.passing import documents_of, fold, gathered
from effattn.parallel.sequence import shard_map


def softmax_scan_over(
    axis: str, ways: int, scores: jax.Array, values: jax.Array, options: dict[str, Any]
) -> tuple[jax.Array, SoftmaxState]:
    """`softmax_scan` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves (ways - 1) (2 + value_dim) numbers per row and head. Raises ValueError where the sequence
    does not divide.
    """

    def run(scores: jax.Array, values: jax.Array, state: Any, segments: Any) -> Any:
        own = _softmax_of(scores, values, segments)
        if state is not None:
            state = jax.tree.map(lambda x, o: x.astype(o.dtype), SoftmaxState(*state), own)
        parts, documents = gathered((own, documents_of(segments, scores)), axis)
        nothing = SoftmaxState(*(jnp.zeros_like(x) for x in own))
        nothing = nothing._replace(maximum=nothing.maximum - jnp.inf)
        mine, last = fold(
            parts,
            documents,
            jax.lax.axis_index(axis),
            before=state,
            empty=nothing,
            after=lambda part, entering, whole: _joined(
                jax.tree.map(lambda e, n: where_rows(whole, e, n), entering, nothing), part
            ),
        )
        out, _ = softmax_scan(scores, values, state=mine, segment_ids=segments, **static)
        return out, last

    state, segments, static = _parted(options)
    return _over_tokens(run, axis, ways, (scores, values), state, segments)


def _softmax_of(scores: jax.Array, values: jax.Array, segments: Any) -> SoftmaxState:
    """The state after a part from nothing: of the last document that is in it.

    As everywhere with these states, the maximum is a reference point and has no gradient.
    """
    dtype = scan_dtype(scores, values)
    scores, values = scores.astype(dtype), values.astype(dtype)
    if segments is not None:
        runs, valid = runs_of_segments(segments)
        counted = valid & (runs == runs[:, -1:])
        scores = where_rows(counted, scores, jnp.full_like(scores, -jnp.inf))
        values = where_rows(counted, values, jnp.zeros_like(values))
    maximum = jax.lax.stop_gradient(jnp.max(scores, axis=1))
    weights = jnp.exp(scores - _finite(maximum)[:, None])
    numerator = jnp.einsum("bsh,bshe->bhe", weights, values, precision="highest")
    return SoftmaxState(maximum, jnp.sum(weights, axis=1), numerator)


def _joined(one: SoftmaxState, other: SoftmaxState) -> SoftmaxState:
    maximum = jax.lax.stop_gradient(jnp.maximum(one.maximum, other.maximum))
    shares = [jnp.exp(x.maximum - _finite(maximum)) for x in (one, other)]
    denominator = one.denominator * shares[0] + other.denominator * shares[1]
    numerators = [x.numerator * s[..., None] for x, s in zip((one, other), shares, strict=True)]
    return SoftmaxState(maximum, denominator, numerators[0] + numerators[1])


def _finite(maximum: jax.Array) -> jax.Array:
    """Nothing was seen where it is -inf, and -inf - -inf would be nan."""
    return jnp.where(maximum == -jnp.inf, 0, maximum)


def gated_scan_over(
    axis: str, ways: int, gate: jax.Array, x: jax.Array, options: dict[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """`gated_scan` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves (ways - 1) (channels of x + channels of gate) numbers per row. Raises ValueError where the
    sequence does not divide.
    """

    def run(gate: jax.Array, x: jax.Array, state: Any, segments: Any) -> Any:
        dtype = scan_dtype(gate, x)
        gate = gate.astype(dtype)
        h, own = gated_scan(gate, x.astype(dtype), segment_ids=segments, **static)
        # How much of what comes in is left at each token: the same recurrence, of 1 and no inputs.
        # A document that begins here leaves nothing.
        nothing = jnp.zeros_like(gate)
        left, kept = gated_scan(
            gate, nothing, state=jnp.ones_like(gate[:, 0]), segment_ids=segments, **static
        )
        parts, documents = gathered(((own, kept), documents_of(segments, x)), axis)
        mine, last = fold(
            parts,
            documents,
            jax.lax.axis_index(axis),
            before=None if state is None else state.astype(dtype),
            empty=jnp.zeros_like(own),
            after=lambda part, entering, whole: part[1] * entering + part[0],
        )
        return (h + left * mine[:, None]).astype(x.dtype), last

    state, segments, static = _parted(options)
    gate = matched_gate(gate, x, leading=2)
    return _over_tokens(run, axis, ways, (gate, x), state, segments)


def _parted(options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(state, segment_ids, the options that are no arrays)"""
    static = {n: x for n, x in options.items() if n not in ("state", "segment_ids")}
    return options.get("state"), options.get("segment_ids"), static


def _over_tokens(
    run: Any, axis: str, ways: int, arrays: tuple[jax.Array, ...], state: Any, segments: Any
) -> tuple[jax.Array, Any]:
    """Only `axis` is split by hand: rows and channels lie as XLA has them."""
    check_multiple("seq_len", arrays[-1].shape[1], f"mesh axis {axis!r}", ways)
    tokens = P(None, axis)
    specs = tokens, tokens, jax.tree.map(lambda _: P(), state), None if segments is None else tokens
    return shard_map(run, {axis: ways}, (*arrays, state, segments), specs, (tokens, P()))
