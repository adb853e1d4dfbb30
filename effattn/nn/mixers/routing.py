"""Routing attention: every head sorts its queries and keys into clusters and attends inside them.

Clusters are the nearest of a head's centroids, which follow their members by a moving average. The
paper fills each cluster with the w queries and the w keys that are nearest to it, whatever their
number: a later token can push an earlier one out, so this is not causal (`membership="top"`).
Ours (`"nearest"`): a token is in the cluster of its nearest centroid, and of a cluster's keys those
count that came first. Source: Roy et al. 2020 (arXiv 2003.05997), Phil Wang's code.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.nn.clusters import commit, similarities, top_attention, unit
from effattn.nn.mixers.attention import KVCache
from effattn.nn.param import Dense, normal, parameter
from effattn.nn.rotary import rotary_tables, rotate
from effattn.parallel.sequence import Local, SequenceParallel

MEMBERSHIPS = ("nearest", "top")


@dataclass(kw_only=True)
class RoutingConfig:
    """window: "nearest": keys of a cluster that count, of one document, by arrival; None: all of
    them. "top": queries and keys of a cluster; None: seq_len / num_clusters.

    Queries and keys are routed before they turn by position. head_dim None: width / num_heads.
    rotary_dim None: the whole head. commitment: of the loss that draws tokens to their centroids.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    num_clusters: int = 8
    membership: str = "nearest"
    window: int | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    commitment: float = 1e-4
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Routing":
        """Raises ValueError where heads, widths or clusters do not fit together."""
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("num_clusters", self.num_clusters, 1)
        check_in("membership", self.membership, MEMBERSHIPS)
        if self.window is not None:
            check_at_least("window", self.window, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        check_multiple("rotary_dim", rotary_dim, "pairs", 2)
        return Routing(
            width,
            num_heads=self.num_heads,
            head_dim=head_dim,
            num_clusters=self.num_clusters,
            membership=self.membership,
            window=self.window,
            rotary_dim=rotary_dim,
            rotary_base=self.rotary_base,
            commitment=self.commitment,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence.local,
            dtype=dtype,
            rngs=rngs,
        )


class RoutingAux(NamedTuple):
    """commitment: (sum, weight) of the commitment loss. members: sums of the unit vectors of every
    cluster, [num_heads, num_clusters, head_dim], from which `moved_means` makes the next centroids.
    """

    commitment: tuple[jax.Array, jax.Array]
    members: jax.Array


class RoutingState(NamedTuple):
    """cache: keys and values of all tokens. clusters: int32 [batch, slots, num_heads], of the keys;
    -1: its cluster was full. counts: int32 [batch, num_heads, num_clusters], keys that came in the
    document `document` [batch].
    """

    cache: KVCache
    clusters: jax.Array
    counts: jax.Array
    document: jax.Array


class Routing(nnx.Module):
    """`out(clustered_attention(query(x), key(x), value(x)))`, no biases.

    A cluster holds tokens of a whole row: over a sequence axis XLA gathers what attention reads.

    means: [num_heads, clusters, head_dim] unit vectors, no gradient reaches them: a model moves
    them by `moved_means` at the end of a step. memory_key, memory_value: learned, so that no query
    is left without a key: "top" [num_heads, clusters, 1, head_dim], "nearest" one per head.
    """

    untrained = ("means",)

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        num_clusters: int,
        membership: str,
        window: int | None,
        rotary_dim: int,
        rotary_base: float,
        commitment: float,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.num_clusters = num_heads, head_dim, num_clusters
        # Whether the top w of a row are in a cluster hangs on all of its tokens.
        self.causal = self.decodes = self.packs = membership == "nearest"
        self.chooses = True
        self.window, self.commitment, self.sequence = window, commitment, sequence
        self.rotary_dim, self.rotary_base, self.dtype = rotary_dim, rotary_base, dtype

        def project() -> Dense:
            axes, init = ("embed", "heads"), normal(init_std)
            return Dense(width, num_heads * head_dim, axes, init=init, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        axes = ("heads", "embed")
        init = normal(out_init_std)
        self.out = Dense(num_heads * head_dim, width, axes, init=init, dtype=dtype, rngs=rngs)
        shape, names = (num_heads, num_clusters, head_dim), ("heads", None, None)
        self.means = parameter(shape, names, normal(head_dim**-0.5), rngs)
        clusters = num_clusters if membership == "top" else 1

        def memory() -> nnx.Param:
            shape, names = (num_heads, clusters, 1, head_dim), ("heads", None, None, None)
            return parameter(shape, names, normal(init_std), rngs)

        self.memory_key, self.memory_value = memory(), memory()

    def _centroids(self) -> jax.Array:
        return unit(jax.lax.stop_gradient(self.means[...]))

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = (*x.shape[:2], self.num_heads, self.head_dim)
        return tuple(f(x).reshape(heads) for f in (self.query, self.key, self.value))  # type: ignore[return-value]

    def _turn(self, query: jax.Array, key: jax.Array, info: TokenInfo) -> tuple[jax.Array, ...]:
        if not self.rotary_dim:
            return query, key
        tables = rotary_tables(info.positions, self.rotary_dim, self.rotary_base, query.dtype)
        return rotate(query, tables), rotate(key, tables)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: RoutingState | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingAux]:
        query, keys, value = self._project(x)
        means = self._centroids()
        both = jnp.concatenate([query, keys], axis=1)
        valid = jnp.concatenate([info.valid, info.valid], axis=1)
        (total, weight), members = commit(both, means, valid)
        aux = RoutingAux((self.commitment * total, weight), members)
        if state is not None:
            return self.prefill(x, info, state)[0], aux
        if not self.causal:
            seq_len = x.shape[1]
            window = max(1, seq_len // self.num_clusters) if self.window is None else self.window
            scores = similarities(query, means), similarities(keys, means)
            query, keys = self._turn(query, keys, info)
            slots = self.memory_key[...], self.memory_value[...]
            memory = slots[0].astype(self.dtype), slots[1].astype(self.dtype)
            window = min(window, seq_len)
            y = top_attention((query, keys, value), scores, memory, info, window=window)
            return self._finish(y, info), aux
        clusters = _nearest(query, means)
        key_clusters, _ = self._admit(_nearest(keys, means), info, None)
        query, keys = self._turn(query, keys, info)
        order = jnp.argsort(clusters, axis=1, stable=True), jnp.argsort(key_clusters, axis=1)
        y = self._attend(
            query, keys, value, info.positions, info.segments, clusters,
            info.positions, info.segments, key_clusters, order,
        )  # fmt: skip
        return self._finish(y, info), aux

    def _admit(
        self, clusters: jax.Array, info: TokenInfo, state: RoutingState | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(clusters with -1 for keys that found theirs full, (counts, document) after them)."""
        valid = info.segments != 0
        batch = len(valid)
        inside = jax.nn.one_hot(clusters, self.num_clusters, dtype=jnp.int32)
        inside = inside * valid[..., None, None]
        if state is None:
            counts = jnp.zeros((batch, self.num_heads, self.num_clusters), jnp.int32)
            document = jnp.zeros((batch,), jnp.int32)
        else:
            counts, document = state.counts, state.document
        index = jnp.where(valid, jnp.arange(valid.shape[1]), -1)
        last = jax.lax.cummax(index, axis=1)
        before = jnp.concatenate([jnp.full((batch, 1), -1), last[:, :-1]], axis=1)
        row = jnp.arange(batch)[:, None]
        previous = jnp.where(before < 0, document[:, None], info.segments[row, before])
        starts = (valid & (info.segments != previous))[..., None, None]
        came = counts[:, None] + jnp.cumsum(inside, axis=1)
        # Counts never fall: the largest at a start is that of the last one.
        base = jax.lax.cummax(jnp.where(starts, came - inside, 0), axis=1)
        came = came - base
        end = jnp.where(last[:, -1] < 0, document, info.segments[row[:, 0], last[:, -1]])
        rank = jnp.take_along_axis(came, clusters[..., None], axis=-1)[..., 0]
        if self.window is not None:
            clusters = jnp.where(rank <= self.window, clusters, -1)
        return clusters, (came[:, -1], end)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        q_positions: jax.Array,
        q_segments: jax.Array,
        q_clusters: jax.Array,
        kv_positions: jax.Array,
        kv_segments: jax.Array,
        kv_clusters: jax.Array,
        order: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Heads become rows: of each, a token's segment is its document and its cluster.

        order: [batch, len, num_heads] of queries and keys, by which they are laid, so that a
        cluster's tokens are neighbours and blocks of two clusters are empty.
        """
        batch, heads = query.shape[0], self.num_heads

        def rows(x: jax.Array, order: jax.Array | None) -> jax.Array:
            """[batch, len, heads, ...] -> [batch * heads, len, ...]"""
            if order is not None:
                x = jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 3)), 1)
            return jnp.swapaxes(x, 1, 2).reshape(batch * heads, x.shape[1], *x.shape[3:])

        def ids(segments: jax.Array, clusters: jax.Array) -> jax.Array:
            own = segments[..., None] * self.num_clusters + clusters
            return jnp.where((segments == 0)[..., None] | (clusters < 0), 0, own)

        def numbers(positions: jax.Array, clusters: jax.Array) -> jax.Array:
            return jnp.broadcast_to(positions[..., None], clusters.shape)

        first, second = (None, None) if order is None else order

        def memory(slots: jax.Array) -> jax.Array:
            slots = jnp.broadcast_to(slots[:, 0].astype(query.dtype), (batch, *slots[:, 0].shape))
            return slots.reshape(batch * heads, 1, 1, self.head_dim)

        y = self.sequence.attention(
            rows(query, first)[:, :, None],
            rows(key, second)[:, :, None],
            rows(value, second)[:, :, None],
            q_positions=rows(numbers(q_positions, q_clusters), first),
            kv_positions=rows(numbers(kv_positions, kv_clusters), second),
            q_segment_ids=rows(ids(q_segments, q_clusters), first),
            kv_segment_ids=rows(ids(kv_segments, kv_clusters), second),
            extra_key=memory(self.memory_key[...]),
            extra_value=memory(self.memory_value[...]),
        )
        y = jnp.swapaxes(y.reshape(batch, heads, -1, self.head_dim), 1, 2)
        if first is not None:
            y = jnp.take_along_axis(y, jnp.argsort(first, axis=1)[..., None], axis=1)
        return y

    def _finish(self, y: jax.Array, info: TokenInfo) -> jax.Array:
        y = checkpoint_name(y.astype(self.dtype), "mixer")
        return self.out(y.reshape(*y.shape[:2], -1))

    def init_state(self, batch: int, max_len: int, dtype: Any) -> RoutingState:
        self._check_decodes()
        heads = jnp.zeros((batch, max_len, self.num_heads, self.head_dim), dtype)
        numbers = jnp.zeros((batch, max_len), jnp.int32)
        none = jnp.zeros((batch,), jnp.int32)
        return RoutingState(
            KVCache(heads, heads, numbers, numbers, none),
            jnp.zeros((batch, max_len, self.num_heads), jnp.int32),
            jnp.zeros((batch, self.num_heads, self.num_clusters), jnp.int32),
            none,
        )

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: RoutingState
    ) -> tuple[jax.Array, RoutingState]:
        self._check_decodes()
        slots = state.cache.positions.shape[1]
        if x.shape[1] > slots:
            raise ValueError(f"prefill: got {x.shape[1]} tokens, expected at most max_len={slots}")
        query, key, value = self._project(x)
        means = self._centroids()
        clusters = _nearest(query, means)
        key_clusters, (counts, document) = self._admit(_nearest(key, means), info, state)
        query, key = self._turn(query, key, info)
        rank = jnp.cumsum(info.valid, axis=1, dtype=jnp.int32)
        slot = jnp.where(info.valid, (state.cache.length[:, None] + rank - 1) % slots, slots)
        row = jnp.arange(len(slot))[:, None]
        cached = state.clusters.at[row, slot].set(key_clusters, mode="drop")
        cache = state.cache.append(key, value, info)
        y = self._attend(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype),
            info.positions, info.segments, clusters, cache.positions, cache.segments, cached,
        )  # fmt: skip
        return self._finish(y, info), RoutingState(cache, cached, counts, document)

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: RoutingState
    ) -> tuple[jax.Array, RoutingState]:
        one = TokenInfo(*(field[:, None] for field in info))
        y, state = self.prefill(x_t[:, None], one, state)
        return y[:, 0], state

    def _check_decodes(self) -> None:
        if not self.decodes:
            raise ValueError(
                'mixer: got routing with membership="top", but decoding wants a causal mixer: '
                "whether a token is among the nearest of a cluster hangs on later ones"
            )


def _nearest(x: jax.Array, means: jax.Array) -> jax.Array:
    """The cluster of every token and head, int32 [batch, seq_len, num_heads]."""
    return jnp.argmax(similarities(x, means), axis=-1).astype(jnp.int32)
