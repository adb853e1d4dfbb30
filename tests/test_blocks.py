"""Block tables and lists: safe with padding, segments and batches, the same traced as static."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.blocks import (
    BlockSizes,
    block_table,
    pairs_of,
    select_blocks,
    selected,
    shared_by_rows,
)
from effattn.masks import EMPTY, FULL, PARTIAL, Causal, Full, PrefixLM, Window

SIZES = [BlockSizes(8, 8), BlockSizes(16, 4), BlockSizes(5, 7), BlockSizes(64, 64)]


def packed_ids(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Sorted segment ids with padding in front or at the end of a row."""
    ids = np.sort(rng.integers(0, 4, (rows, length)), 1).astype(np.int32)
    ids[::2] = np.where(ids[::2] == 0, 0, 4 - ids[::2])[:, ::-1]
    return ids


def truth(mask, q_pos, kv_pos, q_ids, kv_ids, sizes):
    """(some, every) allowed pair per block over real queries and all slots of a key block."""
    allowed = np.asarray(mask.allowed(q_pos[:, :, None], kv_pos[:, None]))
    if q_ids is not None:
        allowed = allowed & (q_ids[:, :, None] == kv_ids[:, None]) & (q_ids != 0)[:, :, None]
    missing_q, missing_kv = -allowed.shape[1] % sizes.q, -allowed.shape[2] % sizes.kv
    some = np.pad(allowed, ((0, 0), (0, missing_q), (0, missing_kv)))
    # A padded query may be given anything, a padded key must be masked.
    every = np.pad(allowed, ((0, 0), (0, missing_q), (0, 0)), constant_values=True)
    every = np.pad(every, ((0, 0), (0, 0), (0, missing_kv)))

    def cut(x):
        return x.reshape(len(x), -1, sizes.q, x.shape[2] // sizes.kv, sizes.kv)

    return cut(some).any((2, 4)), cut(every).all((2, 4))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("lengths", [(48, 48), (37, 50)], ids=str)
@pytest.mark.parametrize("order", ["sorted", "random"])
@pytest.mark.parametrize("segments", [False, True])
def test_block_table_is_safe_and_the_same_traced(sizes, lengths, order, segments):
    rng = np.random.default_rng(0)
    q_len, kv_len = lengths
    for mask in (Causal(), Full(), Window(left=9, right=1), PrefixLM(11), ~Causal()):
        q_pos, kv_pos = (np.tile(np.arange(n, dtype=np.int32), (3, 1)) for n in lengths)
        if order == "random":
            q_pos, kv_pos = (rng.integers(0, 40, x.shape).astype(np.int32) for x in (q_pos, kv_pos))
        q_ids = packed_ids(rng, 3, q_len) if segments else None
        kv_ids = packed_ids(rng, 3, kv_len) if segments else None
        table = block_table(mask, q_pos, kv_pos, q_ids, kv_ids, sizes=sizes)
        some, every = truth(mask, q_pos, kv_pos, q_ids, kv_ids, sizes)
        assert isinstance(table, np.ndarray) and table.shape == some.shape
        assert not (some & (table == EMPTY)).any(), mask
        assert not (~every & (table == FULL)).any(), mask
        if lengths == (37, 50):
            traced = jax.jit(lambda *x, m=mask: block_table(m, *x, sizes=sizes))
            np.testing.assert_array_equal(traced(q_pos, kv_pos, q_ids, kv_ids), table)
        shared = shared_by_rows(table)
        assert not (some.any(0) & (shared == EMPTY)).any()
        assert not (~every.all(0) & (shared == FULL)).any()


def test_segments_skip_blocks_of_other_documents_and_fill_inner_ones():
    ids = np.repeat(np.array([[1, 1, 1, 2, 2, 0]], np.int32), 8, axis=1)
    pos = np.arange(48, dtype=np.int32)[None]
    table = block_table(Full(), pos, pos, ids, ids, sizes=BlockSizes(8, 8))[0]
    wanted = np.zeros((6, 6), int)
    wanted[:3, :3] = wanted[3:5, 3:5] = FULL
    np.testing.assert_array_equal(table, wanted)


def test_padding_does_not_widen_the_range_of_segments():
    ids = np.array([[0, 5, 0, 5, 2, 2, 2, 2]], np.int32)
    pos = np.arange(8, dtype=np.int32)[None]
    table = block_table(Full(), pos, pos, ids, ids, sizes=BlockSizes(4, 4))[0]
    np.testing.assert_array_equal(table, [[PARTIAL, EMPTY], [EMPTY, FULL]])


def test_padded_key_slots_are_never_full_and_padded_queries_cost_nothing():
    pos = np.arange(13, dtype=np.int32)[None]
    table = block_table(Full(), pos, pos, sizes=BlockSizes(8, 8))[0]
    np.testing.assert_array_equal(table, [[FULL, PARTIAL], [FULL, PARTIAL]])
    table = block_table(Causal(), pos, pos, sizes=BlockSizes(8, 8))[0]
    np.testing.assert_array_equal(table, [[PARTIAL, EMPTY], [FULL, PARTIAL]])


def test_pairs_are_exact_when_static_and_counted_when_traced():
    table = np.random.default_rng(0).integers(0, 3, (5, 7)).astype(np.int32)
    for kind in (EMPTY, PARTIAL, FULL):
        q, kv, count = pairs_of(table, kind)
        assert isinstance(count, int) and count == len(q) == (table == kind).sum()
        assert (table[q, kv] == kind).all()
        traced = jax.jit(pairs_of, static_argnums=1)(table, kind)
        assert traced.count == count
        np.testing.assert_array_equal(traced.q[:count], q)
        np.testing.assert_array_equal(traced.kv[:count], kv)


@pytest.mark.parametrize("traced", [False, True])
def test_a_selection_lists_what_its_table_says(traced):
    kinds = np.random.default_rng(0).integers(0, 3, (2, 3, 5, 7)).astype(np.int32)
    kinds[0, 0, 0] = EMPTY
    sizes = BlockSizes(8, 4)
    blocks = (jax.jit(select_blocks, static_argnums=1) if traced else select_blocks)(kinds, sizes)
    assert (blocks.q_block, blocks.kv_block) == (8, 4)
    assert isinstance(blocks.kv_blocks, jax.Array if traced else np.ndarray)
    np.testing.assert_array_equal(blocks.counts, (kinds != EMPTY).sum(-1))
    np.testing.assert_array_equal(selected(blocks, 7), kinds != EMPTY)
    listed = np.take_along_axis(kinds, np.asarray(blocks.kv_blocks), -1)
    visited = np.arange(listed.shape[-1]) < np.asarray(blocks.counts)[..., None]
    np.testing.assert_array_equal(np.asarray(blocks.kinds)[visited], listed[visited])


def test_a_selection_is_a_pytree_with_static_block_sizes():
    blocks = select_blocks(np.full((1, 1, 2, 2), FULL, np.int32), BlockSizes(8, 4))
    leaves, tree = jax.tree.flatten(blocks)
    assert len(leaves) == 3
    again = jax.tree.unflatten(tree, [jnp.asarray(x) for x in leaves])
    assert (again.q_block, again.kv_block) == (8, 4)


def test_block_sizes_must_be_positive():
    with pytest.raises(ValueError, match=r"BlockSizes\.kv: got 0, expected at least 1"):
        BlockSizes(8, 0)
