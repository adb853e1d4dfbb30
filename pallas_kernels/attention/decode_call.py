"""What is known of a decode call before it runs, its arrays, and which blocks of a cache it needs.

A cache is cut into blocks of slots. The mask, the lengths and the positions say for every row which
blocks hold a key that a query of the row may see; a backend reads those and no others.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.masks import EMPTY, PARTIAL, Mask


@dataclass(frozen=True)
class DecodeCall:
    """The static side of one call: what backends choose by, and what they compile for.

    accumulator: dtype of logits, statistics and sums. num_splits: None for the backend's own.
    """

    batch: int
    q_len: int
    cache_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    query_dtype: np.dtype
    key_dtype: np.dtype
    value_dtype: np.dtype
    accumulator: np.dtype
    mask: Mask
    scale: float
    logit_soft_cap: float | None
    has_kv_positions: bool
    num_splits: int | None

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    def with_rows(self, times: int) -> "DecodeCall":
        """The call with its batch repeated."""
        return replace(self, batch=times * self.batch)


class Places(NamedTuple):
    """Where queries and slots stand, int32. lengths: [batch]; q_positions: [batch, q_len];
    kv_positions: [batch | 1, cache_len], None where a slot's index is its position."""

    lengths: jax.Array
    q_positions: jax.Array
    kv_positions: Any

    def of_slots(self, cache_len: int) -> jax.Array:
        """[batch | 1, cache_len]."""
        if self.kv_positions is not None:
            return self.kv_positions
        return jnp.arange(cache_len, dtype=jnp.int32)[None]


def block_kinds(call: DecodeCall, places: Places, block: int) -> jax.Array:
    """EMPTY, PARTIAL or FULL for each block of `block` slots of each row: int32 [batch, blocks].

    The last block is FULL only where the cache ends with it.
    """
    num_blocks = -(-call.cache_len // block)
    missing = num_blocks * block - call.cache_len

    def kinds_of_row(q_pos: jax.Array, kv_pos: Any) -> Any:
        return call.mask.block_kinds(q_pos[None], kv_pos)[0]

    if places.kv_positions is None:
        # As numpy: what a mask reads of the slots is then computed while tracing.
        slots = np.arange(num_blocks * block, dtype=np.int32).reshape(num_blocks, block)
        kinds = jax.vmap(lambda q_pos: kinds_of_row(q_pos, slots))(places.q_positions)
    else:
        # Edge padding repeats a real position, so no block's range grows by it.
        kv_pos = jnp.pad(places.kv_positions, ((0, 0), (0, missing)), mode="edge")
        kv_pos = kv_pos.reshape(-1, num_blocks, block)
        kv_pos = jnp.broadcast_to(kv_pos, (call.batch, *kv_pos.shape[1:]))
        kinds = jax.vmap(kinds_of_row)(places.q_positions, kv_pos)
    first = np.arange(num_blocks, dtype=np.int32) * block
    whole = first + block <= places.lengths[:, None]
    empty = first >= places.lengths[:, None]
    return jnp.where(empty, EMPTY, jnp.where(whole, kinds, jnp.minimum(kinds, PARTIAL)))


def merge_parts(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax from attention over disjoint parts of the keys: `merge` over a leading axis.

    out: [parts, ..., value_dim]; lse: [parts, ...], -inf where a part holds no key of the query.
    """
    largest = lse.max(0)
    reference = jnp.where(largest == -jnp.inf, 0, largest)
    weights = jnp.exp(lse - reference)
    total = weights.sum(0)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    merged = (out * (weights / total)[..., None]).sum(0)
    return merged, jnp.where(seen, reference + jnp.log(total), -jnp.inf)
