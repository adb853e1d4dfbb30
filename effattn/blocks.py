"""Which blocks of an attention matrix need work, as tables of kinds and as lists to walk.

A mask answers per pair of blocks (`Mask.block_kinds`); here its answer is joined with segment ids,
padding and a batch. numpy positions give numpy tables, hence static lists; traced positions or
segment ids give tables and lists that are built at run time. `masks.py` has the kinds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.checks import check_at_least
from effattn.masks import EMPTY, FULL, PARTIAL, Mask


@dataclass(frozen=True)
class BlockSizes:
    """Queries and keys per block."""

    q: int
    kv: int

    def __post_init__(self) -> None:
        check_at_least("BlockSizes.q", self.q, 1)
        check_at_least("BlockSizes.kv", self.kv, 1)

    def count(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """(query blocks, key blocks) of a matrix; the last of each may be partly padding."""
        return -(-q_len // self.q), -(-kv_len // self.kv)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kv_blocks", "kinds", "counts"),
    meta_fields=("q_block", "kv_block"),
)
@dataclass(frozen=True)
class BlockSelection:
    """The key blocks that each query block visits: a policy's choice, or a mask's.

    q_block, kv_block: queries and keys per block, static.
    kv_blocks: int32 [batch | 1, heads, num_q_blocks, max_blocks], global block ids; heads is 1,
        the number of kv heads or the number of query heads.
    kinds: like kv_blocks, EMPTY | PARTIAL | FULL. A kernel may skip the mask in a FULL block only
        where the kinds came from that mask; `attention(blocks=...)` reads EMPTY or not.
    counts: int32 [batch | 1, heads, num_q_blocks]; entries from `counts` on are not visited.
    """

    q_block: int
    kv_block: int
    kv_blocks: Any
    kinds: Any
    counts: Any


class Pairs(NamedTuple):
    """(query block, key block) pairs to visit: int32 [max_pairs] each; the first `count` count."""

    q: Any
    kv: Any
    count: Any


def _is_static(*arrays: Any) -> bool:
    return all(isinstance(a, np.ndarray) for a in arrays if a is not None)


def _split(x: Any, block: int, mode: str) -> Any:
    """[batch, length] -> [batch, num_blocks, block]; numpy in, numpy out."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    missing = -x.shape[1] % block
    if missing:
        x = xp.pad(x, ((0, 0), (0, missing)), mode=mode)
    return x.reshape(x.shape[0], -1, block)


def block_table(
    mask: Mask,
    q_positions: Any,
    kv_positions: Any,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    *,
    sizes: BlockSizes,
) -> Any:
    """The kind of every pair of blocks: int32 [batch | 1, num_q_blocks, num_kv_blocks].

    positions, segment ids: int32 [batch | 1, length]. The answer is numpy where all are numpy.
    A key block with padded slots is never FULL. Padded queries take any answer: their output is
    thrown away. With segment ids, blocks that share no segment are EMPTY (padding, segment 0, is
    in none), and FULL needs one and the same segment on both sides.
    """
    # Edge padding: the slots past the end repeat a real position, so no range grows by them.
    q_pos = _split(q_positions, sizes.q, "edge")
    kv_pos = _split(kv_positions, sizes.kv, "edge")
    if _is_static(q_pos, kv_pos):
        rows = range(max(len(q_pos), len(kv_pos)))
        pairs = [(q_pos[i % len(q_pos)], kv_pos[i % len(kv_pos)]) for i in rows]
        kinds = np.stack([mask.block_kinds(q, kv) for q, kv in pairs])
    else:
        q_pos, kv_pos = jnp.asarray(q_pos), jnp.asarray(kv_pos)
        batch = max(len(q_pos), len(kv_pos))
        q_pos = jnp.broadcast_to(q_pos, (batch, *q_pos.shape[1:]))
        kv_pos = jnp.broadcast_to(kv_pos, (batch, *kv_pos.shape[1:]))
        kinds = jax.vmap(mask.block_kinds)(q_pos, kv_pos)
    if kv_positions.shape[1] % sizes.kv:
        whole = np.arange(kinds.shape[-1]) < kinds.shape[-1] - 1
        kinds = _numpy_for(kinds).where(whole, kinds, kinds.clip(max=PARTIAL))
    if q_segment_ids is None:
        return kinds
    return _numpy_for(kinds, q_segment_ids, kv_segment_ids).minimum(
        kinds, _segment_kinds(q_segment_ids, kv_segment_ids, sizes)
    )


def _numpy_for(*arrays: Any) -> Any:
    return np if _is_static(*arrays) else jnp


def _segment_kinds(q_ids: Any, kv_ids: Any, sizes: BlockSizes) -> Any:
    xp = _numpy_for(q_ids, kv_ids)
    nowhere = np.iinfo(np.int32).max
    q = _split(q_ids, sizes.q, "edge")[:, :, None]
    kv = _split(kv_ids, sizes.kv, "edge")[:, None]
    # The range of the real segments: padding must not widen it down to 0.
    q_min = xp.where(q == 0, nowhere, q).min(-1)
    kv_min = xp.where(kv == 0, nowhere, kv).min(-1)
    q_max, kv_max = q.max(-1), kv.max(-1)
    empty = (q_min > kv_max) | (kv_min > q_max)
    q_one, kv_one = q.min(-1), kv.min(-1)
    full = (q_one == q_max) & (kv_one == kv_max) & (q_max == kv_max) & (q_max != 0)
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(xp.int32)


def shared_by_rows(kinds: Any) -> Any:
    """One table for all rows, [..., num_q_blocks, num_kv_blocks] -> the last two axes.

    A block is EMPTY where it is so for every row, FULL where it is so for every row.
    """
    rows = tuple(range(kinds.ndim - 2))
    low, high = kinds.min(rows), kinds.max(rows)
    return _numpy_for(kinds).where(low == high, low, PARTIAL)


def pairs_of(kinds: Any, kind: int) -> Pairs:
    """The pairs of one kind in a [num_q_blocks, num_kv_blocks] table, row by row.

    A numpy table gives exact numpy lists and an int count; a traced one lists of full length.
    """
    if _is_static(kinds):
        q, kv = np.nonzero(kinds == kind)
        return Pairs(q.astype(np.int32), kv.astype(np.int32), len(q))
    wanted = (kinds == kind).reshape(-1)
    order = jnp.argsort(~wanted, stable=True).astype(jnp.int32)
    width = kinds.shape[1]
    return Pairs(order // width, order % width, wanted.sum(dtype=jnp.int32))


def select_blocks(kinds: Any, sizes: BlockSizes) -> BlockSelection:
    """The lists of a table [batch | 1, heads, num_q_blocks, num_kv_blocks], EMPTY pairs left out.

    Static lists are as long as the longest row needs, run-time lists as long as they may get.
    """
    xp = _numpy_for(kinds)
    counts = (kinds != EMPTY).sum(-1).astype(xp.int32)
    order = xp.argsort(kinds == EMPTY, axis=-1, stable=True).astype(xp.int32)
    if _is_static(kinds):
        order = order[..., : max(1, int(counts.max(initial=0)))]
    return BlockSelection(
        q_block=sizes.q,
        kv_block=sizes.kv,
        kv_blocks=order,
        kinds=xp.take_along_axis(kinds, order, axis=-1).astype(xp.int32),
        counts=counts,
    )


def selected(blocks: BlockSelection, num_kv_blocks: int) -> jax.Array:
    """Which blocks a selection visits: bool [batch | 1, heads, num_q_blocks, num_kv_blocks]."""
    kv_blocks = jnp.asarray(blocks.kv_blocks)
    visited = jnp.arange(kv_blocks.shape[-1]) < jnp.asarray(blocks.counts)[..., None]
    visited &= (jnp.asarray(blocks.kinds) != EMPTY) & (kv_blocks >= 0)
    # Entries that are not visited land in one column too many, which is cut off.
    column = jnp.where(visited, kv_blocks, num_kv_blocks).reshape(-1, kv_blocks.shape[-1])
    table = jnp.zeros((len(column), num_kv_blocks + 1), bool)
    table = table.at[jnp.arange(len(column))[:, None], column].set(True, mode="drop")
    return table[:, :num_kv_blocks].reshape(*kv_blocks.shape[:-1], num_kv_blocks)
