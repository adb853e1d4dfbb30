"""How the sequence axis is laid over devices: the ops of a layer go through one of these values.

A layer asks its strategy for attention instead of calling the op, so the same layer runs on one
device or on a ring. `Local` keeps whole sequences on each device.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from effattn.checks import check_in
from effattn.pallas_kernels.attention import (
    attention,
    decode_attention,
    neighborhood_attention,
)
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention


class SequenceParallel(Protocol):
    """A frozen, hashable strategy; layers hold it as a static attribute."""

    def order(self, seq_len: int) -> np.ndarray | None:
        """The token permutation that the data loader applies once, or None for the plain order."""
        ...

    def attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.attention` over the whole sequence."""
        ...

    def neighborhood_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.neighborhood_attention` over the whole grid."""
        ...

    def decode_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.decode_attention` over the whole cache."""
        ...

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        """`effattn.pallas_kernels.linear_attention.linear_attention` over the whole sequence."""
        ...


@dataclass(frozen=True)
class Local:
    """Every device holds whole sequences."""

    def order(self, seq_len: int) -> None:
        return None

    def attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return attention(query, key, value, **options)

    def decode_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return decode_attention(query, key, value, **options)

    def neighborhood_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return neighborhood_attention(query, key, value, **options)

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        return linear_attention(query, key, value, **options)


@dataclass(kw_only=True)
class SequenceConfig:
    """Plain fields that name a strategy. kind: "local"."""

    kind: str = "local"

    def build(self) -> SequenceParallel:
        """Raises ValueError for an unknown kind."""
        check_in("sequence.kind", self.kind, ["local"])
        return Local()
