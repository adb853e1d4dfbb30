"""What strategies do with the arrays of a part: attend, send on, bring together."""

from typing import Any

import jax

from effattn.pallas_kernels.attention import attention
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.ring import Keys, Queries

Groups = list[list[int]] | None


def attend(pair: AttentionPair, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    return attention(
        queries.query,
        keys.key,
        keys.value,
        mask=pair.mask,
        q_positions=queries.positions,
        kv_positions=keys.positions,
        q_segment_ids=queries.segment_ids,
        kv_segment_ids=keys.segment_ids,
        scale=pair.scale,
        logit_soft_cap=pair.logit_soft_cap,
        implementation=pair.implementation,
        return_lse=True,
    )


def permuted(tree: Any, axis: str, pairs: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def gathered(tree: Any, axis: str, groups: Groups = None) -> Any:
    """Tokens of all devices of the axis, or of each of `groups`."""
    return jax.tree.map(
        lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True, axis_index_groups=groups), tree
    )
