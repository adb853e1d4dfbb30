"""Routing attention's clusters: nearest centroids, how they move, attention among the nearest.

x is [batch, seq_len, num_heads, head_dim], centroids ("means") are unit vectors, [num_heads,
clusters, head_dim]. Source: Roy et al. 2020 (arXiv 2003.05997), Phil Wang's code.
"""

import jax
import jax.numpy as jnp

from effattn.batch import TokenInfo
from effattn.nn.layers import statistics_dtype


def unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, in float32 at least."""
    x = x.astype(statistics_dtype(x.dtype))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def similarities(x: jax.Array, means: jax.Array) -> jax.Array:
    """Cosines to the centroids, [batch, seq_len, num_heads, clusters]. means: unit vectors."""
    return jnp.einsum("bshd,hcd->bshc", unit(x), means)


def commit(
    x: jax.Array, means: jax.Array, valid: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """((sum, weight) of mean((unit x - its centroid)^2), sums of every cluster's unit vectors).

    The mean is over valid tokens and channels. Centroids have no gradient.
    """
    means = jax.lax.stop_gradient(means)
    units = unit(x)
    nearest = jnp.argmax(similarities(x, means), axis=-1)
    inside = jax.nn.one_hot(nearest, means.shape[1], dtype=units.dtype)
    inside = inside * valid[:, :, None, None]
    own = jnp.einsum("bshc,hcd->bshd", inside, means)
    off = jnp.where(valid[:, :, None, None], jnp.square(units - own), 0)
    weight = jnp.sum(valid, dtype=units.dtype) * (x.shape[2] * x.shape[3])
    members = jnp.einsum("bshc,bshd->hcd", inside, jax.lax.stop_gradient(units))
    return (jnp.sum(off), weight), members


def moved_means(means: jax.Array, members: jax.Array, decay: float) -> jax.Array:
    """decay means + (1 - decay) unit(members); a cluster without members keeps its centroid."""
    moved = decay * means + (1 - decay) * unit(members)
    empty = jnp.all(members == 0, axis=-1, keepdims=True)
    return jnp.where(empty, means, moved).astype(means.dtype)


def top_attention(
    heads: tuple[jax.Array, jax.Array, jax.Array],
    scores: tuple[jax.Array, jax.Array],
    memory: tuple[jax.Array, jax.Array],
    info: TokenInfo,
    *,
    window: int,
    scatter_eps: float = 1e-5,
) -> jax.Array:
    """The paper's: for every centroid the `window` nearest queries attend to the `window` nearest
    keys that are not later, and to the cluster's memory; a token in several clusters gets the mean
    of their answers, one in none 0.

    heads: query, key, value. scores: `similarities` of query and key. memory: keys and values,
    [num_heads, clusters, slots, head_dim]. Returns [batch, seq_len, num_heads, head_dim].
    """
    query, key, value = heads
    memory_key, memory_value = memory
    wide = statistics_dtype(query.dtype)
    low = jnp.finfo(wide).min
    valid = info.valid[:, None, None, :]

    def nearest(scores: jax.Array) -> jax.Array:
        """[batch, heads, clusters, window] places in the row."""
        by_cluster = jnp.where(valid, jnp.moveaxis(scores, 1, -1), low)
        return jax.lax.top_k(by_cluster, window)[1]

    def members(x: jax.Array, places: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x, 1, 2)  # [batch, heads, seq_len, head_dim]
        return jax.vmap(jax.vmap(lambda x, places: x[places]))(x, places)

    q_places, k_places = nearest(scores[0]), nearest(scores[1])
    q, k, v = members(query, q_places), members(key, k_places), members(value, k_places)
    scale = query.shape[-1] ** -0.5
    logits = scale * jnp.einsum("bhcqd,bhckd->bhcqk", q, k, preferred_element_type=wide)
    row = jnp.arange(len(q_places))[:, None, None, None]

    def of(numbers: jax.Array, places: jax.Array) -> jax.Array:
        return numbers[row, places]

    segments = info.segments
    seen = of(info.positions, q_places)[..., :, None] >= of(info.positions, k_places)[..., None, :]
    seen &= of(segments, q_places)[..., :, None] == of(segments, k_places)[..., None, :]
    seen &= (of(segments, k_places) != 0)[..., None, :]
    recalled = scale * jnp.einsum("bhcqd,hcmd->bhcqm", q, memory_key, preferred_element_type=wide)
    logits = jnp.concatenate([recalled, jnp.where(seen, logits, low)], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    slots = memory_key.shape[2]
    y = jnp.einsum("bhcqm,hcmd->bhcqd", weights[..., :slots], memory_value)
    y = y + jnp.einsum("bhcqk,bhckd->bhcqd", weights[..., slots:], v)

    def back(y: jax.Array, places: jax.Array) -> jax.Array:
        """One row and head: the mean over the clusters that a token is in."""
        flat = places.reshape(-1)
        total = (
            jnp.zeros((query.shape[1], y.shape[-1]), y.dtype).at[flat].add(y.reshape(len(flat), -1))
        )
        count = jnp.zeros((query.shape[1], 1), y.dtype).at[flat].add(1)
        return total / (count + scatter_eps)

    return jnp.swapaxes(jax.vmap(jax.vmap(back))(y, q_places), 1, 2)
