"""Softmax attention: multi-head, grouped or multi-query, over everything or a sliding window.

The cache holds absolute positions, not slot numbers, so a row may skip positions, rows may have
unequal lengths, and a window needs only window + 1 slots, used as a ring.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.masks import Causal, Window
from effattn.nn.layers import RMSNorm
from effattn.nn.param import Dense, normal
from effattn.nn.rotary import rotary_tables, rotate
from effattn.nn.start import Learned, Start, decode_attention, prefix_shapes, rows_of
from effattn.parallel.sequence import Local, SequenceParallel

NEVER = np.iinfo(np.int32).max  # the position of a slot that no query may see


@dataclass(kw_only=True)
class AttentionConfig:
    """num_kv_heads None: num_heads. head_dim None: width / num_heads.

    rotary_dim: channels of a head that turn; None: all, 0: none. window: tokens seen to the left,
    besides the token itself; None: all. soft_cap: scores become cap * tanh(scores / cap).
    qkv_bias: query, key and value get biases, which start at zero, as in Qwen2.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-5
    soft_cap: float | None = None
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Attention":
        """Raises ValueError where heads, widths or window do not fit together."""
        check_at_least("num_heads", self.num_heads, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_multiple("num_heads", self.num_heads, "num_kv_heads", num_kv_heads)
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        check_multiple("rotary_dim", rotary_dim, "pairs", 2)
        if rotary_dim > head_dim:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected at most head_dim={head_dim}")
        if self.window is not None:
            check_at_least("window", self.window, 0)
        return Attention(
            width,
            num_heads=self.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_base=self.rotary_base,
            window=self.window,
            qkv_bias=self.qkv_bias,
            qk_norm_eps=self.norm_eps if self.qk_norm else None,
            soft_cap=self.soft_cap,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class KVCache(NamedTuple):
    """Rotated keys and values of the last tokens of every row, as a ring.

    key, value: [batch, slots, num_kv_heads, head_dim]. positions, segments: [batch, slots];
    segment 0 is an empty slot. length: [batch], tokens ever written. A row that outgrows the
    cache forgets its oldest token.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segments: jax.Array
    length: jax.Array

    def append(self, key: jax.Array, value: jax.Array, info: TokenInfo) -> "KVCache":
        """Writes the valid tokens of [batch, seq_len, ...], of which at most `slots` survive."""
        slots = self.positions.shape[1]
        rank = jnp.cumsum(info.valid, axis=1, dtype=jnp.int32)
        total = rank[:, -1:]
        # A slot outside the cache is dropped: no slot is ever written twice in one call.
        survives = info.valid & (rank > total - slots)
        slot = jnp.where(survives, (self.length[:, None] + rank - 1) % slots, slots)
        row = jnp.arange(slot.shape[0])[:, None]

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            return cached.at[row, slot].set(new.astype(cached.dtype), mode="drop")

        return KVCache(
            write(self.key, key),
            write(self.value, value),
            write(self.positions, info.positions),
            write(self.segments, info.segment_ids),
            self.length + total[:, 0],
        )


class Attention(nnx.Module):
    """`out(attention(query(x), key(x), value(x)))`, causal; `out` has no bias.

    Separate query, key and value kernels: splitting a fused one along a sharded axis makes XLA
    reshard it.
    """

    causal = True
    decodes = True
    order_free = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        rotary_base: float,
        window: int | None,
        qkv_bias: bool = False,
        qk_norm_eps: float | None,
        soft_cap: float | None,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rotary_dim, self.rotary_base = rotary_dim, rotary_base
        self.window, self.soft_cap = window, soft_cap
        self.mask = Causal() if window is None else Causal() & Window(left=window)
        self.sequence = sequence

        def project(heads: int, name: str) -> Dense:
            axes = ("embed", name)
            init = normal(init_std)
            options: dict[str, Any] = {"use_bias": qkv_bias, "dtype": dtype, "rngs": rngs}
            return Dense(width, heads * head_dim, axes, init=init, **options)

        self.query = project(num_heads, "heads")
        self.key = project(num_kv_heads, "kv_heads")
        self.value = project(num_kv_heads, "kv_heads")
        init, axes = normal(out_init_std), ("heads", "embed")
        self.out = Dense(num_heads * head_dim, width, axes, init=init, dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm | None:
            if qk_norm_eps is None:
                return None
            return RMSNorm(head_dim, axes=(None,), eps=qk_norm_eps, dtype=dtype, rngs=rngs)

        self.query_norm, self.key_norm = norm(), norm()

    def _project(self, x: jax.Array, info: TokenInfo) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value heads, [batch, seq_len, heads, head_dim]; q and k rotated."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key = self.query(x).reshape(heads), self.key(x).reshape(heads)
        value = self.value(x).reshape(heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary_dim:
            tables = rotary_tables(info.positions, self.rotary_dim, self.rotary_base, x.dtype)
            query, key = rotate(query, tables), rotate(key, tables)
        return query, key, value

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        info: TokenInfo,
        kv_positions: jax.Array,
        kv_segment_ids: jax.Array,
        start: Start | None,
    ) -> jax.Array:
        extra: dict[str, jax.Array] = {}
        if start is not None:
            learned = rows_of(start, len(query))
            extra = {f"extra_{name}": x.astype(query.dtype) for name, x in learned.items()}
        y = self.sequence.attention(
            query,
            key.astype(query.dtype),
            value.astype(query.dtype),
            mask=self.mask,
            q_positions=info.positions,
            kv_positions=kv_positions,
            q_segment_ids=info.segments,
            kv_segment_ids=kv_segment_ids,
            logit_soft_cap=self.soft_cap,
            **extra,
        )
        return self.out(y.reshape(*y.shape[:2], -1))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: KVCache | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        heads = self._project(x, info)
        return self._attend(*heads, info, info.positions, info.segments, start), None

    def start_shapes(self, length: int) -> dict[str, Learned]:
        """Keys, not rotated, and values that every token sees, whatever the window."""
        groups = self.num_heads // self.num_kv_heads
        return prefix_shapes(length, self.num_kv_heads, *[self.head_dim] * 2, reads=groups)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> KVCache:
        slots = max_len if self.window is None else min(max_len, self.window + 1)
        heads = jnp.zeros((batch, slots, self.num_kv_heads, self.head_dim), dtype)
        numbers = jnp.zeros((batch, slots), jnp.int32)
        return KVCache(heads, heads, numbers, numbers, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: KVCache, start: Start | None = None
    ) -> tuple[jax.Array, KVCache]:
        slots = state.positions.shape[1]
        if self.window is None and x.shape[1] > slots:
            raise ValueError(f"prefill: got {x.shape[1]} tokens, expected at most max_len={slots}")
        query, key, value = self._project(x, info)
        cache = state.append(key, value, info)
        if self.window is None or x.shape[1] == 1:
            # Nothing that a query here may see was overwritten by a later token of this call.
            places = cache.positions, cache.segments
            return self._attend(query, cache.key, cache.value, info, *places, start), cache
        y = self._attend(
            query,
            jnp.concatenate([state.key, key.astype(state.key.dtype)], axis=1),
            jnp.concatenate([state.value, value.astype(state.value.dtype)], axis=1),
            info,
            jnp.concatenate([state.positions, info.positions], axis=1),
            jnp.concatenate([state.segments, info.segments], axis=1),
            start,
        )
        return y, cache

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: KVCache, start: Start | None = None
    ) -> tuple[jax.Array, KVCache]:
        one = TokenInfo(*(field[:, None] for field in info))
        query, key, value = self._project(x_t[:, None], one)
        state = state.append(key, value, one)
        y = decode_attention(
            self.sequence,
            query,
            state.key,
            state.value,
            start,
            # A token that is padding attends nothing: its row is as good as empty.
            lengths=jnp.where(info.segments == 0, 0, state.length),
            q_positions=one.positions,
            # No causal mask lets a slot of another document be seen from beyond every query.
            kv_positions=jnp.where(state.segments == one.segments, state.positions, NEVER),
            mask=self.mask,
            logit_soft_cap=self.soft_cap,
        )
        return self.out(y.reshape(len(y), -1)), state
