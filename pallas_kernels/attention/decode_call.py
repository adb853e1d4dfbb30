"""What is known of a decode call before it runs, its arrays, and which blocks of a cache it needs.

A cache is cut into blocks of slots. The mask, the lengths and the positions say for every row which
blocks hold a key that a query of the row may see; a backend reads those and no others.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSizes, block_table
from effattn.masks import Mask


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
    """EMPTY, PARTIAL or FULL for each block of `block` slots of each row: int32 [batch, blocks]."""
    slots = jnp.arange(call.cache_len, dtype=jnp.int32)
    kinds = block_table(
        call.mask,
        places.q_positions,
        places.of_slots(call.cache_len),
        jnp.ones_like(places.q_positions),
        # Slots past the length are padding, which belongs to no segment.
        (slots < places.lengths[:, None]).astype(jnp.int32),
        sizes=BlockSizes(call.q_len, block),
    )
    return jnp.broadcast_to(kinds[:, 0], (call.batch, kinds.shape[-1]))


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
