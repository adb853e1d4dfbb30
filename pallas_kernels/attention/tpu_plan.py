"""How a call is cut for the TPU flash kernels: block sizes, lists, the layout of its arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.blocks import BlockSizes
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.attention.tpu_pieces import Piece, Places, pattern_of, pieces_of
from effattn.pallas_kernels.attention.tpu_sizes import block_sizes
from effattn.pallas_kernels.attention.tpu_visits import (
    KV_SHIFT,
    MASKED,
    SKIP,
    WHOLE,
    Codes,
    block_codes,
    gathered_visits,
    visits,
)
from effattn.pallas_kernels.tuning import LANES, FlashTiles

SUBLANES = 16  # of bfloat16; a multiple of float32's 8


@dataclass(frozen=True)
class Layout:
    """Where heads lie. in_columns: [batch, length, heads * head_dim], a free reshape, for head dims
    that are whole lanes; else [batch, heads, length, head_dim], which costs a transposition."""

    length: int  # padded
    head_dim: int  # padded
    in_columns: bool

    def pack(self, x: jax.Array) -> jax.Array:
        """[b, length, h, d] as the kernel takes it, padded with zeros."""
        missing = self.length - x.shape[1], self.head_dim - x.shape[3]
        if any(missing):
            x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
        if self.in_columns:
            return x.reshape(*x.shape[:2], -1)
        return x.swapaxes(1, 2)

    def unpack(self, x: jax.Array, length: int, head_dim: int) -> jax.Array:
        """The inverse of `pack`."""
        columns = self.in_columns
        x = x.reshape(*x.shape[:2], -1, self.head_dim) if columns else x.swapaxes(1, 2)
        return x[:, :length, :, :head_dim]

    def shape(self, batch: int, num_heads: int) -> tuple[int, ...]:
        if self.in_columns:
            return (batch, self.length, num_heads * self.head_dim)
        return (batch, num_heads, self.length, self.head_dim)

    def spec(self, rows: int, index: Any) -> pl.BlockSpec:
        """A block [rows, head_dim] of one head; index(*grid) -> (batch, head, row block)."""
        if self.in_columns:

            def columns(*grid: Any) -> tuple[Any, ...]:
                batch, head, row = index(*grid)
                return batch, row, head

            return pl.BlockSpec((None, rows, self.head_dim), columns)

        def head_major(*grid: Any) -> tuple[Any, ...]:
            batch, head, row = index(*grid)
            return batch, head, row, 0

        return pl.BlockSpec((None, None, rows, self.head_dim), head_major)


class Plan(NamedTuple):
    """sizes: what one grid step brings in. variants: (code, pieces) of every variant of the step.
    starts: first positions where they count up by one, else None. num_words: of the mask, for
    queries and for keys, that come in as arrays: where positions do not count up and some block is
    masked. ragged: whether the last key block holds padding. fan: key blocks that a step gathers;
    longest: those that a query block has at most, where fan > 1."""

    call: AttentionCall
    tiles: FlashTiles
    sizes: BlockSizes
    codes: Codes
    variants: tuple[tuple[int, tuple[Piece, ...]], ...]
    starts: tuple[int, int] | None
    num_words: tuple[int, int]
    ragged: bool
    fan: int
    longest: int
    query: Layout
    key: Layout
    value: Layout
    out: Layout


def make_plan(
    call: AttentionCall, tokens: Tokens, tiles: FlashTiles, *, gather: bool = False
) -> Plan:
    """gather: take several small key blocks of a run-time list in one step."""
    sizes = block_sizes(call, tiles)
    strip = math.gcd(math.gcd(sizes.q, sizes.kv), tiles.strip)
    codes = block_codes(call, tokens, sizes, strip)
    # A block of tiles.piece keys or more is worth a step of its own: gathering fills up the last.
    small = gather and tokens.blocks is not None and sizes.kv < tiles.piece
    fan = tiles.gathered // sizes.kv if small else 1
    longest = _longest_piece(sizes.q * sizes.kv * fan, strip, tiles)
    variants: tuple[tuple[int, tuple[Piece, ...]], ...]
    if fan > 1:
        wide = math.gcd(sizes.q, tiles.strip)
        size = _longest_piece(sizes.q * sizes.kv * fan, wide, tiles)
        places = [
            (row, wide, at, min(size, fan * sizes.kv - at))
            for row in range(0, sizes.q, wide)
            for at in range(0, fan * sizes.kv, size)
        ]
        variants = (
            (WHOLE, tuple(Piece(*place, ()) for place in places)),
            (MASKED, tuple(Piece(*place, ((0, place[3]),)) for place in places)),
        )
    else:
        parts = sizes.q // strip, sizes.kv // strip
        variants = tuple(
            (code, tuple(pieces_of(pattern_of(code, codes.patterns, *parts), strip, longest)))
            for code in sorted(codes.used - {SKIP})
        )
    num_q, num_kv = sizes.count(call.q_len, call.kv_len)
    q_len, kv_len = num_q * sizes.q, num_kv * sizes.kv
    starts = _starts(tokens)
    masked = any(piece.masked for _, pieces in variants for piece in pieces)
    return Plan(
        call,
        tiles,
        sizes,
        codes,
        variants,
        starts,
        _num_words(call) if masked and starts is None else (0, 0),
        call.kv_len % sizes.kv != 0,
        fan,
        0 if tokens.blocks is None else tokens.blocks.kv_blocks.shape[-1],
        _layout(q_len, call.head_dim),
        _layout(kv_len, call.head_dim),
        _layout(kv_len, call.value_dim),
        _layout(q_len, call.value_dim),
    )


def _longest_piece(block: int, strip: int, tiles: FlashTiles) -> int:
    """Keys of a piece: such that a block is at least four, or there is nothing to overlap."""
    return min(tiles.piece, max(LANES, block // (4 * strip) // LANES * LANES, strip))


def _layout(length: int, head_dim: int) -> Layout:
    return Layout(length, -(-head_dim // SUBLANES) * SUBLANES, head_dim % LANES == 0)


def _num_words(call: AttentionCall) -> tuple[int, int]:
    some = np.zeros(1, np.int32)
    return len(call.mask.q_words(some)), len(call.mask.kv_words(some))


def _starts(tokens: Tokens) -> tuple[int, int] | None:
    starts = []
    for positions in (tokens.q_positions, tokens.kv_positions):
        if not isinstance(positions, np.ndarray) or len(positions) > 1:
            return None
        start = int(positions[0, 0])
        if not np.array_equal(positions[0], start + np.arange(positions.shape[1])):
            return None
        starts.append(start)
    return starts[0], starts[1]


# --- positions and segment ids, as arrays of the kernel and as what it reads of them ------------


def token_operands(plan: Plan, tokens: Tokens) -> list[tuple[jax.Array, pl.BlockSpec, bool]]:
    """(array, spec, whether it is the key side's): the mask's words unless positions count up or no
    block is masked, then segment ids if there are any; of queries, then of keys each.

    Queries lie in lanes, [b, 1, length]. Keys lie in sublanes, [b, length, lanes] with every lane
    the same, because a column of one lane costs as much memory. The index maps take (batch, query
    block, key block).
    """
    queries: list[Any] = []
    keys: list[Any] = []
    if any(plan.num_words):
        queries += plan.call.mask.q_words(tokens.q_positions)
        keys += plan.call.mask.kv_words(tokens.kv_positions)
    if tokens.q_segment_ids is not None:
        queries.append(tokens.q_segment_ids)
        keys.append(tokens.kv_segment_ids)
    operands = []
    for q in queries:
        q = _pad_tokens(jnp.asarray(q), plan.query.length)[:, None]
        spec = pl.BlockSpec((None, 1, plan.sizes.q), _rows_of_batch(q, lanes=True))
        operands.append((q, spec, False))
    for kv in keys:
        kv = _pad_tokens(jnp.asarray(kv), plan.key.length)
        spec = pl.BlockSpec((None, plan.sizes.kv, LANES), _rows_of_batch(kv, lanes=False))
        operands.append((jnp.broadcast_to(kv[..., None], (*kv.shape, LANES)), spec, True))
    return operands


def _pad_tokens(x: jax.Array, length: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))


def _rows_of_batch(x: jax.Array, *, lanes: bool) -> Any:
    shared = x.shape[0] == 1

    def index(batch: Any, q: Any, kv: Any) -> tuple[Any, Any, Any]:
        batch = 0 if shared else batch
        return (batch, 0, q) if lanes else (batch, kv, 0)

    return index


def read_places(
    plan: Plan, refs: Sequence[Any], q_block: Any, kv_blocks: Sequence[Any], num_present: Any
) -> Places:
    """Readers of the operands of `token_operands`, of which the key side is there once for each of
    the step's key blocks. kv_blocks: their ids. num_present: how many of them count."""
    sizes, ids = plan.sizes, kv_blocks
    mask, num_q_words = plan.call.mask, plan.num_words[0]
    num_of_queries = num_q_words + plan.call.has_segments
    of_queries = [_reader_of_lanes(ref) for ref in refs[:num_of_queries]]
    of_keys = [_reader_of_rows(ref) for ref in refs[num_of_queries:]]
    by_key_array = [
        _across(of_keys[at : at + len(ids)], sizes.kv) for at in range(0, len(of_keys), len(ids))
    ]
    if plan.starts is not None:
        q_start = plan.starts[0] + q_block * sizes.q
        kv_positions = _across([_counting(plan.starts[1] + b * sizes.kv) for b in ids], sizes.kv)

        def q_words(at: int, size: int) -> tuple[jax.Array, ...]:
            return mask.q_words(q_start + at + lax.broadcasted_iota(jnp.int32, (1, size), 1))

        def kv_words(at: int, size: int) -> tuple[jax.Array, ...]:
            return mask.kv_words(kv_positions(at, size))

    else:
        num_kv_words = plan.num_words[1]

        def q_words(at: int, size: int) -> tuple[jax.Array, ...]:
            return tuple(read(at, size) for read in of_queries[:num_q_words])

        def kv_words(at: int, size: int) -> tuple[jax.Array, ...]:
            return tuple(read(at, size) for read in by_key_array[:num_kv_words])

    q_ids = kv_ids = present = None
    if plan.call.has_segments:
        q_ids, kv_ids = of_queries[-1], by_key_array[-1]
    if plan.ragged or plan.fan > 1:
        left = [plan.call.kv_len - block * sizes.kv for block in ids]
        if plan.fan > 1:
            left = [jnp.where(slot < num_present, n, 0) for slot, n in enumerate(left)]
        present = _across([_fewer_than(n) for n in left], sizes.kv)
    return Places(q_words, kv_words, q_ids, kv_ids, present)


def _counting(start: Any) -> Any:
    return lambda at, size: start + at + lax.broadcasted_iota(jnp.int32, (size, 1), 0)


def _fewer_than(count: Any) -> Any:
    return lambda at, size: at + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < count


def _reader_of_lanes(ref: Any) -> Any:
    return lambda at, size: ref[:, pl.ds(at, size)]


def _reader_of_rows(ref: Any) -> Any:
    return lambda at, size: ref[pl.ds(at, size), 0:1]


def rows_of(ref: Any) -> Any:
    """A reader of rows [start, start + size)."""
    return lambda at, size: ref[pl.ds(at, size), :]


def _across(readers: Sequence[Any], block: int) -> Any:
    if len(readers) == 1:
        return readers[0]

    def read(at: int, size: int) -> jax.Array:
        parts = []
        for i, reader in enumerate(readers):
            first, last = max(at, i * block), min(at + size, (i + 1) * block)
            if first < last:
                parts.append(reader(first - i * block, last - first))
        return jnp.concatenate(parts, 0)

    return read


# --- what both passes share of `pallas_call` ------------------------------------------------------


class Walk(NamedTuple):
    """A `Visits` as the grid reads it. words: flat, in scalar memory: places, infos, and where a
    step takes several key blocks (fan > 1) the blocks of each entry, one after the other."""

    words: tuple[jax.Array, ...]
    batch_stride: int
    num_lists: int
    heads_per_list: int
    length: int
    fan: int

    def entry(self, batch: Any, head: Any, step: Any) -> Any:
        """Where the words of a grid step stand."""
        # Read for every operand of every step: a product with what is known to be 0 is left out.
        entry = step
        if self.num_lists > 1:
            entry += head // self.heads_per_list * self.length
        if self.batch_stride:
            entry += batch * self.batch_stride
        return entry

    def kv_block(self, words: Sequence[Any], entry: Any, slot: int) -> Any:
        """The id of a step's key block."""
        if self.fan > 1:
            return words[2][entry * self.fan + slot]
        return words[0][entry] >> KV_SHIFT


def make_walk(plan: Plan, *, keys_first: bool) -> Walk:
    """keys_first: by key blocks, for a grid over kv heads; else by query blocks, over all heads."""
    call = plan.call
    gathered: tuple[Any, ...] = ()
    if plan.fan > 1:
        listed, blocks = gathered_visits(plan.codes, plan.fan, plan.longest)
        gathered = (blocks,)
    else:
        listed = visits(
            plan.codes, keys_first=keys_first, num_kv_heads=call.num_kv_heads, group=call.group
        )
    num_batch, num_lists, length = listed.places.shape
    num_heads = call.num_kv_heads if keys_first else call.num_heads
    return Walk(
        tuple(jnp.asarray(x).reshape(-1) for x in (*listed, *gathered)),
        num_lists * length if num_batch > 1 else 0,
        num_lists,
        num_heads // num_lists,
        length,
        plan.fan,
    )


def compiler_params(num_parallel: int, vmem: int) -> pltpu.CompilerParams:
    semantics = (pltpu.PARALLEL,) * num_parallel + (pltpu.ARBITRARY,)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem)
