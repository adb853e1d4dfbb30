"""Decode attention in plain XLA: an online softmax over the blocks that some row needs.

Rows share one list of blocks, so that a block is a slice and not a gather. A cache of one block is
one product. The blocks are cut into num_splits parts that one step of the loop takes together.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.masks import EMPTY
from effattn.pallas_kernels.attention.decode_backward import backward
from effattn.pallas_kernels.attention.decode_call import (
    DecodeCall,
    Places,
    block_kinds,
    merge_parts,
)
from effattn.pallas_kernels.attention.xla import varying
from effattn.pallas_kernels.dispatch import Backend

BLOCK_CPU, BLOCK = 256, 2048  # slots of a block


def refuses(call: DecodeCall) -> str | None:
    return None


def forward(
    call: DecodeCall, query: jax.Array, key: jax.Array, value: jax.Array, places: Places
) -> tuple[jax.Array, jax.Array]:
    block = BLOCK_CPU if jax.default_backend() == "cpu" else BLOCK
    dtype = jnp.promote_types(call.query_dtype, call.key_dtype)
    # [b, k, t * group, h]
    q = query.reshape(call.batch, call.q_len, call.num_kv_heads, call.group, call.head_dim)
    q = q.transpose(0, 2, 1, 3, 4).reshape(call.batch, call.num_kv_heads, -1, call.head_dim)
    q = q.astype(dtype)
    q_pos = jnp.repeat(places.q_positions, call.group, axis=1)[:, None, :, None]
    kv_pos = places.of_slots(call.cache_len)

    def part(first: Any, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(largest logit, sum of weights, sum of values) [b, k, t * group, 1 | e] over `length`
        slots from `first` on, of which those below it have been counted before."""
        start = jnp.minimum(first, call.cache_len - length)
        k, v, pos = (
            x if length == call.cache_len else jax.lax.dynamic_slice_in_dim(x, start, length, 1)
            for x in (key, value, kv_pos)
        )
        logits = _product("bkrh,bskh->bkrs", q, k.astype(dtype), call.accumulator) * call.scale
        if call.logit_soft_cap is not None:
            logits = call.logit_soft_cap * jnp.tanh(logits / call.logit_soft_cap)
        slot = start + jnp.arange(length)
        held = (slot >= first) & (slot < places.lengths[:, None])  # [b, s]
        allowed = call.mask.allowed(q_pos, pos[:, None, None, :]) & held[:, None, None, :]
        logits = jnp.where(allowed, logits, -jnp.inf)
        top = logits.max(-1, keepdims=True)
        # exp(-inf - -inf) is nan, and a row with nothing allowed has top = -inf.
        weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
        # What lies past the length may be nan, which a weight of 0 does not hide.
        v = jnp.where(held[..., None, None], v, 0)
        weighted = _product("bkrs,bske->bkre", weights.astype(v.dtype), v, call.accumulator)
        return top, weights.sum(-1, keepdims=True), weighted

    if call.cache_len <= 2 * block:
        top, total, out = part(0, call.cache_len)
    else:
        zero = varying(query, key, value, *jax.tree.leaves(places))
        top, total, out = _walk(call, places, block, part, zero)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)[..., 0]
    out = out / total
    if out.ndim == 5:
        out, lse = merge_parts(out, lse)
    shape = (call.batch, call.num_kv_heads, call.q_len, call.group)
    out = out.reshape(*shape, -1).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(shape).transpose(0, 2, 1, 3)
    out = out.reshape(call.batch, call.q_len, call.num_heads, -1)
    return out.astype(call.query_dtype), lse.reshape(out.shape[:-1])


def _walk(call: DecodeCall, places: Places, block: int, part: Any, zero: jax.Array) -> Any:
    """`part` summed over the blocks that some row needs; with splits a leading axis of them."""
    needed = (block_kinds(call, places, block) != EMPTY).any(0)
    count = needed.sum(dtype=jnp.int32)
    blocks = jnp.argsort(~needed, stable=True).astype(jnp.int32)
    splits = 1 if call.num_splits is None else min(call.num_splits, len(blocks))
    per_split = (count + splits - 1) // splits

    def visit(i: Any, carry: Any, split: Any) -> Any:
        item = split * per_split + i
        # Past the last block: a first slot beyond the cache, so that none of its slots counts.
        first = jnp.where(item < count, blocks[item] * block, call.cache_len)
        old_top, old_total, old_out = carry
        top, total, out = part(first, block)
        new_top = jnp.maximum(old_top, top)
        reference = jnp.where(new_top == -jnp.inf, 0, new_top)
        old_share, share = jnp.exp(old_top - reference), jnp.exp(top - reference)
        return new_top, old_total * old_share + total * share, old_out * old_share + out * share

    rows = (call.batch, call.num_kv_heads, call.q_len * call.group)
    sums = jnp.zeros((*rows, call.value_dim + 1), call.accumulator) + zero.astype(call.accumulator)
    start = (sums[..., :1] - jnp.inf, sums[..., :1], sums[..., 1:])
    if splits == 1:
        return jax.lax.fori_loop(0, per_split, lambda i, c: visit(i, c, 0), start)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (splits, *x.shape)), start)
    every = jnp.arange(splits, dtype=jnp.int32)
    step = jax.vmap(visit, in_axes=(None, 0, 0))
    return jax.lax.fori_loop(0, per_split, lambda i, c: step(i, c, every), start)


def _product(spec: str, a: jax.Array, b: jax.Array, accumulator: Any) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator)


BACKEND = Backend("xla", refuses, forward, backward)
