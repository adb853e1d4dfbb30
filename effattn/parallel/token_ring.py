"""TokenRing: keys stay, queries go round, and what they found comes straight back."""

from dataclasses import dataclass

import jax

from effattn.pallas_kernels.attention import merge
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.hops import attend, permuted
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries


@dataclass(frozen=True)
class TokenRing(OverSequence):
    """Queries pass by the keys, and what they found returns to their owner at once.

    For networks that link any two devices: on a torus the way back grows with the distance. No
    fewer bytes than a ring of keys. Source: Wang et al. 2024, TokenRing (arXiv 2412.20501).
    """

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        sums = attend(pair, queries, keys)
        one_on = [(i, (i + 1) % ways) for i in range(ways)]
        visitors = queries
        for hop in range(1, ways):
            visitors = permuted(visitors, self.axis, one_on)
            found = attend(pair, visitors, keys)
            back = [(i, (i - hop) % ways) for i in range(ways)]
            sums = merge(*sums, *permuted(found, self.axis, back))
        return sums
