"""The blocks that a TPU flash kernel visits, as one flat list that its grid walks.

A grid step is one entry, so what a mask empties costs nothing. An entry's code says which variant
of the step runs: a full block without a mask, a block with a known pattern of full, partial and
empty parts, of which the empty ones are left out, or a block masked as a whole. Lists are numpy
where positions are known at trace time and nothing else decides; otherwise they are built on the
device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSizes, block_table, selected, shared_by_rows
from effattn.masks import EMPTY, FULL, Full
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens

# Codes of an entry; from PATTERNS on they count the patterns. SKIP entries do no work: a row
# without any block has one, so that its output is written, and lists built at run time end in some.
SKIP, WHOLE, MASKED, PATTERNS = 0, 1, 2, 3
# Each pattern is a variant of the step in the program: more of them than this are masked whole.
MAX_PATTERNS = 4

# Fields of the words of an entry.
Q_BLOCK, KV_SHIFT = 0xFFFF, 16  # of its place
CODE, FIRST, LAST = 0xFF, 1 << 8, 1 << 9  # of its info
HEAD_SHIFT = PRESENT_SHIFT = 16  # of its info, in lists by key blocks and in gathered lists

Pattern = tuple[tuple[int, ...], ...]  # kinds [strips of queries, strips of keys] of a block


class Codes(NamedTuple):
    """codes: int32 [batch | 1, heads | 1, num_q, num_kv], numpy or traced. candidates: numpy bool
    [num_q, num_kv], what may be other than SKIP. used: the codes that can occur. most: a bound on
    the blocks of one head that are visited, None where there is no better than `candidates`."""

    codes: Any
    candidates: np.ndarray
    used: frozenset[int]
    patterns: tuple[Pattern, ...]
    most: int | None


class Visits(NamedTuple):
    """places: int32 [batch | 1, heads | 1, n], query block + (key block << 16).
    infos: code + FIRST and LAST of the major block's visits + (query head in its group << 16)."""

    places: Any
    infos: Any


def block_codes(call: AttentionCall, tokens: Tokens, sizes: BlockSizes, strip: int) -> Codes:
    """The code of every block. strip: queries, and keys, of one part of a pattern."""
    positions = tokens.q_positions, tokens.kv_positions
    patterns: tuple[Pattern, ...] = ()
    codes: Any
    if all(isinstance(x, np.ndarray) for x in positions):
        codes, patterns = _static_codes(call, tokens, sizes, strip)
        candidates = (codes != SKIP).any(0)
    else:
        codes = _coarse_codes(block_table(call.mask, *positions, sizes=sizes))
        candidates = np.ones(codes.shape[1:], bool)
    if tokens.q_segment_ids is not None:
        ids = tokens.q_segment_ids, tokens.kv_segment_ids
        shared = block_table(Full(), *positions, *ids, sizes=sizes)
        masked = jnp.where((shared == EMPTY) | (codes == SKIP), SKIP, MASKED)
        codes = jnp.where(shared == FULL, codes, masked)
    codes = codes[:, None]
    most = None
    if tokens.blocks is not None:
        num_q, num_kv = sizes.count(call.q_len, call.kv_len)
        most = num_q * tokens.blocks.kv_blocks.shape[-1]
        codes = jnp.where(selected(tokens.blocks, num_kv), codes, SKIP)
    used = frozenset({SKIP, WHOLE, MASKED, *range(PATTERNS, PATTERNS + len(patterns))})
    if isinstance(codes, np.ndarray):
        used = frozenset(np.unique(codes).tolist())
    return Codes(codes, candidates, used, patterns, most)


def _coarse_codes(kinds: Any) -> Any:
    return jnp.where(kinds == FULL, WHOLE, jnp.where(kinds == EMPTY, SKIP, MASKED))


def _static_codes(
    call: AttentionCall, tokens: Tokens, sizes: BlockSizes, strip: int
) -> tuple[np.ndarray, tuple[Pattern, ...]]:
    """([1, num_q, num_kv], patterns), the commonest patterns of partial blocks first."""
    fine = block_table(
        call.mask, tokens.q_positions, tokens.kv_positions, sizes=BlockSizes(strip, strip)
    )
    fine = shared_by_rows(fine)
    num_q, num_kv = sizes.count(call.q_len, call.kv_len)
    strips, columns = sizes.q // strip, sizes.kv // strip
    missing = num_q * strips - fine.shape[0], num_kv * columns - fine.shape[1]
    fine = np.pad(fine, ((0, missing[0]), (0, missing[1])), constant_values=EMPTY)
    fine = fine.reshape(num_q, strips, num_kv, columns).swapaxes(1, 2)
    fine = fine.reshape(num_q, num_kv, strips * columns)
    low, high = fine.min(-1), fine.max(-1)
    codes = np.where(high == EMPTY, SKIP, np.where(low == FULL, WHOLE, MASKED)).astype(np.int32)
    partial = codes == MASKED
    found, which, counts = np.unique(fine[partial], axis=0, return_inverse=True, return_counts=True)
    commonest = np.argsort(-counts, kind="stable")[:MAX_PATTERNS]
    code_of = np.full(len(found), MASKED, np.int32)
    code_of[commonest] = PATTERNS + np.arange(len(commonest))
    codes[partial] = code_of[which.reshape(-1)]
    patterns = tuple(
        tuple(map(tuple, found[i].reshape(strips, columns).tolist())) for i in commonest
    )
    return codes[None], patterns


def visits(codes: Codes, *, keys_first: bool, num_kv_heads: int, group: int) -> Visits:
    """The list of each head, its major blocks together: query blocks, or with keys_first key
    blocks, each with all the query heads of its group one after the other.

    A list built on the device is as long as it could get; the entries that are too many repeat the
    last block (no copy is made for them) and SKIP.
    """
    candidates = codes.candidates
    if keys_first:
        shape = (candidates.shape[1], group, candidates.shape[0])
        wanted = np.broadcast_to(candidates.T[:, None], shape)
        major, head, minor = np.nonzero(_with_one_per_row(wanted))
        q, kv = minor, major
    else:
        major, minor = np.nonzero(_with_one_per_row(candidates))
        q, kv, head = major, minor, np.zeros_like(major)
    place = (q + (kv << KV_SHIFT)).astype(np.int32)
    table = codes.codes
    if keys_first and table.shape[1] == num_kv_heads * group:
        table = table.reshape(table.shape[0], num_kv_heads, group, *table.shape[2:])
        code = table[:, :, head, q, kv]
    else:
        code = table[:, :, q, kv]  # [batch | 1, lists, n]
    begins = np.diff(major, prepend=-1) != 0
    if isinstance(code, np.ndarray):
        ends = np.diff(major, append=-1) != 0
        info = code + FIRST * begins + LAST * ends + (head << HEAD_SHIFT)
        return Visits(np.broadcast_to(place, info.shape), info.astype(np.int32))

    # One entry stays of a major block that has no other.
    owner = np.cumsum(begins) - 1
    some = jnp.zeros((*code.shape[:2], owner[-1] + 1), bool).at[:, :, owner].max(code != SKIP)
    keep = (code != SKIP) | (begins & ~some[:, :, owner])
    info = code + (head << HEAD_SHIFT)
    listed = _compressed(keep, jnp.asarray(major), jnp.asarray(place), info)
    limit = len(place) if codes.most is None else codes.most * group + int(owner[-1]) + 1
    return Visits(*(x[..., :limit] for x in listed))


def gathered_visits(codes: Codes, fan: int, longest: int) -> tuple[Visits, Any]:
    """Visits of `fan` key blocks each, and which: int32 [batch | 1, heads | 1, n, fan].

    longest: key blocks that a query block selects at most. A place has no key block of its own. An
    entry is WHOLE if all its blocks are, else MASKED; one that has too few repeats its last block,
    and PRESENT of its info says how many there are.
    """
    table = jnp.asarray(codes.codes)
    num_q, num_kv = table.shape[2:]
    steps = -(-min(longest, num_kv) // fan)
    order = jnp.argsort(table == SKIP, axis=-1, stable=True)[..., : steps * fan]
    order = jnp.pad(order, ((0, 0),) * 3 + ((0, steps * fan - order.shape[-1]),))
    count = (table != SKIP).sum(-1, keepdims=True)
    slot = jnp.arange(steps * fan)
    blocks = jnp.take_along_axis(order, jnp.minimum(slot, jnp.maximum(count - 1, 0)), -1)
    present = slot < count
    whole = present & (jnp.take_along_axis(table, blocks, -1) == WHOLE)
    by_step = (*table.shape[:2], num_q * steps, fan)
    blocks = blocks.reshape(by_step).astype(jnp.int32)
    present, whole = present.reshape(by_step), whole.reshape(by_step)
    code = jnp.where(present.any(-1), jnp.where(whole.all(-1), WHOLE, MASKED), SKIP)
    code += present.sum(-1) << PRESENT_SHIFT
    major = np.repeat(np.arange(num_q), steps)
    keep = present.any(-1) | (np.arange(num_q * steps) % steps == 0)
    places, infos, blocks = _compressed(keep, jnp.asarray(major), jnp.asarray(major), code, blocks)
    return Visits(places, infos), blocks


def _compressed(
    keep: jax.Array, major: jax.Array, place: jax.Array, info: jax.Array, *others: jax.Array
) -> tuple[jax.Array, ...]:
    """(place, info with FIRST and LAST, *others), those not kept moved to the end, where they
    repeat the last kept one under SKIP. major: [n], ascending."""
    order = jnp.argsort(~keep, axis=-1, stable=True)
    count = keep.sum(-1, keepdims=True)
    entry = jnp.minimum(jnp.arange(order.shape[-1]), count - 1)
    order = jnp.take_along_axis(order, entry, -1)
    real = jnp.arange(order.shape[-1]) < count
    majors = major[order]
    first = jnp.concatenate([real[..., :1], majors[..., 1:] != majors[..., :-1]], -1)
    last = jnp.concatenate([first[..., 1:], real[..., -1:]], -1) | (entry == count - 1)
    info = jnp.take_along_axis(jnp.broadcast_to(info, keep.shape), order, -1)
    info = jnp.where(real, info, info - (info & CODE) + SKIP)
    info += FIRST * (first & real) + LAST * (last & real)
    others = tuple(jnp.take_along_axis(x, order[..., None], 2) for x in others)
    return place[order].astype(jnp.int32), info.astype(jnp.int32), *others


def _with_one_per_row(table: np.ndarray) -> np.ndarray:
    """`table` with an entry for every index of its first axis."""
    table = table.copy()
    rows = table.reshape(len(table), -1)
    rows[~rows.any(1), 0] = True
    return rows.reshape(table.shape)
