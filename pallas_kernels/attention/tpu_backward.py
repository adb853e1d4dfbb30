"""The backward pass of flash attention on a TPU.

One kernel where it fits: key blocks in turn, each with all the query blocks (of all query heads of
its group) that see it. dk and dv stay in VMEM during a key block's visits; dq, transposed, of all
queries of a kv head stays there during the whole list, so that no partial sums go through HBM and
the logits are computed once for all three (five products instead of seven). Where dq does not fit,
a second kernel walks the list by query blocks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.attention.tpu_delta import delta_rows
from effattn.pallas_kernels.attention.tpu_pieces import (
    LOG2_E,
    Piece,
    capped,
    mask_logits,
    product,
    scaled_query,
)
from effattn.pallas_kernels.attention.tpu_plan import (
    Layout,
    Plan,
    Walk,
    compiler_params,
    make_plan,
    make_walk,
    read_places,
    token_operands,
)
from effattn.pallas_kernels.attention.tpu_visits import (
    CODE,
    FIRST,
    HEAD_SHIFT,
    KV_SHIFT,
    LAST,
    Q_BLOCK,
)
from effattn.pallas_kernels.pipeline import pipelined
from effattn.pallas_kernels.tuning import FlashTuning
from effattn.pallas_kernels.varying import varying_shape

NAME = "effattn_flash_backward"


class _Wanted(NamedTuple):
    """Which gradients a kernel computes."""

    dq: bool
    dkv: bool

    @property
    def name(self) -> str:
        return NAME + ("" if self.dq and self.dkv else "_dq" if self.dq else "_dkv")


def backward(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    tuning: FlashTuning,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) in the shapes and dtypes of query, key and value."""
    plan = make_plan(call, tokens, tuning.backward)
    seen = lse > -jnp.inf
    packed = (
        plan.query.pack(query),
        plan.out.pack(dout.astype(query.dtype)),
        plan.key.pack(key),
        plan.value.pack(value),
    )
    delta = delta_rows(plan, plan.out.pack(out), packed[1], vmem=tuning.vmem, interpret=interpret)
    # d lse / d logits are the weights themselves, so dlse joins the softmax's own correction.
    delta -= _rows(plan, jnp.where(seen, dlse, 0))
    lse = jnp.where(seen, lse * LOG2_E, jnp.inf)  # weights exp2(logit - inf) = 0
    rows = _rows(plan, lse), delta
    operands = (packed[0], packed[1], *rows, packed[2], packed[3])

    def run(wanted: _Wanted) -> list[jax.Array]:
        return _call(plan, tokens, operands, wanted, tuning, interpret)

    if _dq_bytes(plan, query.dtype) <= tuning.vmem // 2:
        dq, dk, dv = run(_Wanted(True, True))
    else:
        (dq,) = run(_Wanted(True, False))
        dk, dv = run(_Wanted(False, True))
    return (
        plan.query.unpack(dq, call.q_len, call.head_dim),
        plan.key.unpack(dk, call.kv_len, call.head_dim),
        plan.value.unpack(dv, call.kv_len, call.value_dim),
    )


def _rows(plan: Plan, x: jax.Array) -> jax.Array:
    """[b, t, h] -> [b, h, 1, t] with padded queries at 0: their cotangents are 0 too."""
    x = jnp.pad(x, ((0, 0), (0, plan.query.length - x.shape[1]), (0, 0)))
    return x.swapaxes(1, 2)[:, :, None]


def _dq_bytes(plan: Plan, dtype: Any) -> int:
    """dq of the query heads of one kv head: in float32, and twice as it goes out."""
    elements = plan.call.group * plan.query.length * plan.query.head_dim
    return elements * (4 + 2 * jnp.dtype(dtype).itemsize)


def _whole_spec(plan: Plan, layout: Layout) -> pl.BlockSpec:
    """All queries of all query heads of a kv head."""
    group, length, width = plan.call.group, layout.length, layout.head_dim
    if layout.in_columns:
        return pl.BlockSpec((None, length, group * width), lambda b, h, t, *_: (b, 0, h))
    return pl.BlockSpec((None, group, length, width), lambda b, h, t, *_: (b, h, 0, 0))


def _call(
    plan: Plan,
    tokens: Tokens,
    operands: tuple[jax.Array, ...],
    wanted: _Wanted,
    tuning: FlashTuning,
    interpret: Any,
) -> list[jax.Array]:
    call, sizes = plan.call, plan.sizes
    walk = make_walk(plan, keys_first=wanted.dkv)
    operands_of_tokens = token_operands(plan, tokens)
    token_arrays = [array for array, _, _ in operands_of_tokens]
    group = call.group if wanted.dkv else 1  # query heads under one head of the grid

    def block(batch: Any, head: Any, step: Any, *words: Any) -> tuple[Any, ...]:
        entry = walk.entry(batch, head, step)
        place = words[0][entry]
        q_head = head
        if group > 1:
            q_head = head * group + (words[1][entry] >> HEAD_SHIFT)
        return batch, q_head, place & Q_BLOCK, place >> KV_SHIFT

    def q_block(*grid: Any) -> tuple[Any, ...]:
        batch, head, i, _ = block(*grid)
        return batch, head, i

    def kv_block(*grid: Any) -> tuple[Any, ...]:
        batch, head, _, j = block(*grid)
        return batch, head // call.group, j

    def row_block(*grid: Any) -> tuple[Any, ...]:
        batch, head, i, _ = block(*grid)
        return batch, head, 0, i

    def of_tokens(index: Any) -> Any:
        def with_grid(*grid: Any) -> tuple[Any, ...]:
            batch, _, i, j = block(*grid)
            return index(batch, i, j)

        return with_grid

    num_q = plan.query.length // sizes.q
    row = pl.BlockSpec((None, None, 1, sizes.q), row_block)
    key, value = plan.key.spec(sizes.kv, kv_block), plan.value.spec(sizes.kv, kv_block)
    fused = wanted.dq and wanted.dkv
    out_specs, out_shapes, scratch = [], [], []
    if wanted.dq:
        out_specs.append(
            _whole_spec(plan, plan.query) if fused else plan.query.spec(sizes.q, q_block)
        )
        out_shapes.append(plan.query.shape(call.batch, call.num_heads))
        blocks = call.group * num_q if fused else 1
        scratch.append(pltpu.VMEM((blocks, plan.query.head_dim, sizes.q), jnp.float32))
        scratch.append(pltpu.VMEM((plan.key.head_dim, sizes.kv), operands[4].dtype))
    if wanted.dkv:
        out_specs += [key, value]
        out_shapes += [x.shape(call.batch, call.num_kv_heads) for x in (plan.key, plan.value)]
        scratch += [pltpu.VMEM((sizes.kv, x.head_dim), jnp.float32) for x in (plan.key, plan.value)]
    return pl.pallas_call(
        lambda *refs: _body(plan, walk, wanted, group, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(call.batch, call.num_heads // group, walk.length),
            in_specs=[
                plan.query.spec(sizes.q, q_block),
                plan.out.spec(sizes.q, q_block),
                row,
                row,
                key,
                value,
                *(
                    pl.BlockSpec(spec.block_shape, of_tokens(spec.index_map))
                    for _, spec, _ in operands_of_tokens
                ),
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[
            varying_shape(shape, operands[0].dtype, (*operands, *token_arrays))
            for shape in out_shapes
        ],
        compiler_params=compiler_params(2, tuning.vmem),
        interpret=interpret,
        name=wanted.name,
    )(*walk.words, *operands, *token_arrays)


def _body(
    plan: Plan,
    walk: Walk,
    wanted: _Wanted,
    group: int,
    places_ref: Any,
    infos_ref: Any,
    q_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
) -> None:
    call, sizes = plan.call, plan.sizes
    left = list(refs)
    scratch = [left.pop() for _ in range(2 * (wanted.dq + wanted.dkv))][::-1]
    outs = [left.pop() for _ in range(wanted.dq + 2 * wanted.dkv)][::-1]
    token_refs = left
    fused = wanted.dq and wanted.dkv
    num_q = plan.query.length // sizes.q

    step = pl.program_id(2)
    entry = walk.entry(pl.program_id(0), pl.program_id(1), step)
    place, info = places_ref[entry], infos_ref[entry]
    i, j = place & Q_BLOCK, place >> KV_SHIFT
    places = read_places(plan, token_refs, i, [j], 1)
    slot = (info >> HEAD_SHIFT) * num_q + i if fused else 0  # of dq's sums

    if wanted.dq:
        dq_ref, dq_sum_ref, key_columns_ref = outs[0], scratch[0], scratch[1]

        @pl.when(step == 0 if fused else (info & FIRST) != 0)
        def _() -> None:
            dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

        def turn_keys() -> None:
            key_columns_ref[...] = k_ref[...].T

        # By key blocks they stay; by query blocks every step brings others.
        if fused:
            pl.when((info & FIRST) != 0)(turn_keys)
        else:
            turn_keys()

    if wanted.dkv:
        dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = *outs[-2:], *scratch[-2:]

        @pl.when((info & FIRST) != 0)
        def _() -> None:
            dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
            dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def begin(piece: Piece) -> tuple[jax.Array, jax.Array]:
        keys, queries = pl.ds(piece.kv, piece.kv_size), pl.ds(piece.q, piece.q_size)
        query = scaled_query(call, q_ref[queries, :])
        return (
            product(k_ref[keys, :], query, 1, 1),
            product(v_ref[keys, :], dout_ref[queries, :], 1, 1),
        )

    def finish(piece: Piece, begun: tuple[jax.Array, jax.Array]) -> None:
        keys, queries = pl.ds(piece.kv, piece.kv_size), pl.ds(piece.q, piece.q_size)
        logits, dweights = begun
        logits, slope = capped(call, logits)
        logits = mask_logits(call, logits, piece, places)
        weights = jnp.exp2(logits - lse_ref[:, queries])
        dlogits = weights * (dweights - delta_ref[:, queries])
        if slope is not None:
            dlogits *= slope
        dlogits = dlogits.astype(q_ref.dtype)
        if wanted.dkv:
            dout = dout_ref[queries, :]
            dv_sum_ref[keys, :] += product(weights.astype(dout.dtype), dout, 1, 0)
            dk_sum_ref[keys, :] += product(dlogits, q_ref[queries, :], 1, 0)
        if wanted.dq:
            dq_sum_ref[slot, :, queries] += product(key_columns_ref[:, keys], dlogits, 1, 0)

    for code, pieces in plan.variants:

        @pl.when((info & CODE) == code)
        def _(pieces: Any = pieces) -> None:
            pipelined(pieces, begin, finish, plan.tiles.pipeline)

    if wanted.dkv:

        @pl.when((info & LAST) != 0)
        def _() -> None:
            dk_ref[...] = (dk_sum_ref[...] * call.scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    if wanted.dq:

        @pl.when(step == walk.length - 1 if fused else (info & LAST) != 0)
        def finish_dq() -> None:
            if not fused:
                dq_ref[...] = (dq_sum_ref[0] * call.scale).T.astype(dq_ref.dtype)
                return
            for head in range(group):

                def write(at: Any, _: None, head: int = head) -> None:
                    rows = pl.ds(pl.multiple_of(at * sizes.q, sizes.q), sizes.q)
                    values = (dq_sum_ref[head * num_q + at] * call.scale).T.astype(dq_ref.dtype)
                    if plan.query.in_columns:
                        width = plan.query.head_dim
                        dq_ref[rows, head * width : (head + 1) * width] = values
                    else:
                        dq_ref[head, rows, :] = values

                lax.fori_loop(0, num_q, write, None)
