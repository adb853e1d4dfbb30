"""The backward pass of chunked linear attention on a TPU: two kernels, no residual but the inputs.

One walks the chunks in order, sums up the state again and makes dq; one walks them in reverse with
the cotangent of the state and makes dk and dv. With p_ij = d_out_i . v_j, m_ij the decay from j to
i and z the cotangent of the state after a chunk (Yang et al. 2024, section 4):

    dq_i = sum_{j <= i} m_ij p_ij k_j + exp(G_i) state d_out_i
    dk_j = sum_{i >= j} m_ij p_ij q_i + exp(G_end - G_j) z v_j
    dv_j = sum_{i >= j} m_ij (q_i . k_j) d_out_i + exp(G_end - G_j) z^T k_j
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands
from effattn.pallas_kernels.linear_attention.state import LinearState
from effattn.pallas_kernels.linear_attention.tpu_chunk import (
    Piece,
    alone_in_lanes,
    features_of,
    pieces_of,
    product,
    read_pairs,
    rows_of,
    scaled,
    taylor_input,
    taylor_slope,
    taylor_weights,
    window_rows_of,
    with_ones,
    with_row,
    write_strips,
)
from effattn.pallas_kernels.linear_attention.tpu_features import kernel_features_backward
from effattn.pallas_kernels.linear_attention.tpu_plan import (
    Blocks,
    Plan,
    compiler_params,
    from_head_rows,
    head_rows,
    make_plan,
    make_steps,
    pack,
    state_in,
    state_out,
    unpack,
)
from effattn.pallas_kernels.pipeline import pipelined
from effattn.pallas_kernels.tuning import LANES, LinearTuning
from effattn.pallas_kernels.varying import varying_alike, varying_shape

NAME = "effattn_linear_backward"


class _Cotangents(NamedTuple):
    """d_sums: of the numerators, packed as values. d_ones: of the denominators, as head rows."""

    d_sums: jax.Array
    d_ones: jax.Array | None


def backward(
    call: LinearAttentionCall,
    operands: Operands,
    out: jax.Array,
    denominator: jax.Array | None,
    d_out: jax.Array,
    d_state: LinearState,
    *,
    tuning: LinearTuning,
    interpret: Any = False,
) -> Operands:
    plan = make_plan(call, tuning)
    dtype = jnp.result_type(*operands[:3])
    query, key = (pack(plan, x.astype(dtype), plan.key_dim) for x in operands[:2])
    value = pack(plan, operands.value.astype(dtype), plan.value_dim)
    cotangents, d_first = _cotangents_of_sums(plan, operands, out, denominator, d_out, dtype)
    final = _state_cotangent(plan, d_state)
    steps = make_steps(plan, operands)
    decays = call.decay != "none" and call.decay_gradient
    state = plan.heads, plan.features, plan.columns
    by_group = call.batch, plan.groups
    shapes = {
        "keys": (call.batch, plan.parts, plan.length, query.shape[-1]),
        "values": value.shape,
        "rows": (*by_group, plan.rows, plan.length),
        "state": (*by_group, *state),
        "states": (*by_group, plan.num_chunks, *state),
        "carried": (*by_group, plan.num_chunks, plan.rows, LANES),
    }
    dtypes = {"keys": dtype if plan.parts == 1 else jnp.float32, "values": dtype, "states": dtype}

    def run(
        body: Callable[..., None],
        name: str,
        arrays: Sequence[tuple[str, jax.Array | None]],
        outs: Sequence[str],
        *,
        reverse: bool,
    ) -> Any:
        """The results of a kernel over (kind, array) and kinds of outputs; None is no array."""
        blocks = Blocks(plan, reverse)
        specs = {
            "values": blocks.values(),
            "rows": blocks.head_rows(),
            "state": blocks.state(state),
            "states": blocks.by_chunk(state),
            "carried": blocks.by_chunk((plan.rows, LANES)),
        }
        of_inputs, of_outputs = (
            {"keys": blocks.keys(), **specs},
            {"keys": blocks.key_parts(), **specs},
        )
        given = [(x, of_inputs[kind]) for kind, x in arrays if x is not None] + blocks.steps(steps)
        operands = varying_alike([x for x, _ in given])
        return pl.pallas_call(
            lambda *refs: body(plan, _Refs(list(refs))),
            grid=(*by_group, plan.num_chunks),
            in_specs=[spec for _, spec in given],
            out_specs=[of_outputs[kind] for kind in outs],
            out_shape=[
                varying_shape(shapes[kind], dtypes.get(kind, jnp.float32), operands)
                for kind in outs
            ],
            scratch_shapes=[pltpu.VMEM(state, jnp.float32)],
            compiler_params=compiler_params(plan),
            interpret=interpret,
            name=NAME + name,
        )(*operands)

    started = None if operands.state is None else state_in(plan, operands.state)
    arrays = [
        ("keys", key),
        ("values", value),
        ("values", cotangents.d_sums),
        ("keys", query if call.feature_map == "taylor" else None),
        ("rows", cotangents.d_ones),
        ("state", started),
    ]
    body = functools.partial(_dq_body, saves=decays)
    dq, *after = run(body, "_dq", arrays, ["keys", *["states"] * decays], reverse=False)
    arrays = [
        ("keys", query),
        ("keys", key),
        ("values", value),
        ("values", cotangents.d_sums),
        ("rows", cotangents.d_ones),
        ("state", final),
        ("states", after[0] if decays else None),
    ]
    body = functools.partial(_dkv_body, has_final=final is not None)
    outs = ["keys", "values", "state", *["rows", "carried"] * decays]
    dk, dv, first, *of_decay = run(body, "_dkv", arrays, outs, reverse=True)
    dq, dk = (
        unpack(plan, x.sum(1), plan.key_dim, call.key_dim).astype(like.dtype)
        for x, like in ((dq, operands.query), (dk, operands.key))
    )
    dv = unpack(plan, dv, plan.value_dim, call.value_dim).astype(operands.value.dtype)
    if operands.valid is not None:
        dv = jnp.where(operands.valid[..., None, None], dv, 0)
    d_decay = None
    if decays:
        entered, carried = of_decay
        # What reaches a token through decays, less what leaves it: between the two a decay acts.
        # What crosses the end of the chunk stands in the state there, so that roundings do not add
        # up over the whole row.
        running = head_rows(plan, d_first) - entered
        running = running.reshape(*running.shape[:3], plan.num_chunks, plan.chunk)
        inside = jnp.flip(jnp.cumsum(jnp.flip(running, 4), 4), 4)
        inside += carried[..., 0].swapaxes(2, 3)[..., None]
        d_decay = from_head_rows(plan, inside.reshape(shapes["rows"]))
        if call.decay == "head":
            d_decay = d_decay.sum((0, 1))
    d_state_in = None if operands.state is None else state_out(plan, first)
    return Operands(dq, dk, dv, d_decay, d_state_in, None, None)


def _cotangents_of_sums(
    plan: Plan, operands: Operands, out: Any, denominator: Any, d_out: Any, dtype: Any
) -> tuple[_Cotangents, jax.Array]:
    """(cotangents of numerators and denominators before the scale; their products with these sums,
    [b, s, h], which the gradient of a decay needs)."""
    call = plan.call
    d_out = d_out.astype(jnp.float32)
    if operands.valid is not None:
        d_out = jnp.where(operands.valid[..., None, None], d_out, 0)
    scale = 1.0 if call.feature_map == "taylor" else call.scale
    along = jnp.sum(d_out * out.astype(jnp.float32), -1)
    if not call.normalize:
        return _Cotangents(pack(plan, (d_out * scale).astype(dtype), plan.value_dim), None), along
    d_sums = d_out * (scale / denominator)[..., None]
    d_ones = -along / denominator
    cotangents = _Cotangents(
        pack(plan, d_sums.astype(dtype), plan.value_dim), head_rows(plan, d_ones * scale)
    )
    return cotangents, along + d_ones * (denominator - call.eps)


def _state_cotangent(plan: Plan, d_state: LinearState) -> jax.Array | None:
    call = plan.call
    if d_state.kv is None and d_state.normalizer is None:
        return None
    some = d_state.kv if d_state.kv is not None else d_state.normalizer
    features = some.shape[2]
    shape = (call.batch, call.num_heads, features)
    kv = jnp.zeros((*shape, call.value_dim)) if d_state.kv is None else d_state.kv
    normalizer = d_state.normalizer
    if call.normalize and normalizer is None:
        normalizer = jnp.zeros(shape)
    return state_in(plan, LinearState(kv, normalizer))


class _Refs:
    """The refs of a kernel, taken from either end."""

    def __init__(self, refs: list[Any]):
        self._refs = refs

    def first(self) -> Any:
        return self._refs.pop(0)

    def last(self) -> Any:
        return self._refs.pop()

    def rest(self) -> list[Any]:
        return self._refs


def _dq_body(plan: Plan, refs: _Refs, *, saves: bool) -> None:
    """saves: the state after each chunk goes out."""
    call = plan.call
    taylor = call.feature_map == "taylor"
    k_ref, v_ref, d_ref = (refs.first() for _ in range(3))
    q_ref = refs.first() if taylor else None
    ones_ref = refs.first() if call.normalize else None
    start_ref = refs.first() if call.has_state else None
    state_ref = refs.last()
    after_ref = refs.last() if saves else None
    dq_ref = refs.last()
    step = pl.program_id(2)
    pairs = read_pairs(plan, refs.rest(), step)

    @pl.when(step == 0)
    def _() -> None:
        state_ref[...] = jnp.zeros_like(state_ref) if start_ref is None else start_ref[...]

    dtype = v_ref.dtype
    keys, values = k_ref[...], v_ref[...]
    key_rows, value_rows, d_rows = keys.T, values.T, d_ref[...].T
    query_rows = None if q_ref is None else q_ref[...].T

    def d_of(piece: Piece) -> jax.Array:
        d = rows_of(d_rows, piece.head, plan.value_dim)[:, piece.lanes]
        if ones_ref is None:
            return d
        return with_row(d, ones_ref[piece.head : piece.head + 1, piece.lanes])

    def begin(piece: Piece) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(cotangent of the weights [keys, queries], that of the features, the raw scores)."""
        head, key_head = piece.head, piece.head // plan.repeats
        d = window_rows_of(d_rows, head, plan.value_dim)[:, piece.lanes]
        d_weights = product(alone_in_lanes(values, head, plan.value_dim)[piece.down], d, 1, 0)
        d_phi = product(state_ref[head].astype(dtype), d_of(piece), 1, 0)
        if query_rows is None:
            return d_weights, d_phi, None
        q = window_rows_of(query_rows, key_head, plan.key_dim)[:, piece.lanes]
        k = alone_in_lanes(keys, key_head, plan.key_dim)[piece.down]
        return d_weights, d_phi, product(k, q, 1, 0)

    sums: dict[tuple[int, int], jax.Array] = {}

    def finish(piece: Piece, begun: tuple[jax.Array, jax.Array, jax.Array | None]) -> None:
        d_weights, d_phi, scores = begun
        head, key_head = piece.head, piece.head // plan.repeats
        d_ones = None if ones_ref is None else ones_ref[head : head + 1, piece.lanes]

        def d_scores_of(rows: slice, lanes: slice, weigh: Any) -> tuple[jax.Array]:
            block = d_weights[rows, lanes]
            if d_ones is not None:
                block += d_ones[:, lanes]
            if scores is not None:
                block = block * taylor_slope(plan, scores[rows, lanes])
            return (weigh(block).astype(dtype),)

        (d_scores,) = pairs.by_blocks(piece, d_scores_of, True)
        k_rows = rows_of(key_rows, key_head, plan.key_dim)
        dq = product(k_rows[:, piece.down], d_scores, 1, 0)
        d_phi = scaled(d_phi, pairs.from_state(head, piece))
        if query_rows is not None:
            q = rows_of(query_rows, key_head, plan.key_dim)[:, piece.lanes]
            d_phi = kernel_features_backward(taylor_input(plan, q), d_phi) * call.scale**0.5
        place = key_head, piece.start
        sums[place] = dq + d_phi + sums.get(place, 0)
        if piece.last:
            v = with_ones(plan, rows_of(value_rows, head, plan.value_dim))
            entering = scaled(v, pairs.to_state(head)).astype(dtype)
            new = product(features_of(plan, k_rows), entering, 1, 1)
            state_ref[head] = scaled(state_ref[head], pairs.kept(head)) + new

    pipelined(pieces_of(plan, queries_in_lanes=True), begin, finish, plan.pipeline)
    write_strips(plan, dq_ref, sums)
    if after_ref is not None:
        after_ref[...] = state_ref[...].astype(dtype)


def _dkv_body(plan: Plan, refs: _Refs, *, has_final: bool) -> None:
    call = plan.call
    taylor = call.feature_map == "taylor"
    q_ref, k_ref, v_ref, d_ref = (refs.first() for _ in range(4))
    ones_ref = refs.first() if call.normalize else None
    final_ref = refs.first() if has_final else None
    decays = call.decay != "none" and call.decay_gradient
    after_ref = refs.first() if decays else None
    z_ref = refs.last()  # cotangent of the state after the chunk
    carried_ref = refs.last() if decays else None
    entered_ref = refs.last() if decays else None
    first_ref, dv_ref, dk_ref = (refs.last() for _ in range(3))
    step = pl.program_id(2)
    pairs = read_pairs(plan, refs.rest(), plan.num_chunks - 1 - step)

    @pl.when(step == 0)
    def _() -> None:
        z_ref[...] = jnp.zeros_like(z_ref) if final_ref is None else final_ref[...]

    dtype = v_ref.dtype
    queries, d_lanes = q_ref[...], d_ref[...]
    query_rows, key_rows, value_rows = queries.T, k_ref[...].T, v_ref[...].T
    d_rows = d_lanes.T
    ones_columns = None if ones_ref is None else ones_ref[...].T

    @functools.cache
    def phi_of_keys(key_head: int) -> jax.Array:
        return features_of(plan, rows_of(key_rows, key_head, plan.key_dim))

    def begin(piece: Piece) -> tuple[jax.Array, ...]:
        """(scores [queries, keys], cotangent of the weights; the state's share of dv and of the
        cotangent of the features)."""
        head, key_head = piece.head, piece.head // plan.repeats
        q = alone_in_lanes(queries, key_head, plan.key_dim)[piece.down]
        k = window_rows_of(key_rows, key_head, plan.key_dim)[:, piece.lanes]
        d = alone_in_lanes(d_lanes, head, plan.value_dim)[piece.down]
        v = rows_of(value_rows, head, plan.value_dim)[:, piece.lanes]
        z = z_ref[head].astype(dtype)
        return (
            product(q, k, 1, 0),
            product(d, window_rows_of(value_rows, head, plan.value_dim)[:, piece.lanes], 1, 0),
            product(z, phi_of_keys(key_head)[:, piece.lanes], 0, 0),
            product(z, with_ones(plan, v), 1, 0),
        )

    dks: dict[tuple[int, int], jax.Array] = {}
    dvs: dict[tuple[int, int], jax.Array] = {}

    def finish(piece: Piece, begun: tuple[jax.Array, ...]) -> None:
        scores, d_weights, dv, d_phi = begun
        head, key_head = piece.head, piece.head // plan.repeats
        to_state = pairs.to_state(head, piece)
        d = rows_of(d_rows, head, plan.value_dim)
        d_ones = None
        if ones_ref is not None and ones_columns is not None:
            d_ones = ones_columns[piece.down, head : head + 1]
            d = with_row(d, ones_ref[head : head + 1])

        def both(rows: slice, lanes: slice, weigh: Any) -> tuple[jax.Array, jax.Array]:
            """Blocks of the weights and of the cotangent of the scores."""
            block, d_block = scores[rows, lanes], d_weights[rows, lanes]
            if d_ones is not None:
                d_block += d_ones[rows]
            if taylor:
                d_block = d_block * taylor_slope(plan, block)
                block = taylor_weights(plan, block)
            return weigh(block).astype(dtype), weigh(d_block).astype(dtype)

        weights, d_scores = pairs.by_blocks(piece, both, False)
        dv = scaled(dv, to_state) + product(d[:, piece.down], weights, 1, 0)
        if entered_ref is not None:
            v = with_ones(plan, rows_of(value_rows, head, plan.value_dim)[:, piece.lanes])
            row = jnp.sum(dv * v.astype(jnp.float32), 0, keepdims=True)
            entered_ref[head : head + 1, piece.lanes] = row
        dvs[head, piece.start] = dv[: plan.value_dim]
        q_rows = rows_of(query_rows, key_head, plan.key_dim)
        dk = product(q_rows[:, piece.down], d_scores, 1, 0)
        d_phi = scaled(d_phi, to_state)
        if taylor:
            k = rows_of(key_rows, key_head, plan.key_dim)[:, piece.lanes]
            d_phi = kernel_features_backward(taylor_input(plan, k), d_phi) * call.scale**0.5
        place = key_head, piece.start
        dks[place] = dk + d_phi + dks.get(place, 0)
        if piece.last:
            if carried_ref is not None and after_ref is not None:
                crossing = jnp.sum(z_ref[head] * after_ref[head].astype(jnp.float32), keepdims=True)
                carried_ref[head : head + 1] = jnp.broadcast_to(crossing, (1, LANES))
            leaving = scaled(d, pairs.from_state(head)).astype(dtype)
            new = product(features_of(plan, q_rows), leaving, 1, 1)
            z_ref[head] = scaled(z_ref[head], pairs.kept(head)) + new

    pipelined(pieces_of(plan, queries_in_lanes=False), begin, finish, plan.pipeline)
    write_strips(plan, dk_ref, dks)
    write_strips(plan, dv_ref, dvs)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        first_ref[...] = z_ref[...]
