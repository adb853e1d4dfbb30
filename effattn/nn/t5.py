"""T5's layers: unscaled attention with a learned bias per distance, gated GELU, no biases else.

Sources: Raffel et al. 2019 (arXiv 1910.10683); the gated MLP of T5 1.1, Shazeer 2020.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.layers import RMSNorm, statistics_dtype
from effattn.nn.param import Dense, normal, parameter

# What hides a key: a weight of 0 beside any visible one, and not so low that two of them overflow.
HIDDEN = -1e9

Keys = tuple[jax.Array, jax.Array]  # keys and values, [batch, slots, num_heads, head_dim]


def distance_buckets(
    distance: jax.Array, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> jax.Array:
    """int32 buckets of `distance` = key's position - query's: near ones exact, far ones by log.

    bidirectional: half of the buckets for later keys; else all for earlier ones, and later ones
    fall into bucket 0.
    """
    bucket = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    # float32, as the authors': a wider logarithm would put some distances into the next bucket.
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    ratio = ratio / jnp.log(jnp.float32(max_distance / exact)) * (num_buckets - exact)
    far = jnp.minimum(exact + ratio.astype(jnp.int32), num_buckets - 1)
    return (bucket + jnp.where(distance < exact, distance, far)).astype(jnp.int32)


class DistanceBias(nnx.Module):
    """A learned number per head and bucket of distance. table: [num_buckets, num_heads]."""

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        init_std: float,
        rngs: nnx.Rngs,
    ):
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.bidirectional = bidirectional
        self.table = parameter((num_buckets, num_heads), (None, "heads"), normal(init_std), rngs)

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """[batch, q], [batch, k] -> [batch, num_heads, q, k]."""
        buckets = distance_buckets(
            key_positions[:, None, :] - query_positions[:, :, None],
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.moveaxis(self.table[...][buckets], -1, 1)


def softmax_or_one_more(scores: jax.Array, one_more: bool) -> jax.Array:
    """softmax over the last axis; one_more: with 1 added to the denominator, so that a query may
    attend to nothing. Source: Miller 2023, "Attention is off by one".
    """
    if not one_more:
        return jax.nn.softmax(scores, axis=-1)
    largest = jnp.maximum(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), 0)
    weights = jnp.exp(scores - largest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(-largest))


class T5Attention(nnx.Module):
    """`out(softmax(q k^T + bias) v)`, without 1 / sqrt(head_dim), which the start makes up for."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        softmax1: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.softmax1 = num_heads, softmax1
        inner = num_heads * head_dim
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        axes, std = ("embed", "heads"), width**-0.5
        query_init = normal((width * head_dim) ** -0.5)
        self.query = Dense(width, inner, axes, init=query_init, **options)
        self.key = Dense(width, inner, axes, init=normal(std), **options)
        self.value = Dense(width, inner, axes, init=normal(std), **options)
        self.out = Dense(inner, width, ("heads", "embed"), init=normal(inner**-0.5), **options)

    def keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of x, [batch, k, num_heads, head_dim] each."""
        heads = (*x.shape[:2], self.num_heads, -1)
        return self.key(x).reshape(heads), self.value(x).reshape(heads)

    def __call__(
        self, x: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(y, scores before the bias [batch, num_heads, q, k]).

        key, value: of `keys`, or a cache of them. bias: broadcastable to the scores; HIDDEN hides.
        """
        key, value = key.astype(x.dtype), value.astype(x.dtype)
        query = self.query(x).reshape(*x.shape[:2], self.num_heads, -1)
        wide = statistics_dtype(x.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
        weights = softmax_or_one_more(scores + bias, self.softmax1).astype(value.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(y.reshape(*x.shape[:2], -1)), scores


class T5MLP(nnx.Module):
    """`down(gelu(gate(x)) * up(x))`, GELU by tanh."""

    def __init__(self, width: int, mlp_width: int, *, dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        init = normal(width**-0.5)
        self.gate = Dense(width, mlp_width, ("embed", "mlp"), init=init, **options)
        self.up = Dense(width, mlp_width, ("embed", "mlp"), init=init, **options)
        init = normal(mlp_width**-0.5)
        self.down = Dense(mlp_width, width, ("mlp", "embed"), init=init, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class T5Block(nnx.Module):
    """Self-attention, cross-attention in a decoder, MLP: pre-norm residual branches."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        mlp_width: int,
        *,
        decoder: bool,
        softmax1: bool,
        eps: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        def norm() -> RMSNorm:
            return RMSNorm(width, eps=eps, dtype=dtype, rngs=rngs)

        def attention() -> T5Attention:
            options = {"softmax1": softmax1, "dtype": dtype, "rngs": rngs}
            return T5Attention(width, num_heads, head_dim, **options)

        self.self_norm, self.self_attention = norm(), attention()
        self.cross_norm = norm() if decoder else None
        self.cross_attention = attention() if decoder else None
        self.mlp_norm, self.mlp = norm(), T5MLP(width, mlp_width, dtype=dtype, rngs=rngs)


# ---- what is attended to across calls


class Memory(NamedTuple):
    """Keys and values that a decoder attends to: what it wrote so far, or what was encoded.

    keys: per decoder layer, (key, value) [batch, slots, num_heads, head_dim]. mask: added to the
    scores of each slot. positions, segments (0: empty): [batch, slots]. length: [batch].
    """

    keys: tuple[Keys, ...]
    mask: jax.Array
    positions: jax.Array
    segments: jax.Array
    length: jax.Array

    def slots(self, info: TokenInfo) -> jax.Array:
        """Where the valid tokens of `info` go, [batch, seq_len]; `slots` (nowhere) for others."""
        rank = jnp.cumsum(info.valid, axis=1, dtype=jnp.int32)
        slots = self.positions.shape[1]
        return jnp.where(info.valid, self.length[:, None] + rank - 1, slots)

    def note(self, mask: jax.Array, info: TokenInfo) -> "Memory":
        """With the tokens of `info` noted but for their keys and values."""
        slot = self.slots(info)
        return Memory(
            self.keys,
            write(self.mask, mask, slot),
            write(self.positions, info.positions, slot),
            write(self.segments, info.segments, slot),
            self.length + jnp.sum(info.valid, axis=1, dtype=jnp.int32),
        )


def write(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """old: [batch, slots, ...]; new: [batch, seq_len, ...]; a slot beyond the last is dropped."""
    row = jnp.arange(slot.shape[0])[:, None]
    return old.at[row, slot].set(new.astype(old.dtype), mode="drop")
