"""Decay factors inside one chunk of c tokens: exponentials whose exponents never exceed 0.

The exponent between tokens j <= i is the sum of log_decay over j + 1 .. i. With running sums G,
exp(G_i) / exp(G_j) overflows, exp(G_i - G_j) loses digits where G is large, and masking after exp
makes inf * 0 = nan. So the chunk is cut in blocks of 16: exponents inside a block are sums of their
own terms, and a factor between blocks is (start of i's block to i) x (after j to that start).
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 16


def check_log_decay(log_decay: jax.Array) -> None:
    """Raises ValueError for a number above 0, where the numbers are known."""
    if isinstance(log_decay, jax.core.Tracer) or not getattr(
        log_decay, "is_fully_addressable", True
    ):
        return
    largest = np.asarray(log_decay).max()  # with jnp it would become a tracer inside a trace
    if not largest <= 0:
        raise ValueError(
            f"log_decay: got {float(largest)}, expected at most 0: a state decays, it never grows"
        )


class ChunkDecay(Protocol):
    """since_entry: exp of the sum over 0 .. i; until_exit: over j + 1 .. c - 1; total: over all.

    [g, r, c] or [b, g, r, c], per-channel decay with a last axis [d]; total without c.
    """

    since_entry: jax.Array
    until_exit: jax.Array
    total: jax.Array


def chunk_decay(kind: str, log_decay: Any, length: int, dtype: Any) -> Any:
    """None for kind "none", else the decay of a chunk.

    log_decay: [g, r] for "head", [b, g, r, c] for "token", [b, g, r, c, d] for "channel".
    """
    if kind == "none":
        return None
    # Below the smallest number exp() gives exactly 0; larger magnitudes only cost digits in sums.
    floor = 1.25 * math.log(jnp.finfo(dtype).tiny)
    log_decay = jnp.maximum(log_decay.astype(dtype), floor)
    if kind == "head":
        return _HeadDecay(log_decay, length)
    return (_ChannelDecay if kind == "channel" else _TokenDecay)(log_decay)


class _HeadDecay:
    def __init__(self, log_decay: jax.Array, length: int):
        self._rate = log_decay[..., None]  # [g, r, 1]
        index = np.arange(length)
        self.since_entry = jnp.exp(self._rate * (index + 1))
        self.until_exit = jnp.exp(self._rate * (length - 1 - index))
        self.total = jnp.exp(log_decay * length)

    def factors(self, start: int, stop: int) -> jax.Array:
        """[g, r, stop - start, stop], 0 where the key is later than the query."""
        distance = np.arange(start, stop)[:, None] - np.arange(stop)
        exponent = self._rate[..., None] * np.maximum(distance, 0)
        return jnp.exp(jnp.where(distance >= 0, exponent, -jnp.inf))


class _BlockSums:
    """Sums of [b, g, r, c, ...] log decays; c is padded to whole blocks with zeros.

    local: [.., blocks, 16, ...], from the block's start to token a. pairs: [.., blocks, 16, 16,
    ...], after token a' to a. to_block: [.., blocks, blocks 16, ...], after token j to the start of
    a later block, -inf for other blocks.
    """

    def __init__(self, log_decay: jax.Array):
        b, g, r, length, *channels = log_decay.shape
        blocks = -(-length // _BLOCK)
        padding = [(0, 0)] * 3 + [(0, blocks * _BLOCK - length)] + [(0, 0)] * len(channels)
        padded = jnp.pad(log_decay, padding).reshape(b, g, r, blocks, _BLOCK, *channels)

        def over_channels(mask):
            return mask.reshape(*mask.shape, *(1 for _ in channels))

        # Sums of the very terms, not differences of running sums: no digits are lost between terms
        # of unequal size.
        a, j, k = np.ogrid[:_BLOCK, :_BLOCK, :_BLOCK]
        inside = over_channels((j < k) & (k <= a))
        self.pairs = jnp.where(inside, padded[:, :, :, :, None, None], 0).sum(axis=6)
        self.local = jnp.cumsum(padded, axis=4)
        rest = jax.lax.cumsum(padded, axis=4, reverse=True)
        rest = jnp.concatenate([rest[:, :, :, :, 1:], jnp.zeros_like(rest[:, :, :, :, :1])], axis=4)
        whole = self.local[:, :, :, :, -1]
        i, j, k = np.ogrid[: blocks + 1, -1:blocks, :blocks]
        inside = over_channels((j < k) & (k < i))
        between = jnp.where(inside, whole[:, :, :, None, None], 0).sum(axis=5)  # [.., i, j + 1]

        since = self.local + jnp.expand_dims(between[:, :, :, :-1, 0], 4)
        since = since.reshape(b, g, r, blocks * _BLOCK, *channels)
        to_block = jnp.expand_dims(between[:, :, :, :, 1:], 5) + rest[:, :, :, None]
        to_block = to_block.reshape(b, g, r, blocks + 1, blocks * _BLOCK, *channels)
        earlier = np.arange(blocks * _BLOCK) // _BLOCK < np.arange(blocks)[:, None]
        self.to_block = jnp.where(over_channels(earlier), to_block[:, :, :, :-1], -jnp.inf)
        self.since_entry = jnp.exp(since[:, :, :, :length])
        self.until_exit = jnp.exp(to_block[:, :, :, -1, :length])
        self.total = jnp.exp(between[:, :, :, -1, 0])


class _TokenDecay(_BlockSums):
    def factors(self, start: int, stop: int) -> jax.Array:
        """[b, g, r, stop - start, stop], 0 or 1 where the key is later than the query."""
        blocks = -(-stop // _BLOCK)
        i = slice(start // _BLOCK, blocks)
        to_block = jnp.exp(self.to_block[:, :, :, i, None, : blocks * _BLOCK])
        factors = jnp.exp(self.local[:, :, :, i, :, None]) * to_block
        factors = factors + _on_diagonal(jnp.exp(self.pairs[:, :, :, i]), blocks)
        factors = factors.reshape(*factors.shape[:3], -1, blocks * _BLOCK)
        return factors[:, :, :, : stop - start, :stop]


class _ChannelDecay(_BlockSums):
    def scores(self, query: jax.Array, key: jax.Array, start: int, stop: int) -> jax.Array:
        """Decayed q.k, [b, g, r, stop - start, stop]; finite where the key is later than the query.

        query, key: [b, g, c, d]. Between blocks both factors of a product are bounded, so it is a
        matmul; inside a block the factor of each pair and channel is written out.
        """
        blocks = -(-stop // _BLOCK)
        i = slice(start // _BLOCK, blocks)
        padding = [(0, 0), (0, 0), (0, blocks * _BLOCK - stop), (0, 0)]
        query, key = (jnp.pad(x[:, :, :stop], padding)[:, :, None] for x in (query, key))
        by_block = (*query.shape[:3], blocks, _BLOCK, query.shape[-1])
        query_i, key_i = (x.reshape(by_block)[:, :, :, i] for x in (query, key))

        keys = key[:, :, :, None] * jnp.exp(self.to_block[:, :, :, i, : blocks * _BLOCK])
        queries = query_i * jnp.exp(self.local[:, :, :, i])
        scores = jnp.einsum("bgriad,bgrijd->bgriaj", queries, keys)
        pairs = jnp.exp(self.pairs[:, :, :, i])
        within = (query_i[..., :, None, :] * key_i[..., None, :, :] * pairs).sum(axis=-1)
        scores = scores + _on_diagonal(within, blocks)
        scores = scores.reshape(*scores.shape[:3], -1, blocks * _BLOCK)
        return scores[:, :, :, : stop - start, :stop]


def _on_diagonal(pairs: jax.Array, blocks: int) -> jax.Array:
    """[.., i, 16, 16] of the last i blocks -> [.., i, 16, blocks 16], 0 outside each own block."""
    own = np.eye(blocks, dtype=bool)[blocks - pairs.shape[-3] :, None, :, None]
    placed = jnp.where(own, pairs[..., :, :, None, :], 0)
    return placed.reshape(*pairs.shape[:-1], blocks * _BLOCK)
