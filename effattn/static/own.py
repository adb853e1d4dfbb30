"""Our own TPU kernels as cases: the table that `effattn bench --static` compiles and checks."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSelection, BlockSizes
from effattn.masks import FULL, Full, Mask, Neighborhood
from effattn.pallas_kernels.attention.tpu_visits import SKIP
from effattn.static.cases import (
    CAUSAL,
    HEAD_DIM,
    NUM_HEADS,
    SEQ_LEN,
    WINDOW,
    Case,
    Problem,
    bf16,
    matmul_flops,
    with_gradients,
)
from effattn.static.chips import Chip
from effattn.static.estimate import Counts


def matmul(chip: Chip, *, size: int = 1024, steps: int = 8) -> Problem:
    """A resident matrix product, `steps` times: the part of the peak that can be had at all."""
    from jax.experimental import pallas as pl

    def body(left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        product = jnp.dot(left_ref[...], right_ref[...], preferred_element_type=jnp.float32)
        out_ref[...] = product.astype(out_ref.dtype)

    block = pl.BlockSpec((size, size), lambda step: (0, 0))
    array = bf16(size, size)
    fn = pl.pallas_call(
        body,
        out_shape=array,
        grid=(steps,),
        in_specs=[block, block],
        out_specs=block,
        name="effattn_calibration_matmul",
    )
    flops = 2.0 * size**3 * steps
    return Problem(fn, (array, array), flops, {"calibration": Counts(steps, flops=flops)})


def flash(
    chip: Chip,
    *,
    mask: Mask,
    backward: bool,
    seq_len: int = SEQ_LEN,
    num_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
    q: int | None = None,
    kv: int | None = None,
) -> Problem:
    """Our TPU kernels through `attention`; q, kv: block sizes of both passes, tuned where None.

    The arrays come and go as [batch, seq_len, num_heads * head_dim], as a model's projections make
    and take them, where the rivals get the [num_heads, seq_len, head_dim] of their own: neither
    side pays for the layout of a program's border.
    """
    from effattn.pallas_kernels.attention.api import attention
    from effattn.pallas_kernels.attention.call import check_arrays, check_tokens, describe
    from effattn.pallas_kernels.attention.tpu_plan import make_plan
    from effattn.pallas_kernels.tuning import flash_tuning

    if (q is None) != (kv is None):
        raise ValueError("q, kv: expected both or none")
    sizes = None if q is None or kv is None else BlockSizes(q, kv)
    shape, flat = bf16(1, seq_len, num_heads, head_dim), bf16(1, seq_len, num_heads * head_dim)

    def forward(*arrays: jax.Array) -> jax.Array:
        heads = [x.reshape(shape.shape) for x in arrays]
        out = attention(*heads, mask=mask, implementation="tpu", block_sizes=sizes)
        return out.reshape(flat.shape)

    tokens = check_tokens(check_arrays(shape, shape, shape), None, None, None, None, None)
    call, traced = describe(
        shape, shape, shape, mask, tokens, scale=None, logit_soft_cap=None, block_sizes=sizes
    )
    tuning, tokens = flash_tuning(chip.device_kind), call.with_positions(traced)
    ahead = make_plan(call, tokens, tuning.forward)
    back = make_plan(call, tokens, tuning.backward)
    one = matmul_flops(mask, seq_len, num_heads, head_dim)
    return Problem(
        with_gradients(forward) if backward else forward,
        (flat, flat, flat),
        (7 if backward else 2) * one,
        {
            "flash_forward": visit_counts(ahead, keys_first=False, flops=2 * one),
            "flash_backward_dkv": visit_counts(back, keys_first=True, flops=4 * one),
            "flash_backward_dq": visit_counts(back, keys_first=False, flops=3 * one),
            "flash_backward": visit_counts(back, keys_first=True, flops=5 * one),
            "flash_delta": Counts(num_heads * back.query.length // back.sizes.q),
        },
    )


def sparse(
    chip: Chip,
    *,
    q: int,
    kv: int,
    density: float = 0.1,
    seq_len: int = 16384,
    num_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
) -> Problem:
    """The forward kernel over a list that is built at run time: `density` of the key blocks for
    every query block, all of them whole. Density 1 is the dense kernel at these blocks."""
    from effattn.pallas_kernels.attention.api import attention
    from effattn.pallas_kernels.tuning import flash_tuning

    shape, flat = bf16(1, seq_len, num_heads, head_dim), bf16(1, seq_len, num_heads * head_dim)
    num_q, num_kv = BlockSizes(q, kv).count(seq_len, seq_len)
    visited = round(density * num_kv)
    table = jax.ShapeDtypeStruct((1, num_heads, num_q, visited), jnp.int32)
    count = jax.ShapeDtypeStruct((1, num_heads, num_q), jnp.int32)

    def forward(kv_blocks: Any, counts: Any, *arrays: jax.Array) -> jax.Array:
        heads = [x.reshape(shape.shape) for x in arrays]
        blocks = BlockSelection(q, kv, kv_blocks, jnp.full(table.shape, FULL, jnp.int32), counts)
        out = attention(*heads, mask=Full(), blocks=blocks, implementation="tpu")
        return out.reshape(flat.shape)

    tiles = flash_tuning(chip.device_kind).forward
    fan = tiles.gathered // kv if kv < tiles.piece else 1
    steps = num_heads * num_q * -(-visited // fan)
    flops = 4.0 * num_heads * num_q * visited * q * kv * head_dim
    # In program order: whole blocks, masked ones.
    counts = Counts(steps, hot=(steps, 0), outer=num_heads * num_q, flops=flops)
    shapes = (table, count, flat, flat, flat)
    return Problem(forward, shapes, flops, {"flash_forward": counts})


def neighborhood(
    chip: Chip,
    *,
    axes: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...],
    tile: tuple[int, ...],
    num_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
) -> Problem:
    """The forward kernel under `neighborhood_attention`; XLA's work is the permutation of tokens.

    Useful FLOP are those of the visited tiles, so that its fraction of the matrix units compares
    with the dense kernel's at blocks of the same size.
    """
    from effattn.pallas_kernels.attention import neighborhood_attention
    from effattn.pallas_kernels.attention.call import check_arrays, check_tokens, describe
    from effattn.pallas_kernels.attention.tiles import Tiling
    from effattn.pallas_kernels.attention.tpu_plan import make_plan
    from effattn.pallas_kernels.tuning import flash_tuning

    ones = (1,) * len(axes)
    mask = Neighborhood(axes, window, stride, ones, (False,) * len(axes))
    tiling = Tiling(axes, tile, ones)
    sizes = BlockSizes(tiling.tokens_per_tile, tiling.tokens_per_tile)
    slots = bf16(1, tiling.num_slots, num_heads, head_dim)
    positions = tiling.q_positions(), tiling.kv_positions()
    tokens = check_tokens(check_arrays(slots, slots, slots), *positions, None, None, None)
    call, traced = describe(
        slots, slots, slots, mask, tokens, scale=None, logit_soft_cap=None, block_sizes=sizes
    )
    tiles = flash_tuning(chip.device_kind).forward
    plan = make_plan(call, call.with_positions(traced), tiles)
    visited = int((np.asarray(plan.codes.codes) != SKIP).sum())
    flops = 4.0 * num_heads * head_dim * visited * sizes.q * sizes.kv

    def forward(*arrays: jax.Array) -> jax.Array:
        return neighborhood_attention(
            *arrays, window=window, stride=stride, tile=tile, implementation="tpu"
        )

    shape = bf16(1, *axes, num_heads, head_dim)
    counts = visit_counts(plan, keys_first=False, flops=flops)
    return Problem(forward, (shape,) * 3, flops, {"flash_forward": counts})


def visit_counts(plan: Any, *, keys_first: bool, flops: float) -> Counts:
    """Counts of a flash kernel from the list of blocks that its grid walks."""
    from effattn.pallas_kernels.attention.tpu_visits import CODE, FIRST, visits

    call = plan.call
    listed = visits(
        plan.codes, keys_first=keys_first, num_kv_heads=call.num_kv_heads, group=call.group
    )
    infos = np.asarray(listed.infos)
    num_heads = call.num_kv_heads if keys_first else call.num_heads
    walks = call.batch * num_heads
    each = walks / (infos.shape[0] * infos.shape[1])  # walks of one list
    return Counts(
        walks * infos.shape[2],
        hot=tuple(each * int(((infos & CODE) == code).sum()) for code, _ in plan.variants),
        outer=each * int(((infos & FIRST) != 0).sum()),
        # The first and the last step of a walk set up and write dq of all queries.
        rare={"ne 0": walks, f"ne {infos.shape[2] - 1}": walks},
        flops=flops,
    )


def decode(
    chip: Chip,
    *,
    batch: int = 8,
    cache_len: int = 16384,
    num_heads: int = 32,
    num_kv_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
) -> Problem:
    """The kernel of `decode_attention` over a full cache, without the tables that XLA builds.

    The evaluator fails on XLA's own work for v5e. One split: it walks one core, the second of a
    v5p's two is idle.
    """
    from effattn.pallas_kernels.attention.decode_call import DecodeCall
    from effattn.pallas_kernels.attention.decode_kernel import decode_kernel
    from effattn.pallas_kernels.attention.decode_tpu import sizes_of

    bfloat16, float32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    call = DecodeCall(
        batch=batch,
        q_len=1,
        cache_len=cache_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        query_dtype=bfloat16,
        key_dtype=bfloat16,
        value_dtype=bfloat16,
        accumulator=float32,
        mask=CAUSAL,
        scale=head_dim**-0.5,
        logit_soft_cap=None,
        has_kv_positions=False,
        num_splits=1,
    )
    sizes = sizes_of(call)
    if sizes is None:
        raise ValueError(f"cache_len: got {cache_len}, too short for the kernel")
    blocks = batch * sizes.num_blocks

    def run(starts, items, partial_items, unused, query, q_positions, key, value):
        tables = (starts, items, partial_items, unused)
        return decode_kernel(call, sizes, *tables, query, q_positions, None, key, value)

    cache = bf16(batch, cache_len * num_kv_heads, head_dim)
    shapes = (
        *(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (batch + 1, blocks, blocks, batch)),
        bf16(batch, sizes.rows, head_dim),
        jax.ShapeDtypeStruct((batch, sizes.rows, 1), jnp.int32),
        cache,
        cache,
    )
    flops = 4.0 * batch * cache_len * num_heads * head_dim
    counts = Counts(
        batch,
        hot=(blocks, 0),
        # The loop over a row's blocks stands behind a test that there are any: both are counted
        # once per block.
        trips=(1,),
        flops=flops,
        hbm_bytes=4.0 * batch * cache_len * num_kv_heads * head_dim,
    )
    return Problem(run, shapes, flops, {"effattn_decode": counts})


def linear(
    chip: Chip,
    *,
    backward: bool,
    key_dim: int = HEAD_DIM,
    value_dim: int = HEAD_DIM,
    decay: str = "none",
    feature_map: str = "identity",
    seq_len: int = SEQ_LEN,
    num_heads: int = NUM_HEADS,
    chunk: int | None = None,
) -> Problem:
    """The kernels of `linear_attention`, arrays as a model's projections make them.

    decay: "none", "head" or "token". Taylor features come with their denominator. Useful FLOP are
    those of chunks of this size, two per multiply-add: scores up to the diagonal and the state.
    """
    from effattn.pallas_kernels.linear_attention import linear_attention
    from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall
    from effattn.pallas_kernels.linear_attention.features import num_features
    from effattn.pallas_kernels.linear_attention.tpu_plan import make_plan
    from effattn.pallas_kernels.tuning import linear_tuning

    taylor = feature_map == "taylor"
    call = LinearAttentionCall(
        batch=1, seq_len=seq_len, num_key_heads=num_heads, num_heads=num_heads, key_dim=key_dim,
        value_dim=value_dim, dtype="bfloat16", state_dtype="float32", feature_map=feature_map,
        normalize=taylor, eps=0.0, scale=1.0, decay=decay, segmented=False, has_state=False,
        chunk_size=chunk,
    )  # fmt: skip
    plan = make_plan(call, linear_tuning(chip.device_kind))
    keys, values = num_heads * key_dim, num_heads * value_dim
    decays = {"head": (num_heads,), "token": (1, seq_len, num_heads)}

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, *rest: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(1, seq_len, num_heads, -1) for x in (query, key, value))
        out, _ = linear_attention(
            q, k, v, log_decay=rest[0] if rest else None, feature_map=feature_map,
            normalize=taylor, chunk_size=chunk, implementation="tpu",
        )  # fmt: skip
        return out.reshape(value.shape)

    shapes = [bf16(1, seq_len, keys), bf16(1, seq_len, keys), bf16(1, seq_len, values)]
    if decay in decays:
        shapes.append(jax.ShapeDtypeStruct(decays[decay], jnp.float32))
    tokens, features = num_heads * seq_len, num_features(feature_map, key_dim)
    inside, state = plan.chunk * (key_dim + value_dim), 4.0 * features * value_dim
    rows = 4.0 * tokens * (1 + taylor if decay == "none" else 2)
    steps = plan.groups * plan.num_chunks

    def counts(products: float, key_arrays: int, value_arrays: int) -> Counts:
        return Counts(
            steps,
            flops=products * tokens * (inside + state),
            hbm_bytes=2.0 * seq_len * (key_arrays * keys + value_arrays * values) + rows,
        )

    return Problem(
        with_gradients(forward) if backward else forward,
        tuple(shapes),
        (3 if backward else 1) * tokens * (inside + state),
        {
            "linear_forward": counts(1, 2, 2),
            # k, v, d_out and, for its features, q come in, dq goes out.
            "linear_backward_dq": counts(1, 3 if taylor else 2, 2),
            "linear_backward_dkv": counts(1.75, 3, 3),
        },
    )


CASES = (
    Case("calibration matmul", matmul, walk=True),
    Case("flash, causal, forward", partial(flash, mask=CAUSAL, backward=False)),
    Case("flash, causal, forward and backward", partial(flash, mask=CAUSAL, backward=True)),
    Case("flash, full, forward", partial(flash, mask=Full(), backward=False)),
    Case("flash, window 1024, forward", partial(flash, mask=WINDOW, backward=False)),
    Case("flash, window 1024, forward and backward", partial(flash, mask=WINDOW, backward=True)),
    Case("sparse, blocks of 512, density 1", partial(sparse, q=512, kv=512, density=1.0)),
    Case("sparse, blocks of 512, density 0.1", partial(sparse, q=512, kv=512)),
    Case("sparse, key blocks of 128, density 0.1", partial(sparse, q=512, kv=128)),
    Case("sparse, blocks of 128, density 0.1", partial(sparse, q=128, kv=128)),
    Case(
        "neighborhood 64 x 64, window 16 x 16, forward",
        partial(neighborhood, axes=(64, 64), window=(16, 16), stride=(1, 1), tile=(16, 32)),
    ),
    Case(
        "neighborhood 128 x 128, window and stride 64 x 64, forward",
        partial(neighborhood, axes=(128, 128), window=(64, 64), stride=(64, 64), tile=(16, 32)),
    ),
    Case(
        "neighborhood 16 x 32 x 32, window and stride 8 x 16 x 16, forward",
        partial(
            neighborhood, axes=(16, 32, 32), window=(8, 16, 16), stride=(8, 16, 16), tile=(4, 8, 16)
        ),
    ),
    Case("decode, cache 16384", decode, walk=True),
    Case("linear attention, 128, decay per head", partial(linear, backward=True, decay="head")),
    Case("linear attention, 128, decay per token", partial(linear, backward=True, decay="token")),
    Case(
        "linear attention, 64, decay per head",
        partial(linear, backward=True, key_dim=64, value_dim=64, num_heads=16, decay="head"),
    ),
    Case(
        "linear attention, Taylor 16",
        partial(
            linear, backward=True, key_dim=16, value_dim=64, num_heads=16, feature_map="taylor"
        ),
    ),
)
