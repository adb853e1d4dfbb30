"""The TPU kernel of decode attention: one stream of cache blocks, copied ahead, over all rows.

grid = (split, row). The blocks that the rows need stand in one list; a split takes an equal share
of it, wherever rows end. Copies run DEPTH blocks ahead and across rows, so a short row costs no
pause. Every row of every split leaves its part: lse is -inf where a split had none of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.attention.decode_call import DecodeCall
from effattn.pallas_kernels.attention.decode_tpu import DEPTH, DecodeSizes


def decode_kernel(
    call: DecodeCall,
    sizes: DecodeSizes,
    starts: jax.Array,
    items: jax.Array,
    partial_items: jax.Array,
    unused: jax.Array,
    query: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array | None,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(out [splits, batch, rows, value_dim], lse [splits, batch, rows, 1]), both float32.

    starts, items, partial_items: see `decode_tpu._tables`. unused: [batch], slots without a token.
    query: [batch, rows, head_dim]; row r is query head r % num_heads. q_positions: [batch, rows,
    1]. kv_positions: None or [batch | 1, blocks, 1, columns]. key, value: [batch, cache_len *
    num_kv_heads, ...], with any number of slots past sizes.held.
    """
    rows, columns = sizes.rows, sizes.block * call.num_kv_heads
    column = np.arange(columns, dtype=np.int32)[None]
    column_slot, column_head = column // call.num_kv_heads, column % call.num_kv_heads
    row_head = np.arange(rows, dtype=np.int32)[:, None] % call.num_heads // call.group
    positions = () if kv_positions is None else (kv_positions,)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    buffers = [
        pltpu.VMEM((DEPTH, columns, call.head_dim), key.dtype),
        pltpu.VMEM((DEPTH, columns, call.value_dim), value.dtype),
        *(pltpu.VMEM((DEPTH, 1, columns), jnp.int32) for _ in positions),
    ]
    return pl.pallas_call(
        _Kernel(call, sizes),
        out_shape=[
            jax.ShapeDtypeStruct((sizes.splits, call.batch, rows, width), jnp.float32)
            for width in (call.value_dim, 1)
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(sizes.splits, call.batch),
            in_specs=[
                pl.BlockSpec((None, rows, call.head_dim), lambda split, row, *_: (row, 0, 0)),
                pl.BlockSpec((None, rows, 1), lambda split, row, *_: (row, 0, 0)),
                whole(1, columns),  # column_slot
                whole(1, columns),  # column_head
                whole(rows, 1),  # row_head
                in_hbm,  # key
                in_hbm,  # value
                *(in_hbm for _ in positions),
            ],
            out_specs=[
                pl.BlockSpec((None, None, rows, width), lambda split, row, *_: (split, row, 0, 0))
                for width in (call.value_dim, 1)
            ],
            scratch_shapes=[
                pltpu.VMEM((rows, call.value_dim), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.VMEM((rows, 1), jnp.float32),
                pltpu.SemaphoreType.DMA((DEPTH, len(buffers))),
                *buffers,
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(call, sizes),
        ),
        name="effattn_decode",
    )(
        starts,
        items,
        partial_items,
        unused,
        query,
        q_positions,
        column_slot,
        column_head,
        row_head,
        key,
        value,
        *positions,
    )


def vmem_bytes(call: DecodeCall, sizes: DecodeSizes) -> int:
    """Buffers, and logits with their temporaries; never below the compiler's own default."""
    columns, lanes = sizes.block * call.num_kv_heads, 128
    widths = [-(-dim // lanes) * lanes for dim in (call.head_dim, call.value_dim)]
    sizes_of_items = (call.key_dtype.itemsize, call.value_dtype.itemsize)
    blocks = sum(columns * w * size for w, size in zip(widths, sizes_of_items, strict=True))
    logits = 6 * sizes.rows * columns * 4
    return max(16 * 2**20, DEPTH * blocks + 2 * blocks + logits + 2**22)


class _Kernel:
    """The kernel's body, with what it knows before it runs."""

    def __init__(self, call: DecodeCall, sizes: DecodeSizes) -> None:
        self.call, self.sizes = call, sizes
        self.__name__ = "decode_kernel"

    def __call__(
        self,
        starts_ref: Any,
        items_ref: Any,
        partial_ref: Any,
        unused_ref: Any,
        query_ref: Any,
        q_positions_ref: Any,
        column_slot_ref: Any,
        column_head_ref: Any,
        row_head_ref: Any,
        key_ref: Any,
        value_ref: Any,
        *refs: Any,
    ) -> None:
        call, sizes = self.call, self.sizes
        positions_ref, refs = (refs[0], refs[1:]) if call.has_kv_positions else (None, refs)
        out_ref, lse_ref, sum_ref, top_ref, total_ref, done, key_buf, value_buf, *rest = refs
        positions_buf = rest[0] if rest else None
        split, row = pl.program_id(0), pl.program_id(1)
        heads, block, blocks = call.num_kv_heads, sizes.block, sizes.num_blocks
        stride_bits = (blocks - 1).bit_length()

        def start_of(row: Any) -> Any:
            return starts_ref[row] + row * blocks

        total_items = start_of(call.batch)
        first_item = split * total_items // sizes.splits
        last_item = (split + 1) * total_items // sizes.splits

        def place(item: Any) -> tuple[Any, Any]:
            """(row, block) of an item."""
            number = items_ref[item] + item
            return number >> stride_bits, number & ((1 << stride_bits) - 1)

        def first_slot(block_index: Any) -> Any:
            return jnp.minimum(block_index * block, sizes.held - block)

        def copies(item: Any) -> list[Any]:
            row, block_index = place(item)
            slot = (item - first_item) % DEPTH
            start = pl.multiple_of(first_slot(block_index) * heads, 8)
            cut = pl.ds(start, block * heads)
            pairs = [(key_ref.at[row, cut], key_buf), (value_ref.at[row, cut], value_buf)]
            if positions_ref is not None:
                shared = positions_ref.shape[0] == 1
                pairs.append((positions_ref.at[0 if shared else row, block_index], positions_buf))
            return [
                pltpu.make_async_copy(source, buffer.at[slot], done.at[slot, i])
                for i, (source, buffer) in enumerate(pairs)
            ]

        def prefetch(item: Any) -> None:
            @pl.when(item < last_item)
            def _() -> None:
                for copy in copies(item):
                    copy.start()

        @pl.when(row == 0)
        def _() -> None:
            for ahead in range(DEPTH - 1):
                prefetch(first_item + ahead)

        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)

        def visit(item: Any, masked: bool) -> None:
            slot = (item - first_item) % DEPTH
            logits = jax.lax.dot_general(
                query_ref[...],
                key_buf[slot],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            logits = logits * call.scale
            if call.logit_soft_cap is not None:
                logits = call.logit_soft_cap * jnp.tanh(logits / call.logit_soft_cap)
            shape = logits.shape
            allowed = None
            if heads > 1:
                row_head = jnp.broadcast_to(row_head_ref[...], shape)
                allowed = row_head == jnp.broadcast_to(column_head_ref[...], shape)
            if masked:
                _, block_index = place(item)
                start = first_slot(block_index)
                slots = jnp.broadcast_to(column_slot_ref[...], shape) + start
                length = call.cache_len - unused_ref[row]
                held = (slots >= block_index * block) & (slots < length)
                kv_pos = slots
                if positions_buf is not None:
                    kv_pos = jnp.broadcast_to(positions_buf[slot], shape)
                q_pos = jnp.broadcast_to(q_positions_ref[...], shape)
                held = held & call.mask.allowed(q_pos, kv_pos)
                allowed = held if allowed is None else allowed & held

                @pl.when(length < start + block)
                def _() -> None:
                    # What lies past the length may be nan, which a weight of 0 does not hide.
                    values = value_buf[slot].astype(jnp.float32)
                    index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
                    values = jnp.where(index < (length - start) * heads, values, 0)
                    value_buf[slot] = values.astype(value_buf.dtype)

            if allowed is not None:
                logits = jnp.where(allowed, logits, -jnp.inf)
            old_top = top_ref[...]
            top = jnp.maximum(old_top, logits.max(1, keepdims=True))
            # exp(-inf - -inf) is nan, and a row with nothing allowed yet has top = -inf.
            reference = jnp.where(top == -jnp.inf, 0.0, top)
            weights = jnp.exp(logits - reference)
            share = jnp.exp(old_top - reference)
            top_ref[...] = top
            total_ref[...] = total_ref[...] * share + weights.sum(1, keepdims=True)
            values = value_buf[slot]
            sum_ref[...] = sum_ref[...] * share + jax.lax.dot_general(
                weights.astype(values.dtype),
                values,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )

        def step(item: Any, _: None) -> None:
            for copy in copies(item):
                copy.wait()
            # Before the arithmetic, into the buffer that the step before this one has read.
            prefetch(item + DEPTH - 1)

            pl.when(partial_ref[item] == 0)(lambda: visit(item, masked=False))
            pl.when(partial_ref[item] != 0)(lambda: visit(item, masked=True))

        begin = jnp.maximum(start_of(row), first_item)
        end = jnp.minimum(start_of(row + 1), last_item)
        jax.lax.fori_loop(begin, end, step, None)

        total = total_ref[...]
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        out_ref[...] = sum_ref[...] / total
        lse_ref[...] = jnp.where(seen, top_ref[...] + jnp.log(total), -jnp.inf)
