"""RAT: a gated recurrence inside short chunks, softmax attention from chunk to chunk.

Every chunk of L tokens is summed up in one key and one value, so attention has n / L slots to look
at and to cache. L = 1 is attention over gated keys and values; one chunk for all is a recurrent
network. Source: Wei et al. 2025 (arXiv 2507.04416) and the released code.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.masks import Causal
from effattn.nn.layers import statistics_dtype
from effattn.nn.linear_state import continued, segments_at_ends
from effattn.nn.param import Dense, normal, parameter
from effattn.nn.rotary import rotary_tables, rotate
from effattn.nn.start import Learned, Start, decode_attention, prefix_shapes, rows_of
from effattn.pallas_kernels.attention import merge
from effattn.pallas_kernels.prefix_scan import gated_scan_step
from effattn.parallel.sequence import Local, SequenceParallel

NEVER = np.iinfo(np.int32).max  # the chunk of a slot that no query may see


@dataclass(kw_only=True)
class RATConfig:
    """head_dim None: width / num_heads. chunk_size: tokens L of a chunk, counted from the start of
    each document.

    num_groups: heads share queries and keys; head j has those of group j mod num_groups, its gates
    and values are its own. init_std, out_init_std: of the input and the output projections (None:
    the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    num_groups: int = 2
    chunk_size: int = 16
    rotary_base: float = 10000.0
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "RAT":
        """Raises ValueError where heads, groups and width do not fit together."""
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("chunk_size", self.chunk_size, 1)
        check_multiple("num_heads", self.num_heads, "num_groups", self.num_groups)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        check_multiple("head_dim", head_dim, "pairs", 2)
        return RAT(
            width,
            num_heads=self.num_heads,
            head_dim=head_dim,
            num_groups=self.num_groups,
            chunk_size=self.chunk_size,
            rotary_base=self.rotary_base,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class Slots(NamedTuple):
    """Chunks that queries of later chunks may look at.

    key, value: [batch, slots, num_heads, head_dim], keys rotated by the chunk's number. chunks: its
    number in the document, segments: its document, [batch, slots]; segment 0 is an empty slot.
    """

    key: jax.Array
    value: jax.Array
    chunks: jax.Array
    segments: jax.Array


class RATState(NamedTuple):
    """cache: a ring of the chunks of document `segment` [batch] (0: none yet), the newest perhaps
    unfinished. running: [batch, 2, num_heads, head_dim], its key, not rotated, and its value."""

    cache: Slots
    running: jax.Array
    segment: jax.Array


class Sources(NamedTuple):
    """The last tokens of the chunks that a call leaves for the next one of the same document.

    place: int32 [batch, slots], index of the token; filled: bool, whether the slot is used.
    """

    place: jax.Array
    filled: jax.Array


class RAT(nnx.Module):
    """y = out(sigmoid(z(x)) * softmax attention of q over the earlier chunks and the running pair).

        K_t = g_t K_{t-1} + (1 - g_t) k_t        V_t = g_t V_{t-1} + (1 - g_t) v_t

    per channel, g = sigmoid(gate(x) + gate_bias), from zero at each chunk's start. Token t sees the
    last (K, V) of every earlier chunk of its document and its own (K_t, V_t); q and K turn by the
    number of their chunk. The positions of a document's tokens in one call follow one another.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        chunk_size: int,
        rotary_base: float,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.num_groups = num_heads, head_dim, num_groups
        self.chunk_size, self.rotary_base, self.sequence = chunk_size, rotary_base, sequence
        inner = num_heads * head_dim

        def projection(heads: int, name: str) -> Dense:
            init, axes = normal(init_std), ("embed", name)
            return Dense(width, heads * head_dim, axes, init=init, dtype=dtype, rngs=rngs)

        self.z, self.value, self.gate = (projection(num_heads, "heads") for _ in range(3))
        self.query, self.key = (projection(num_groups, "kv_heads") for _ in range(2))
        self.gate_bias = parameter((inner,), ("heads",), chrono(chunk_size), rngs)
        init, axes = normal(out_init_std), ("heads", "embed")
        self.out = Dense(inner, width, axes, init=init, dtype=dtype, rngs=rngs)

    # ---- parts of a layer; x: [..., width], with seq_len or without

    def _split(self, x: jax.Array) -> jax.Array:
        """[..., groups or heads * head_dim] -> [..., groups or heads, head_dim]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def _to_heads(self, x: jax.Array) -> jax.Array:
        """[..., groups, head_dim] -> [..., num_heads, head_dim]: head j is group j mod groups."""
        # Not jnp.tile, before which XLA gathers the tokens of a sequence axis.
        return jnp.concatenate([x] * (self.num_heads // x.shape[-2]), axis=-2)

    def _recurrence(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """gate [..., 1, heads, head_dim] and input [..., 2, heads, head_dim] of keys and values."""
        dtype = statistics_dtype(x.dtype)
        gate = jax.nn.sigmoid(self.gate(x).astype(dtype) + self.gate_bias[...])
        gate = self._split(gate)[..., None, :, :]
        key, value = self._to_heads(self._split(self.key(x))), self._split(self.value(x))
        pair = jnp.stack([key, value], axis=-3)
        inputs = (1 - gate) * pair.astype(dtype)
        starts = positions % self.chunk_size == 0
        return jnp.where(starts[..., None, None, None], 0, gate), inputs

    def _rotate(self, x: jax.Array, chunks: jax.Array) -> jax.Array:
        """x: [batch, length, heads or groups, head_dim]; chunks: [batch, length]."""
        return rotate(x, rotary_tables(chunks, self.head_dim, self.rotary_base, x.dtype))

    def _finish(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = checkpoint_name(y, "mixer")
        return self.out(jax.nn.sigmoid(self.z(x)) * y.reshape(*x.shape[:-1], -1))

    # ---- whole rows

    def _slots(self, pair: jax.Array, info: TokenInfo, sources: Sources, dtype: Any) -> Slots:
        """The pairs [batch, seq_len, 2, heads, head_dim] of these tokens, as slots."""
        place = jnp.minimum(sources.place, info.positions.shape[1] - 1)
        taken = jnp.take_along_axis(pair, place[..., None, None, None], axis=1)
        chunks = jnp.take_along_axis(info.positions, place, axis=1) // self.chunk_size
        segments = jnp.take_along_axis(info.segments, place, axis=1)
        key = self._rotate(taken[:, :, 0], chunks).astype(dtype)
        segments = jnp.where(sources.filled, segments, 0)
        return Slots(key, taken[:, :, 1].astype(dtype), chunks, segments)

    def _attend(
        self, x: jax.Array, pair: jax.Array, info: TokenInfo, slots: Slots, start: Start | None
    ) -> jax.Array:
        """Softmax over the slots of earlier chunks and over each token's own pair."""
        query = self._split(self.query(x))
        extra: dict[str, jax.Array] = {}
        if start is not None:
            learned = rows_of(start, len(query))
            extra = {f"extra_{name}": x.astype(query.dtype) for name, x in learned.items()}
        chunks = info.positions // self.chunk_size
        others, lse = self.sequence.attention(
            self._to_heads(self._rotate(query, chunks)),
            slots.key.astype(query.dtype),
            slots.value.astype(query.dtype),
            mask=Causal(),
            q_positions=chunks,
            kv_positions=slots.chunks + 1,  # seen from the next chunk on
            q_segment_ids=info.segments,
            kv_segment_ids=slots.segments,
            return_lse=True,
            **extra,
        )
        # Query and own key turn by the same angle, which leaves their product as it is.
        key, value = pair[:, :, 0], pair[:, :, 1]
        query = self._to_heads(query.astype(key.dtype))
        own = jnp.sum(query * key, axis=-1) * self.head_dim**-0.5
        y, _ = merge(others, lse, value.astype(others.dtype), own)
        return self._finish(y, x)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: RATState | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        pair, _ = self.sequence.gated_scan(
            *self._recurrence(x, info.positions), segment_ids=info.segments
        )
        sources = chunks_left(info, self.chunk_size)
        return self._attend(x, pair, info, self._slots(pair, info, sources, x.dtype), start), None

    def start_shapes(self, length: int) -> dict[str, Learned]:
        """Keys, not rotated, and values that every token sees beside the chunks."""
        return prefix_shapes(length, self.num_heads, self.head_dim, self.head_dim)

    # ---- decoding

    def init_state(self, batch: int, max_len: int, dtype: Any) -> RATState:
        """One slot per chunk of max_len tokens; a row that outgrows them forgets its oldest chunk.

        The running pair is float32 whatever `dtype`.
        """
        slots = -(-max_len // self.chunk_size)
        heads = jnp.zeros((batch, slots, self.num_heads, self.head_dim), dtype)
        numbers = jnp.zeros((batch, slots), jnp.int32)
        running = (batch, 2, self.num_heads, self.head_dim)
        return RATState(
            Slots(heads, heads, numbers, numbers),
            jnp.zeros(running, statistics_dtype(dtype)),
            jnp.zeros((batch,), jnp.int32),
        )

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: RATState, start: Start | None = None
    ) -> tuple[jax.Array, RATState]:
        length, held = x.shape[1], state.cache.chunks.shape[1]
        if -(-length // self.chunk_size) > held:
            most = held * self.chunk_size
            raise ValueError(f"prefill: got {length} tokens, expected at most max_len={most}")
        first, last = segments_at_ends(info)
        pair, running = self.sequence.gated_scan(
            *self._recurrence(x, info.positions),
            state=continued(state.running, state.segment, first),
            segment_ids=info.segments,
        )
        index = jnp.arange(length)
        at_first = jnp.min(jnp.where(info.valid, index, length - 1), axis=1, keepdims=True)
        at_last = jnp.max(jnp.where(info.valid, index, 0), axis=1, keepdims=True)

        sources = chunks_left(info, self.chunk_size)
        new = self._slots(pair, info, sources, state.cache.key.dtype)
        # The slot of the chunk in which this call begins, and any beyond, is out of date.
        begins = jnp.take_along_axis(info.positions, at_first, axis=1) // self.chunk_size
        old = state.cache._replace(
            segments=jnp.where(state.cache.chunks < begins, state.cache.segments, 0)
        )
        both = jax.tree.map(lambda *s: jnp.concatenate(s, axis=1), old, new)
        y = self._attend(x, pair, info, both, start)

        ends = Sources(
            jnp.concatenate([sources.place, at_last], axis=1),
            jnp.concatenate([sources.filled, last[:, None] != 0], axis=1),
        )
        cache = _write(state.cache, self._slots(pair, info, ends, state.cache.key.dtype), last)
        return y, RATState(cache, running, jnp.where(last == 0, state.segment, last))

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: RATState, start: Start | None = None
    ) -> tuple[jax.Array, RATState]:
        before = continued(state.running, state.segment, info.segments)
        gate, inputs = self._recurrence(x_t, info.positions)
        pair, running = gated_scan_step(gate, inputs, before, valid=info.valid)
        # The running pair stands in the slot of its chunk until the chunk's last token.
        one = TokenInfo(*(field[:, None] for field in info))
        own = Sources(jnp.zeros_like(one.positions), one.valid)
        cache = state.cache
        cache = _write(cache, self._slots(pair[:, None], one, own, cache.key.dtype), info.segments)

        chunks = one.positions // self.chunk_size
        query = self._to_heads(self._rotate(self._split(self.query(x_t))[:, None], chunks))
        slots = cache.chunks.shape[1]
        y = decode_attention(
            self.sequence,
            query,
            cache.key,
            cache.value,
            start,
            # A token that is padding attends nothing: its row is as good as empty.
            lengths=jnp.where(info.segments == 0, 0, jnp.minimum(chunks[:, 0] + 1, slots)),
            q_positions=chunks,
            kv_positions=jnp.where(cache.segments == one.segments, cache.chunks, NEVER),
            mask=Causal(),
        )
        segment = jnp.where(info.valid, info.segment_ids, state.segment)
        return self._finish(y[:, 0], x_t), RATState(cache, running, segment)


def chrono(chunk_size: int) -> Any:
    """log U(1, L - 1): gates that remember between one token and a chunk (Tallec, Ollivier 2018).

    0 for L = 1, where the released code leaves the bias as it was allocated.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        longest = max(chunk_size - 1, 1)
        return jnp.log(jax.random.uniform(key, shape, dtype, 1, longest))

    return init


def chunks_left(info: TokenInfo, chunk_size: int) -> Sources:
    """Where in a row the tokens stand after which their document goes on in another chunk.

    As positions follow one another there are at most 1 + (seq_len - 2) // chunk_size: each chunk
    but the first is whole, and one more token leaves it.
    """
    length = info.positions.shape[1]
    most = 1 + max(length - 2, 0) // chunk_size
    index = jnp.where(info.valid, jnp.arange(length, dtype=jnp.int32), -1)
    newest = jax.lax.cummax(index, axis=1)
    before = jnp.pad(newest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    at = jnp.maximum(before, 0)
    segments, chunks = info.segments, info.positions // chunk_size
    leaves = (before >= 0) & (segments != 0)
    leaves &= jnp.take_along_axis(segments, at, axis=1) == segments
    leaves &= jnp.take_along_axis(chunks, at, axis=1) != chunks
    # In order of place: a sort of integers is cheap everywhere, a scatter is not.
    place = jnp.sort(jnp.where(leaves, before, length), axis=1)[:, :most]
    return Sources(place, place < length)


def _write(cache: Slots, new: Slots, segment: jax.Array) -> Slots:
    """The cache with the new slots of document `segment` [batch], of which the newest survive."""
    slots = cache.chunks.shape[1]
    mine = (new.segments == segment[:, None]) & (new.segments != 0)
    newest = jnp.max(jnp.where(mine, new.chunks, -1), axis=1, keepdims=True)
    # A slot outside the cache is dropped: no slot is ever written twice in one call.
    slot = jnp.where(mine & (new.chunks > newest - slots), new.chunks % slots, slots)
    row = jnp.arange(slot.shape[0])[:, None]
    return jax.tree.map(lambda old, new: old.at[row, slot].set(new, mode="drop"), cache, new)
