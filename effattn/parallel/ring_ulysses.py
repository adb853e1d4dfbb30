"""Ring x Ulysses: heads are exchanged among near devices, keys go round among far ones."""

from dataclasses import dataclass

import jax
import numpy as np

from effattn.checks import check_multiple
from effattn.masks import Mask
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries, RingSpec, is_causal, ring_attention
from effattn.parallel.ring_strategy import ORDER_BOUND, zigzag_order
from effattn.parallel.ulysses import by_heads, by_tokens


@dataclass(frozen=True)
class RingUlysses(OverSequence):
    """Of N devices along the axis, `degree` neighbours exchange heads (Ulysses); the N / degree
    groups form a ring, each of whose members holds `degree` times the tokens of 1 / degree heads.

    Bytes received, forward: (N / degree - 1) kv + (degree - 1) / degree (2 q + kv). zigzag,
    devices, gradient_dtype: as of `Ring`; the zigzag is one of the groups. Source: Fang and Zhao
    2024, USP (arXiv 2405.07719).
    """

    degree: int = 2
    zigzag: bool = False
    gradient_dtype: str = "float32"
    devices: int = 1

    def order(self, seq_len: int) -> np.ndarray | None:
        if not self.zigzag or self.devices <= self.degree:
            return None
        check_multiple("seq_len", seq_len, "2 x mesh axis 'sequence'", 2 * self.devices)
        return zigzag_order(seq_len, self.devices // self.degree)

    def check_order(self) -> None:
        if self.zigzag:
            raise ValueError(ORDER_BOUND)

    def check(self, ways: int, seq_len: int, num_heads: int, mask: Mask) -> None:
        check_multiple(f"mesh axis {self.axis!r}", ways, "sequence.ulysses", self.degree)
        check_multiple("num_heads on a device", num_heads, "sequence.ulysses", self.degree)
        if self.zigzag and ways != self.devices:
            raise ValueError(
                f"sequence.devices: got {self.devices}, expected the {ways} devices of mesh axis "
                f"{self.axis!r}: the order of the tokens hangs on them"
            )

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        near = [list(range(i, i + self.degree)) for i in range(0, ways, self.degree)]
        zigzag = self.zigzag and is_causal(pair.mask)
        spec = RingSpec(
            self.axis,
            ways // self.degree,
            pair,
            zigzag,
            gradient_dtype=self.gradient_dtype,
            stride=self.degree,
        )
        out, lse = ring_attention(spec, *by_heads(queries, keys, self.axis, self.degree, near))
        return by_tokens(out, self.axis, near), by_tokens(lse, self.axis, near)
