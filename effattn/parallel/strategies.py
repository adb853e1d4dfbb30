"""The ways in which queries meet keys that lie on other devices, one class each.

| strategy | bytes received per device, forward | wants |
|---|---|---|
| `Ring` | (N - 1) kv | nothing; zigzag: a causal mask and an even part |
| `TokenRing` | (N - 1) (2 q + lse) | a link between any two devices |
| `Ulysses` | (N - 1) / N (2 q + kv) | query heads that N divides |
| `GatherKeys` | (N - 1) kv | memory for all keys |
| `Halo` | window rows of kv | a window |

kv and q: one device's keys and values, and queries. N: devices along the axis.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn.checks import check_multiple
from effattn.masks import And, Mask, Window
from effattn.pallas_kernels.attention import attention, merge
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import Keys, Queries, RingSpec, is_causal, ring_attention


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

    def check(self, ways: int, query: Any, key: Any, mask: Mask) -> None:
        if self.zigzag:
            check_multiple("seq_len", query.shape[1], f"2 x mesh axis {self.axis!r}", 2 * ways)
            if ways != self.devices:
                raise ValueError(
                    f"sequence.devices: got {self.devices}, expected the {ways} devices of mesh "
                    f"axis {self.axis!r}: the order of the tokens hangs on them"
                )
        if self.both_ways:
            check_multiple("seq_len", query.shape[1], f"2 x mesh axis {self.axis!r}", 2 * ways)

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        zigzag = self.zigzag and is_causal(pair.mask) and not self.both_ways
        spec = RingSpec(self.axis, ways, pair, zigzag, self.both_ways, self.gradient_dtype)
        return ring_attention(spec, queries, keys)

    def check_order(self) -> None:
        if self.zigzag:
            raise ValueError(
                "sequence.zigzag: got True, expected False with layers that read tokens in order: "
                "a state passes from each token to the next, and zigzag parts them"
            )


def zigzag_order(seq_len: int, devices: int) -> np.ndarray:
    """Which token stands at each place: device i gets chunks i and 2 N - 1 - i of 2 N.

    Raises ValueError where the chunks do not come out even.
    """
    check_multiple("seq_len", seq_len, "2 x devices", 2 * devices)
    chunks = np.arange(seq_len).reshape(2 * devices, -1)
    places = [[i, 2 * devices - 1 - i] for i in range(devices)]
    return chunks[np.ravel(places)].reshape(-1)


@dataclass(frozen=True)
class TokenRing(OverSequence):
    """Queries pass by the keys, and what they found returns to their owner at once.

    For networks that link any two devices: on a torus the way back grows with the distance. No
    fewer bytes than a ring of keys. Source: Wang et al. 2024, TokenRing (arXiv 2412.20501).
    """

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        sums = _attend(pair, queries, keys)
        one_on = [(i, (i + 1) % ways) for i in range(ways)]
        visitors = queries
        for hop in range(1, ways):
            visitors = _permuted(visitors, self.axis, one_on)
            found = _attend(pair, visitors, keys)
            back = [(i, (i - hop) % ways) for i in range(ways)]
            sums = merge(*sums, *_permuted(found, self.axis, back))
        return sums


@dataclass(frozen=True)
class Ulysses(OverSequence):
    """Every device gets all tokens of some heads, attends, and gives the tokens back.

    Key heads that N does not divide are repeated first. Source: Jacobs et al. 2023, DeepSpeed
    Ulysses (arXiv 2309.14509).
    """

    def check(self, ways: int, query: Any, key: Any, mask: Mask) -> None:
        check_multiple("num_heads", query.shape[2], f"mesh axis {self.axis!r}", ways)

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        kv_heads = keys.key.shape[2]
        repeats = math.lcm(kv_heads, ways) // kv_heads

        def by_heads(x: jax.Array, repeats: int = 1) -> jax.Array:
            x = x if repeats == 1 else jnp.repeat(x, repeats, axis=2)
            return jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)

        def by_tokens(x: jax.Array) -> jax.Array:
            return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)

        out, lse = _attend(
            pair,
            Queries(by_heads(queries.query), *_gathered(queries[1:], self.axis)),
            Keys(
                by_heads(keys.key, repeats),
                by_heads(keys.value, repeats),
                *_gathered(keys[2:], self.axis),
            ),
        )
        return by_tokens(out), by_tokens(lse)


@dataclass(frozen=True)
class GatherKeys(OverSequence):
    """Every device gets all keys and values: the plainest way, and the most memory."""

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        return _attend(pair, queries, Keys(*_gathered(keys, self.axis)))


@dataclass(frozen=True)
class Halo(OverSequence):
    """Under a window, every device gets the rows before its own that the window reaches."""

    def check(self, ways: int, query: Any, key: Any, mask: Mask) -> None:
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
            parts.insert(0, _permuted(tail, self.axis, ahead))
        joined = Keys(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
        return _attend(pair, queries, joined)


def reach(mask: Mask) -> int | None:
    """How many positions before a query its mask may see, as far as its form tells."""
    if isinstance(mask, And):
        both = [r for r in (reach(mask.left), reach(mask.right)) if r is not None]
        return min(both) if both else None
    return mask.left if isinstance(mask, Window) else None


def _attend(pair: AttentionPair, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
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


def _permuted(tree: Any, axis: str, pairs: list[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, pairs), tree)


def _gathered(tree: Any, axis: str) -> Any:
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), tree)
