"""Decay factors inside one chunk of c tokens, as exponentials whose exponents never exceed 0.

The exponent between tokens j <= i is the sum of log_decay over j + 1 .. i. exp(G_i) / exp(G_j) with
cumulative sums G overflows, and exp(G_i - G_j) loses digits where G is large, so sums start afresh
every 16 tokens:  exponent(i, j) = local_i + (sum of whole blocks from j's to i's - local_j).
Masks act on exponents: exp first and mask later makes inf * 0 = nan, in gradients too.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK = 16


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
    """Exponents of [b, g, r, c, ...] decays; c is padded to whole blocks with zeros."""

    def __init__(self, log_decay: jax.Array):
        b, g, r, length, *channels = log_decay.shape
        blocks = -(-length // _BLOCK)
        padding = [(0, 0)] * 3 + [(0, blocks * _BLOCK - length)] + [(0, 0)] * len(channels)
        padded = jnp.pad(log_decay, padding).reshape(b, g, r, blocks, _BLOCK, *channels)
        self.local = jnp.cumsum(padded, axis=4)  # [b, g, r, blocks, 16, ...]
        whole = self.local[:, :, :, :, -1]
        i, j, k = np.ogrid[: blocks + 1, :blocks, :blocks]
        inside = ((j <= k) & (k < i)).reshape(*(blocks + 1, blocks, blocks), *(1 for _ in channels))
        between = jnp.where(inside, whole[:, :, :, None, None], 0).sum(axis=5)
        # Sum from after token j to before block i, for j in any block up to i: [.., i, j, ...]
        to_block = between[..., None, :] if channels else between[..., None]
        to_block = to_block - self.local[:, :, :, None]
        self.to_block = to_block.reshape(b, g, r, blocks + 1, blocks * _BLOCK, *channels)
        since = between[:, :, :, :-1, 0]
        since = (since[..., None, :] if channels else since[..., None]) + self.local
        since = since.reshape(b, g, r, blocks * _BLOCK, *channels)
        self.since_entry = jnp.exp(since[:, :, :, :length])
        self.until_exit = jnp.exp(self.to_block[:, :, :, -1, :length])
        self.total = jnp.exp(between[:, :, :, -1, 0])


class _TokenDecay(_BlockSums):
    def factors(self, start: int, stop: int) -> jax.Array:
        """[b, g, r, stop - start, stop], 0 where the key is later than the query."""
        i = slice(start // _BLOCK, -(-stop // _BLOCK))
        exponent = self.local[:, :, :, i, :, None] + self.to_block[:, :, :, i, None, :stop]
        exponent = exponent.reshape(*exponent.shape[:3], -1, stop)[:, :, :, : stop - start]
        causal = np.arange(start, stop)[:, None] >= np.arange(stop)
        return jnp.exp(jnp.where(causal, exponent, -jnp.inf))


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
        local = self.local[:, :, :, i]

        earlier = np.arange(blocks * _BLOCK) // _BLOCK < np.arange(blocks)[i, None]
        to_block = self.to_block[:, :, :, i, : blocks * _BLOCK]
        keys = key[:, :, :, None] * jnp.exp(jnp.where(earlier[..., None], to_block, -jnp.inf))
        between = jnp.einsum("bgriad,bgrijd->bgriaj", query_i * jnp.exp(local), keys)

        causal = np.tri(_BLOCK, dtype=bool)[..., None]
        pairs = local[..., :, None, :] - local[..., None, :, :]
        pairs = jnp.exp(jnp.where(causal, pairs, -jnp.inf))
        within = (query_i[..., :, None, :] * key_i[..., None, :, :] * pairs).sum(axis=-1)
        diagonal = np.eye(blocks, dtype=within.dtype)[i, None, :, None]
        within = (within[..., :, :, None, :] * diagonal).reshape(between.shape)

        scores = (between + within).reshape(*between.shape[:3], -1, blocks * _BLOCK)
        return scores[:, :, :, : stop - start, :stop]
