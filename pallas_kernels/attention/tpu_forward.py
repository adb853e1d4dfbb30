"""The forward pass of flash attention on a TPU (Dao et al. 2022; a list of blocks for a grid).

One grid step is one block of one query head. The running maximum, the running sum and the
transposed output [value_dim, queries] stay in VMEM from a query block's first visit to its last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.attention.tpu_gather import gather, gather_scratch, gather_specs
from effattn.pallas_kernels.attention.tpu_pieces import (
    LOG2_E,
    MASKED_LOGIT,
    Piece,
    capped,
    mask_logits,
    product,
    scaled_query,
)
from effattn.pallas_kernels.attention.tpu_plan import (
    Plan,
    Walk,
    compiler_params,
    make_plan,
    make_walk,
    read_places,
    rows_of,
    token_operands,
)
from effattn.pallas_kernels.attention.tpu_visits import CODE, FIRST, LAST, PRESENT_SHIFT, Q_BLOCK
from effattn.pallas_kernels.pipeline import pipelined
from effattn.pallas_kernels.tuning import FlashTuning
from effattn.pallas_kernels.varying import varying_shape

NAME = "effattn_flash_forward"
_CHUNK = 256  # queries transposed at a time: a whole block would not fit the registers


def forward(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    *,
    tuning: FlashTuning,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """(out [b, t, h, e], lse [b, t, h] float32)."""
    plan = make_plan(call, tokens, tuning.forward, gather=True)
    walk = make_walk(plan, keys_first=False)
    q, k, v = plan.query.pack(query), plan.key.pack(key), plan.value.pack(value)
    slots = range(plan.fan)

    def q_block(batch: Any, head: Any, step: Any, *words: Any) -> tuple[Any, ...]:
        return batch, head, words[0][walk.entry(batch, head, step)] & Q_BLOCK

    def kv_block(slot: int) -> Any:
        def index(batch: Any, head: Any, step: Any, *words: Any) -> tuple[Any, ...]:
            block = walk.kv_block(words, walk.entry(batch, head, step), slot)
            return batch, head // call.group if call.group > 1 else head, block

        return index

    def lse_block(*grid: Any) -> tuple[Any, ...]:
        batch, head, i = q_block(*grid)
        return batch, head, 0, i

    token_arrays, token_specs = [], []
    for array, spec, of_keys in token_operands(plan, tokens):
        for slot in slots if of_keys else range(1):

            def index(*grid: Any, spec: Any = spec, slot: int = slot) -> tuple[Any, ...]:
                batch, _, i = q_block(*grid)
                return spec.index_map(batch, i, kv_block(slot)(*grid)[2])

            token_arrays.append(array)
            token_specs.append(pl.BlockSpec(spec.block_shape, index))
    sizes, out = plan.sizes, plan.out
    row = (1, sizes.q)
    operands = (q, k, v, *token_arrays)
    kv_specs = [plan.key.spec(sizes.kv, kv_block(0)), plan.value.spec(sizes.kv, kv_block(0))]
    if plan.fan > 1:
        kv_specs = gather_specs()
    result, lse = pl.pallas_call(
        lambda *refs: _body(plan, walk, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(walk.words),
            grid=(call.batch, call.num_heads, walk.length),
            in_specs=[
                plan.query.spec(sizes.q, q_block),
                *kv_specs,
                *token_specs,
            ],
            out_specs=[out.spec(sizes.q, q_block), pl.BlockSpec((None, None, *row), lse_block)],
            scratch_shapes=[
                pltpu.VMEM(row, jnp.float32),
                pltpu.VMEM(row, jnp.float32),
                pltpu.VMEM((out.head_dim, sizes.q), jnp.float32),
                pltpu.VMEM((sizes.q, plan.query.head_dim), query.dtype),
                *(gather_scratch(plan, key.dtype) if plan.fan > 1 else ()),
            ],
        ),
        out_shape=[
            varying_shape(out.shape(call.batch, call.num_heads), query.dtype, operands),
            varying_shape(
                (call.batch, call.num_heads, 1, plan.query.length), jnp.float32, operands
            ),
        ],
        compiler_params=compiler_params(2, tuning.vmem),
        interpret=interpret,
        name=NAME,
    )(*walk.words, *operands)
    return (
        out.unpack(result, call.q_len, call.value_dim),
        lse[:, :, 0, : call.q_len].swapaxes(1, 2),
    )


def _body(plan: Plan, walk: Walk, *refs: Any) -> None:
    words = refs[: len(walk.words)]
    q_ref, k_ref, v_ref, *others = refs[len(walk.words) :]
    if plan.fan > 1:
        others, buffer_refs = others[:-3], others[-3:]
        keys_of, values_of = gather(plan, walk, words, (k_ref, v_ref), buffer_refs)
    else:
        keys_of, values_of = rows_of(k_ref), rows_of(v_ref)
    *token_refs, out_ref, lse_ref, top_ref, sum_ref, sums_ref, scaled_ref = others
    call = plan.call
    entry = walk.entry(*(pl.program_id(axis) for axis in range(3)))
    info = words[1][entry]
    kv_blocks = [walk.kv_block(words, entry, slot) for slot in range(plan.fan)]
    places = read_places(
        plan, token_refs, words[0][entry] & Q_BLOCK, kv_blocks, info >> PRESENT_SHIFT
    )

    @pl.when((info & FIRST) != 0)
    def _() -> None:
        top_ref[...] = jnp.full_like(top_ref, MASKED_LOGIT)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        scaled_ref[...] = scaled_query(call, q_ref[...])

    def begin(piece: Piece) -> jax.Array:
        queries = pl.ds(piece.q, piece.q_size)
        return product(keys_of(piece.kv, piece.kv_size), scaled_ref[queries, :], 1, 1)

    def finish(piece: Piece, logits: jax.Array) -> None:
        queries = pl.ds(piece.q, piece.q_size)
        logits = mask_logits(call, capped(call, logits)[0], piece, places)
        old_top = top_ref[:, queries]
        top = jnp.maximum(old_top, logits.max(0, keepdims=True))
        shrink = jnp.exp2(old_top - top)
        weights = jnp.exp2(logits - top)
        sum_ref[:, queries] = sum_ref[:, queries] * shrink + weights.sum(0, keepdims=True)
        top_ref[:, queries] = top
        value = values_of(piece.kv, piece.kv_size)
        new = product(value, weights.astype(value.dtype), 0, 0)
        sums_ref[:, queries] = sums_ref[:, queries] * shrink + new

    for code, pieces in plan.variants:

        @pl.when((info & CODE) == code)
        def _(pieces: Any = pieces) -> None:
            pipelined(pieces, begin, finish, plan.tiles.pipeline)

    @pl.when((info & LAST) != 0)
    def _() -> None:
        # A query that met no allowed key has kept its first maximum, and sums of no meaning.
        seen = top_ref[...] > MASKED_LOGIT
        total = jnp.where(seen, sum_ref[...], 1)
        lse_ref[...] = jnp.where(seen, (top_ref[...] + jnp.log2(total)) / LOG2_E, -jnp.inf)
        scale = jnp.where(seen, 1 / total, 0)
        for at in range(0, plan.sizes.q, _CHUNK):
            chunk = pl.ds(at, min(_CHUNK, plan.sizes.q - at))
            rows = (sums_ref[:, chunk] * scale[:, at : at + chunk.size]).T
            out_ref[chunk, :] = rows.astype(out_ref.dtype)
