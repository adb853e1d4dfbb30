"""Block sizes of a call on a TPU, and what they cost of its memories.

No Pallas here: a call on any machine asks whether the TPU kernels would take it.
"""

from effattn.blocks import BlockSizes, block_table
from effattn.masks import EMPTY
from effattn.pallas_kernels.attention.call import AttentionCall
from effattn.pallas_kernels.tuning import LANES, FlashTiles

# Entries of all lists of a call: two words each must fit the scalar memory.
MAX_ENTRIES = 2**16


def block_sizes(call: AttentionCall, tiles: FlashTiles) -> BlockSizes:
    """The sizes a call is cut into: the caller's, or as even as the tiles allow."""
    if call.block_sizes is not None:
        return call.block_sizes
    return BlockSizes(_even(call.q_len, tiles.q), _even(call.kv_len, tiles.kv))


def vmem_bytes(call: AttentionCall, sizes: BlockSizes, tiles: FlashTiles) -> int:
    """What the larger of the two passes needs, without the dq of a whole head.

    Blocks that come and go are there twice. The pieces in flight are an estimate: with it the sum
    is within a quarter of what the compiler reports (`tests/test_attention_tpu.py`).
    """
    query, value = (-(-x // LANES) * LANES for x in (call.head_dim, call.value_dim))
    width = query + value
    itemsize = 4 if call.dtype is None else call.dtype.itemsize
    keys = max(sizes.kv, tiles.gathered if sizes.kv < tiles.piece else 0)
    streamed = 2 * itemsize * width * (sizes.q + keys) + 2 * 8 * 4 * 2 * sizes.q
    if call.has_segments or call.q_positions is None or call.kv_positions is None:
        streamed += 2 * 2 * 4 * LANES * keys
    pieces = (tiles.pipeline + 1) * 4 * min(tiles.strip, sizes.q) * min(tiles.piece, keys)
    forward = streamed + pieces + sizes.q * (4 * value + itemsize * query)
    backward = streamed + 2 * pieces + keys * width * (2 * itemsize + 4)
    backward += query * (4 * sizes.q + itemsize * keys)
    return max(forward, backward)


def _even(length: int, limit: int) -> int:
    """The shortest block of whole lanes that covers `length` in as few blocks as `limit` does.

    Of whole strips where that pads by less than one in eight.
    """
    count = -(-length // limit)
    block = -(-length // (count * LANES)) * LANES
    strips = -(-block // (2 * LANES)) * 2 * LANES
    return strips if (strips - block) * 8 <= block else block


def num_entries(call: AttentionCall, sizes: BlockSizes) -> int:
    """A bound on the entries of all lists of a call, for one query head of each group."""
    num_q, num_kv = sizes.count(call.q_len, call.kv_len)
    pairs = num_q * num_kv
    if call.q_positions is not None and call.kv_positions is not None:
        positions = call.q_positions.array, call.kv_positions.array
        kinds = block_table(call.mask, *positions, sizes=sizes)
        pairs = int((kinds != EMPTY).any(0).sum())
    lists = 1
    if call.has_segments or call.q_positions is None or call.kv_positions is None:
        lists = call.batch
    if call.selection is not None:
        batch, heads, _, most = call.selection
        pairs = min(pairs, num_q * most)
        lists = max(lists, batch) * heads
    return lists * (pairs + max(num_q, num_kv))
