"""The forward pass of chunked linear attention on a TPU.

Source: Qin et al. 2024, Lightning Attention-2 (a state from chunk to chunk), with the scores held
as [keys, queries] and the state as [columns, features].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands, Result
from effattn.pallas_kernels.linear_attention.tpu_chunk import (
    Piece,
    alone_in_lanes,
    features_of,
    pieces_of,
    product,
    read_pairs,
    rows_of,
    scaled,
    shares_lanes,
    taylor_weights,
    window_of,
    with_ones,
    write_strips,
)
from effattn.pallas_kernels.linear_attention.tpu_plan import (
    Blocks,
    Plan,
    compiler_params,
    from_head_rows,
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

NAME = "effattn_linear_forward"


def forward(
    call: LinearAttentionCall, operands: Operands, *, tuning: LinearTuning, interpret: Any = False
) -> Result:
    plan = make_plan(call, tuning)
    blocks = Blocks(plan, reverse=False)
    dtype = jnp.result_type(*operands[:3])
    query, key, value = (x.astype(dtype) for x in operands[:3])
    arrays = [
        pack(plan, query, plan.key_dim),
        pack(plan, key, plan.key_dim),
        pack(plan, value, plan.value_dim),
    ]
    specs = [blocks.keys(), blocks.keys(), blocks.values()]
    for array, spec in blocks.steps(make_steps(plan, operands)):
        arrays.append(array)
        specs.append(spec)
    state_shape = (plan.heads, plan.columns, plan.features * _heads_in_lanes(plan))
    if operands.state is not None:
        arrays.append(_spread(plan, state_in(plan, operands.state).swapaxes(3, 4)))
        specs.append(blocks.state(state_shape))
    arrays = varying_alike(arrays)
    states = (call.batch, plan.groups, *state_shape)
    out_shape = [
        varying_shape(arrays[2].shape, dtype, arrays),
        varying_shape(states, jnp.float32, arrays),
    ]
    out_specs = [blocks.values(), blocks.state(state_shape)]
    if call.normalize:
        rows = (call.batch, plan.groups, plan.rows, plan.length)
        out_shape.append(varying_shape(rows, jnp.float32, arrays))
        out_specs.append(blocks.head_rows())
    results = pl.pallas_call(
        lambda *refs: _body(plan, *refs),
        grid=(call.batch, plan.groups, plan.num_chunks),
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(state_shape, jnp.float32)],
        compiler_params=compiler_params(plan),
        interpret=interpret,
        name=NAME,
    )(*arrays)
    out = unpack(plan, results[0], plan.value_dim, call.value_dim).astype(operands.value.dtype)
    state = state_out(plan, _gathered(plan, results[1]).swapaxes(3, 4))
    if not call.normalize:
        return Result(out, None, state)
    denominator = from_head_rows(plan, results[2])
    if operands.valid is not None:
        denominator = jnp.where(operands.valid[..., None], denominator, 1)
    return Result(out, denominator, state)


def _heads_in_lanes(plan: Plan) -> int:
    """Heads whose states have lanes of their own in one register, as their keys have."""
    shared = shares_lanes(plan.key_dim, plan.key_heads * plan.key_dim)
    return LANES // plan.key_dim if shared and plan.call.feature_map == "identity" else 1


def _spread(plan: Plan, state: jax.Array) -> jax.Array:
    """[..., features] -> each head's features in the lanes of its keys, 0 in the others'."""
    ways = _heads_in_lanes(plan)
    if ways == 1:
        return state
    place = jnp.arange(plan.heads) // plan.repeats % ways
    own = place[:, None] == jnp.arange(ways)
    wide = jnp.where(own[:, None, :, None], state[..., None, :], 0)
    return wide.reshape(*state.shape[:-1], -1)


def _gathered(plan: Plan, state: jax.Array) -> jax.Array:
    """The inverse of `_spread`."""
    return state.reshape(*state.shape[:-1], _heads_in_lanes(plan), plan.features).sum(-2)


def _body(plan: Plan, *refs: Any) -> None:
    call = plan.call
    left = list(refs)
    state_ref = left.pop()
    denominator_ref = left.pop() if call.normalize else None
    final_ref, out_ref = left.pop(), left.pop()
    first_ref = left.pop() if call.has_state else None
    q_ref, k_ref, v_ref, *step_refs = left
    step = pl.program_id(2)
    pairs = read_pairs(plan, step_refs, step)
    taylor = call.feature_map == "taylor"

    @pl.when(step == 0)
    def _() -> None:
        zeros = jnp.zeros_like(state_ref)
        state_ref[...] = zeros if first_ref is None else first_ref[...]

    dtype = v_ref.dtype
    value_rows, queries, keys = v_ref[...].T, q_ref[...], k_ref[...]
    query_rows, key_rows = (queries.T, keys.T) if taylor else (None, None)

    @functools.cache
    def alone(key_head: int) -> jax.Array:
        return alone_in_lanes(keys, key_head, plan.key_dim)

    @functools.cache
    def phi_of_queries(key_head: int) -> jax.Array:
        return features_of(plan, rows_of(query_rows, key_head, plan.key_dim))

    def begin(piece: Piece) -> tuple[jax.Array, jax.Array]:
        """(scores [keys, queries], what the state says [columns, queries])."""
        key_head = piece.head // plan.repeats
        k = alone(key_head)[piece.down]
        q = window_of(queries, key_head, plan.key_dim)[piece.lanes]
        state = state_ref[piece.head].astype(dtype)
        if not taylor:
            return product(k, q, 1, 1), product(state, q, 1, 1)
        phi = phi_of_queries(key_head)[:, piece.lanes]
        return product(k, q, 1, 1), product(state, phi, 1, 0)

    outs: dict[tuple[int, int], jax.Array] = {}

    def finish(piece: Piece, begun: tuple[jax.Array, jax.Array]) -> None:
        scores, sums = begun
        head, key_head = piece.head, piece.head // plan.repeats

        def weights_of(rows: slice, lanes: slice, weigh: Any) -> tuple[jax.Array]:
            block = scores[rows, lanes]
            return (weigh(taylor_weights(plan, block) if taylor else block).astype(dtype),)

        (weights,) = pairs.by_blocks(piece, weights_of, True)
        v = with_ones(plan, rows_of(value_rows, head, plan.value_dim))
        sums = scaled(sums, pairs.from_state(head, piece))
        sums += product(v[:, piece.down], weights, 1, 0)
        if piece.last:
            entering = scaled(v, pairs.to_state(head)).astype(dtype)
            if taylor:
                k = features_of(plan, rows_of(key_rows, key_head, plan.key_dim))
                new = product(entering, k, 1, 1)
            else:
                new = product(entering, alone(key_head), 1, 0)
            state_ref[head] = scaled(state_ref[head], pairs.kept(head)) + new
        if not taylor and call.scale != 1:
            sums = sums * call.scale
        if denominator_ref is not None:
            denominator = sums[plan.value_dim : plan.value_dim + 1] + call.eps
            denominator_ref[head : head + 1, piece.lanes] = denominator
            sums = sums[: plan.value_dim] / denominator
        outs[head, piece.start] = sums

    pipelined(pieces_of(plan, queries_in_lanes=True), begin, finish, plan.pipeline)
    write_strips(plan, out_ref, outs)

    @pl.when(step == pl.num_programs(2) - 1)
    def _() -> None:
        final_ref[...] = state_ref[...]
