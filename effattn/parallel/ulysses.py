"""Ulysses: tokens are exchanged for heads before attention, and back after it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from effattn.checks import check_multiple
from effattn.masks import Mask
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.hops import Groups, attend, gathered
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries


@dataclass(frozen=True)
class Ulysses(OverSequence):
    """Every device gets all tokens of some heads, attends, and gives the tokens back.

    Key heads that N does not divide are repeated first. Source: Jacobs et al. 2023, DeepSpeed
    Ulysses (arXiv 2309.14509).
    """

    def check(self, ways: int, seq_len: int, num_heads: int, mask: Mask) -> None:
        check_multiple("num_heads on a device", num_heads, f"mesh axis {self.axis!r}", ways)

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        out, lse = attend(pair, *by_heads(queries, keys, self.axis, ways))
        return by_tokens(out, self.axis), by_tokens(lse, self.axis)


def by_heads(
    queries: Queries, keys: Keys, axis: str, ways: int, groups: Groups = None
) -> tuple[Queries, Keys]:
    """All tokens of this device's share of the heads; `ways` devices meet, in each of `groups`."""
    kv_heads = keys.key.shape[2]
    repeats = math.lcm(kv_heads, ways) // kv_heads

    def exchanged(x: jax.Array, repeats: int = 1) -> jax.Array:
        x = x if repeats == 1 else jnp.repeat(x, repeats, axis=2)
        return jax.lax.all_to_all(
            x, axis, split_axis=2, concat_axis=1, tiled=True, axis_index_groups=groups
        )

    return (
        Queries(exchanged(queries.query), *gathered(queries[1:], axis, groups)),
        Keys(
            exchanged(keys.key, repeats),
            exchanged(keys.value, repeats),
            *gathered(keys[2:], axis, groups),
        ),
    )


def by_tokens(x: jax.Array, axis: str, groups: Groups = None) -> jax.Array:
    """The way back, of [batch, all tokens, some heads, ...]."""
    return jax.lax.all_to_all(
        x, axis, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=groups
    )
