"""A window needs no more than the rows before a device's own."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from effattn.masks import And, Mask, Window
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.hops import attend, permuted
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries, is_causal


@dataclass(frozen=True)
class Halo(OverSequence):
    """Under a window, every device gets the rows before its own that the window reaches."""

    def check(self, ways: int, seq_len: int, num_heads: int, mask: Mask) -> None:
        if reach(mask) is None or not is_causal(mask):
            raise ValueError(
                f"mask: got {mask}, expected Causal() & Window(left=...) for a halo: without a "
                "window every earlier token is seen"
            )

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        size, window = keys.key.shape[1], reach(pair.mask)
        assert window is not None
        if keys.segment_ids is None:
            # What a device without a neighbour gets is zeros, and segment 0 is padding.
            ones = jnp.ones(keys.key.shape[:2], jnp.int32)
            queries, keys = queries._replace(segment_ids=ones), keys._replace(segment_ids=ones)
        # One row of ids and positions may serve all rows of the batch.
        parts = [keys]
        for hop in range(1, min(ways - 1, -(-window // size)) + 1):
            rows = min(size, window - (hop - 1) * size)
            ahead = [(i, i + hop) for i in range(ways - hop)]
            tail = jax.tree.map(lambda x, rows=rows: x[:, size - rows :], keys)
            parts.insert(0, permuted(tail, self.axis, ahead))
        joined = Keys(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
        return attend(pair, queries, joined)


def reach(mask: Mask) -> int | None:
    """How many positions before a query its mask may see, as far as its form tells."""
    if isinstance(mask, And):
        both = [r for r in (reach(mask.left), reach(mask.right)) if r is not None]
        return min(both) if both else None
    return mask.left if isinstance(mask, Window) else None
