"""The ring as a strategy, and the order of tokens that gives all its devices the same work."""

from dataclasses import dataclass

import jax
import numpy as np

from effattn.checks import check_multiple
from effattn.masks import Mask
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries, RingSpec, is_causal, ring_attention

ORDER_BOUND = (
    "sequence.zigzag: got True, expected False with layers that read tokens in order: a state "
    "passes from each token to the next, and zigzag parts them"
)


@dataclass(frozen=True)
class Ring(OverSequence):
    """Keys and values pass by, see `effattn.parallel.ring`.

    zigzag: the rows come in the order of `order`, for devices along the axis; then nothing of a
    model may depend on which token stands beside which, but attention. devices: along the axis,
    which `order` has to know before there is a mesh.
    """

    zigzag: bool = False
    both_ways: bool = False
    gradient_dtype: str = "float32"
    devices: int = 1

    def order(self, seq_len: int) -> np.ndarray | None:
        if not self.zigzag or self.devices == 1:
            return None
        return zigzag_order(seq_len, self.devices)

    def check(self, ways: int, seq_len: int, num_heads: int, mask: Mask) -> None:
        if self.zigzag:
            check_multiple("seq_len", seq_len, f"2 x mesh axis {self.axis!r}", 2 * ways)
            if ways != self.devices:
                raise ValueError(
                    f"sequence.devices: got {self.devices}, expected the {ways} devices of mesh "
                    f"axis {self.axis!r}: the order of the tokens hangs on them"
                )
        if self.both_ways:
            check_multiple("seq_len", seq_len, f"2 x mesh axis {self.axis!r}", 2 * ways)

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        zigzag = self.zigzag and is_causal(pair.mask) and not self.both_ways
        spec = RingSpec(self.axis, ways, pair, zigzag, self.both_ways, self.gradient_dtype)
        return ring_attention(spec, queries, keys)

    def check_order(self) -> None:
        if self.zigzag:
            raise ValueError(ORDER_BOUND)


def zigzag_order(seq_len: int, devices: int) -> np.ndarray:
    """Which token stands at each place: device i gets chunks i and 2 N - 1 - i of 2 N.

    Raises ValueError where the chunks do not come out even.
    """
    check_multiple("seq_len", seq_len, "2 x devices", 2 * devices)
    chunks = np.arange(seq_len).reshape(2 * devices, -1)
    places = [[i, 2 * devices - 1 - i] for i in range(devices)]
    return chunks[np.ravel(places)].reshape(-1)
