"""All keys on every device: the plainest way."""

from dataclasses import dataclass

import jax

from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.hops import attend, gathered
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries


@dataclass(frozen=True)
class GatherKeys(OverSequence):
    """Every device gets all keys and values: the plainest way, and the most memory."""

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        return attend(pair, queries, Keys(*gathered(keys, self.axis)))
