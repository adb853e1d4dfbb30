"""Decode attention on a TPU: who may use the kernel, how a cache is cut, and the tables it walks.

The kernel sees a cache [batch, cache_len, num_kv_heads, head_dim] as [batch, cache_len *
num_kv_heads, head_dim]: each key vector is a column of the logits, and a query's row holds those of
its own kv head and masks the others out. The MXU must load every key once in any case, and the rows
of all heads together fill it better than one group would. On the chip both shapes have the same
bytes where head_dim is 128 and num_kv_heads is 1, 2, 4 or a multiple of 8, or where head_dim is a
multiple of 128 and num_kv_heads one of 8; elsewhere XLA lays the cache out anew, once per call
or once per compiled loop. `decode_kernel.py` holds the kernel.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn.masks import EMPTY, PARTIAL
from effattn.pallas_kernels.attention.decode_backward import backward
from effattn.pallas_kernels.attention.decode_call import (
    DecodeCall,
    Places,
    block_kinds,
    merge_parts,
)
from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.rows import vmap_as_rows
from effattn.pallas_kernels.target import not_a_tpu, tpu_target

LANES, SUBLANES = 128, 8
# Bytes of one copy from HBM. 2**19 would do for the memory, but then a step's arithmetic (1190
# static cycles on a v6e) takes as long as its copies (1120); with 2**20 it takes 1590 of 2240.
# `effattn bench --static --kernel=decode`, batch 8, 16384 slots, 8 kv heads of 128, bfloat16.
PIECE = 2**20
MAX_LOGITS = 2**18  # of one step: 1 MiB, and as much again for each of its temporaries
MAX_ROWS = 512  # query rows of one program; more is prefill, where each key is used often
MAX_ITEMS = 2**17  # blocks of all rows together: their table fills half of the scalar memory
DEPTH = 4  # blocks in flight


@dataclass(frozen=True)
class DecodeSizes:
    """How a call is cut: `block` slots per copy, `held` slots in the kernel's hands (the rest, at
    most 7, goes beside it), rows of queries, splits of the work."""

    block: int
    held: int
    rows: int
    splits: int

    @property
    def num_blocks(self) -> int:
        return -(-self.held // self.block)


def sizes_of(call: DecodeCall) -> DecodeSizes | None:
    """None where the cache is shorter than the least block."""
    heads = call.num_kv_heads
    width = max(_up(call.head_dim, LANES), _up(call.value_dim, LANES))
    columns = PIECE // (width * max(call.key_dtype.itemsize, call.value_dtype.itemsize))
    rows = _up(call.q_len * call.num_heads, SUBLANES * 4 // call.key_dtype.itemsize)
    columns = min(columns, MAX_LOGITS // rows)
    least = LANES // math.gcd(LANES, heads)  # columns come in whole lanes
    # Copies start on a whole sublane tile.
    held = call.cache_len - call.cache_len % (SUBLANES // math.gcd(SUBLANES, heads))
    if held < least:
        return None
    block = max(least, _power_of_two(-(-columns // heads)))
    while block > held:
        block //= 2
    target = tpu_target()
    splits = call.num_splits
    if splits is None:
        splits = 1 if target is None else target.num_cores
    return DecodeSizes(block, held, rows, splits)


def refuses(call: DecodeCall) -> str | None:
    reason = not_a_tpu()
    if reason is not None:
        return reason
    for name in ("query", "key", "value"):
        dtype = getattr(call, f"{name}_dtype")
        if dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16, got {dtype}"
    if call.q_len * call.num_heads > MAX_ROWS:
        return (
            f"q_len x num_heads must be at most {MAX_ROWS}, got {call.q_len} x {call.num_heads}: "
            "so many queries are prefill, for `attention`"
        )
    sizes = sizes_of(call)
    if sizes is None:
        return f"the cache must have at least {LANES} keys of all heads, got {call.cache_len} slots"
    if call.batch * sizes.num_blocks > MAX_ITEMS:
        return f"batch x blocks must be at most {MAX_ITEMS}, got {call.batch * sizes.num_blocks}"
    return None


def forward(
    call: DecodeCall, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    from effattn.pallas_kernels.attention.decode_kernel import decode_kernel

    sizes = sizes_of(call)
    assert sizes is not None  # refuses
    places = Places(
        jnp.broadcast_to(places.lengths, (call.batch,)),
        jnp.broadcast_to(places.q_positions, (call.batch, call.q_len)),
        places.kv_positions,
    )
    real = call.q_len * call.num_heads
    spare = ((0, 0), (0, sizes.rows - real))
    # The MXU multiplies operands of one dtype, and in one bf16 pass whatever they are.
    rows = query.astype(call.key_dtype).reshape(call.batch, real, call.head_dim)
    rows = jnp.pad(rows, (*spare, (0, 0)))
    row_pos = jnp.pad(jnp.repeat(places.q_positions, call.num_heads, axis=1), spare, mode="edge")
    starts, items, partial_items = _tables(call, sizes, places)
    out, lse = decode_kernel(
        call,
        sizes,
        starts,
        items,
        partial_items,
        call.cache_len - places.lengths,
        rows,
        row_pos[..., None],
        None if places.kv_positions is None else _columns(call, sizes, places.kv_positions),
        key.reshape(call.batch, -1, call.head_dim),
        value.reshape(call.batch, -1, call.value_dim),
    )
    shape = (-1, call.batch, call.q_len, call.num_heads)
    out = out[:, :, :real].reshape(*shape, call.value_dim)
    lse = lse[:, :, :real, 0].reshape(shape)
    if sizes.held < call.cache_len:
        rest = _rest(call, sizes, query, key, value, places)
        out = jnp.concatenate([out, rest[0].astype(out.dtype)[None]])
        lse = jnp.concatenate([lse, rest[1][None]])
    out, lse = (out[0], lse[0]) if len(out) == 1 else merge_parts(out, lse)
    return out.astype(call.query_dtype), lse


def _tables(
    call: DecodeCall, sizes: DecodeSizes, places: Places
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks to visit, row after row, as how they differ from visiting all of them.

    A static evaluator of the compiled kernel reads tables as zeros, and thus prices a full cache.

    starts: [batch + 1], the first item of each row, less row * num_blocks. items: [batch *
    num_blocks], row * stride + block of item i, less i, where stride is a power of two. partial:
    like items, 1 where the mask must be applied.
    """
    held = Places(
        jnp.minimum(places.lengths, sizes.held),
        places.q_positions,
        None if places.kv_positions is None else places.kv_positions[:, : sizes.held],
    )
    kinds = block_kinds(replace(call, cache_len=sizes.held), held, sizes.block)
    needed = kinds != EMPTY
    every = sizes.num_blocks * jnp.arange(call.batch + 1, dtype=jnp.int32)
    starts = jnp.pad(jnp.cumsum(needed.sum(1, dtype=jnp.int32)), (1, 0)) - every
    row = jnp.arange(call.batch, dtype=jnp.int32)[:, None]
    number = row * _power_of_two(sizes.num_blocks) + jnp.arange(sizes.num_blocks, dtype=jnp.int32)
    # Sorted, the needed ones stand first and in order; one sort moves the number and its kind.
    tagged = 2 * number + (kinds == PARTIAL)
    tagged = jnp.sort(jnp.where(needed, tagged, np.iinfo(np.int32).max).reshape(-1))
    items = (tagged >> 1) - jnp.arange(tagged.size, dtype=jnp.int32)
    return starts, items, tagged & 1


def _columns(call: DecodeCall, sizes: DecodeSizes, kv_positions: jax.Array) -> jax.Array:
    """The position of every column of every block, [batch | 1, num_blocks, 1, columns].

    The last block starts early where it would end past the cache.
    """
    whole = sizes.held // sizes.block * sizes.block
    blocks = kv_positions[:, :whole].reshape(len(kv_positions), -1, 1, sizes.block)
    if whole < sizes.held:
        last = kv_positions[:, None, None, sizes.held - sizes.block : sizes.held]
        blocks = jnp.concatenate([blocks, last], axis=1)
    return jnp.repeat(blocks, call.num_kv_heads, axis=-1)


def _rest(
    call: DecodeCall, sizes: DecodeSizes, query: Any, key: Any, value: Any, places: Places
) -> tuple[jax.Array, jax.Array]:
    """Attention over the slots that do not fill a tile."""
    from effattn.pallas_kernels.attention import decode_xla

    kv_positions = places.of_slots(call.cache_len)[:, sizes.held :]
    length = call.cache_len - sizes.held
    places = Places(places.lengths - sizes.held, places.q_positions, kv_positions)
    key, value = key[:, sizes.held :], value[:, sizes.held :]
    return decode_xla.forward(replace(call, cache_len=length), query, key, value, places)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


BACKEND = Backend("tpu", refuses, partial(vmap_as_rows, forward), backward)
