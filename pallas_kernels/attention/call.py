"""What is known of an attention call before it runs, the token arrays with it, and their checks."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSelection, BlockSizes
from effattn.checks import Dims, check_multiple, check_shape
from effattn.masks import Mask


class StaticArray:
    """A numpy array compared by value, so that a call that holds it can be a static argument."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._key = (array.shape, array.dtype.str, array.tobytes())
        self._hash = hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StaticArray) and self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"StaticArray(shape={self.array.shape})"


class Tokens(NamedTuple):
    """Where queries and keys stand. int32 [batch | 1, length], or None.

    As a backend gets it, positions are there, as numpy where they are known at trace time.
    Segment ids are both there or both None. blocks: a BlockSelection or None.
    """

    q_positions: Any
    kv_positions: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    blocks: BlockSelection | None


@dataclass(frozen=True)
class AttentionCall:
    """The static side of one call: what backends choose by, and what they compile for.

    dtype: of query, key and value where they share one, else None.
    accumulator: dtype of logits, statistics and sums. q_positions, kv_positions: None where they
    are traced. selection: the shape of `blocks.kv_blocks`. block_sizes: the caller's, those of
    `blocks` where there are any, None for the backend's own. returns_lse: False where nobody reads
    the lse, whose cotangent is then zero.
    """

    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype | None
    accumulator: np.dtype
    mask: Mask
    scale: float
    logit_soft_cap: float | None
    q_positions: StaticArray | None
    kv_positions: StaticArray | None
    has_segments: bool
    selection: tuple[int, ...] | None
    block_sizes: BlockSizes | None
    returns_lse: bool = True

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def has_blocks(self) -> bool:
        return self.selection is not None

    def with_rows(self, times: int) -> "AttentionCall":
        """The call with its batch repeated."""

        def repeated(x: StaticArray | None) -> StaticArray | None:
            if x is None or len(x.array) == 1:
                return x
            return StaticArray(np.tile(x.array, (times, 1)))

        return replace(
            self,
            batch=times * self.batch,
            q_positions=repeated(self.q_positions),
            kv_positions=repeated(self.kv_positions),
        )

    def with_positions(self, tokens: Tokens) -> Tokens:
        """`tokens` with the positions known at trace time put back as numpy."""
        if self.q_positions is not None:
            tokens = tokens._replace(q_positions=self.q_positions.array)
        if self.kv_positions is not None:
            tokens = tokens._replace(kv_positions=self.kv_positions.array)
        return tokens


def describe(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask,
    tokens: Tokens,
    *,
    scale: float | None,
    logit_soft_cap: float | None,
    block_sizes: BlockSizes | None,
    returns_lse: bool = True,
) -> tuple[AttentionCall, Tokens]:
    """The call, and `tokens` without what the call already holds. Arguments are checked."""
    blocks = tokens.blocks
    static = {}
    for name in ("q_positions", "kv_positions"):
        positions = getattr(tokens, name)
        static[name] = StaticArray(positions) if isinstance(positions, np.ndarray) else None
    call = AttentionCall(
        batch=query.shape[0],
        q_len=query.shape[1],
        kv_len=key.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype if query.dtype == key.dtype == value.dtype else None,
        accumulator=jnp.promote_types(
            jnp.result_type(query.dtype, key.dtype, value.dtype), jnp.float32
        ),
        mask=mask,
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        logit_soft_cap=None if logit_soft_cap is None else float(logit_soft_cap),
        has_segments=tokens.q_segment_ids is not None,
        selection=None if blocks is None else tuple(blocks.kv_blocks.shape),
        block_sizes=block_sizes if blocks is None else BlockSizes(blocks.q_block, blocks.kv_block),
        returns_lse=returns_lse,
        **static,
    )
    return call, tokens._replace(**{name: None for name, held in static.items() if held})


def check_arrays(query: Any, key: Any, value: Any) -> Dims:
    """Raises ValueError unless the three fit together; returns their dimensions by letter."""
    dims: Dims = {}
    check_shape("query", query, "b t n h", dims)
    check_shape("key", key, "b s k h", dims)
    check_shape("value", value, "b s k e", dims)
    check_multiple("query", dims["n"][0], "num_kv_heads", dims["k"][0])
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: got dtype {array.dtype}, expected a floating dtype")
        if 0 in array.shape:
            raise ValueError(
                f"{name}: got shape {tuple(array.shape)}, expected no axis of length 0"
            )
    return dims


def check_tokens(
    dims: Dims,
    q_positions: Any,
    kv_positions: Any,
    q_segment_ids: Any,
    kv_segment_ids: Any,
    blocks: BlockSelection | None,
) -> Tokens:
    """The token arrays with defaults filled in, each int32 [batch | 1, length]."""
    q_len, kv_len = dims["t"][0], dims["s"][0]
    same = q_len == kv_len
    if q_segment_ids is None and kv_segment_ids is not None:
        raise ValueError("q_segment_ids: got None, expected them because kv_segment_ids are given")
    for kind, q, kv in (
        ("positions", q_positions, kv_positions),
        ("segment_ids", q_segment_ids, kv_segment_ids),
    ):
        if q is not None and kv is None and not same:
            raise ValueError(
                f"kv_{kind}: got None, expected them because q_{kind} are given and "
                f"the lengths differ (query {q_len}, key {kv_len})"
            )
    if q_positions is None:
        q_positions = np.arange(q_len, dtype=np.int32)
        if kv_positions is None:
            kv_positions = np.arange(kv_len, dtype=np.int32)
    if kv_positions is None:
        kv_positions = q_positions
    if kv_segment_ids is None:
        kv_segment_ids = q_segment_ids
    if blocks is not None:
        _check_blocks(blocks, dims)
    return Tokens(
        _token_array("q_positions", q_positions, "t", dims),
        _token_array("kv_positions", kv_positions, "s", dims),
        _token_array("q_segment_ids", q_segment_ids, "t", dims, traced=True),
        _token_array("kv_segment_ids", kv_segment_ids, "s", dims, traced=True),
        blocks,
    )


def _token_array(name: str, array: Any, letter: str, dims: Dims, traced: bool = False) -> Any:
    if array is None:
        return None
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name}: got dtype {array.dtype}, expected an integer dtype")
    if array.ndim == 1:
        array = array[None]
    check_shape(name, array, f"1 {letter}" if array.shape[0] == 1 else f"b {letter}", dict(dims))
    return jnp.asarray(array, jnp.int32) if traced else array.astype(np.int32)


def _check_blocks(blocks: BlockSelection, dims: Dims) -> None:
    sizes = BlockSizes(blocks.q_block, blocks.kv_block)
    num_q_blocks, num_kv_blocks = sizes.count(dims["t"][0], dims["s"][0])
    shape = tuple(blocks.kv_blocks.shape)
    rows, heads = (1, dims["b"][0]), (1, dims["k"][0], dims["n"][0])
    fits = len(shape) == 4 and shape[0] in rows and shape[1] in heads and shape[2] == num_q_blocks
    if not fits:
        raise ValueError(
            f"blocks.kv_blocks: expected [batch=1 or {rows[1]}, heads=1, {heads[1]} or {heads[2]}, "
            f"num_q_blocks={num_q_blocks}, max_blocks], got {shape}"
        )
    for name, wanted in (("kinds", shape), ("counts", shape[:3])):
        if tuple(getattr(blocks, name).shape) != wanted:
            got = tuple(getattr(blocks, name).shape)
            raise ValueError(f"blocks.{name}: expected {wanted} from blocks.kv_blocks, got {got}")
    if not any(isinstance(x, jax.core.Tracer) for x in (blocks.kv_blocks, blocks.counts)):
        check_listed(blocks.kv_blocks, blocks.counts, num_kv_blocks)


def check_listed(kv_blocks: Any, counts: Any, num_kv_blocks: int) -> None:
    """Raises ValueError unless the entries that count are ids of key blocks.

    Their values must be known: inside jit they are not, and an id out of range is passed over.
    """
    kv_blocks, counts = np.asarray(kv_blocks), np.asarray(counts)
    listed = np.arange(kv_blocks.shape[-1]) < counts[..., None]
    wrong = kv_blocks[listed & ((kv_blocks < 0) | (kv_blocks >= num_kv_blocks))]
    if wrong.size:
        raise ValueError(
            f"blocks.kv_blocks: got block {wrong[0]}, expected ids from 0 to {num_kv_blocks - 1}"
        )
