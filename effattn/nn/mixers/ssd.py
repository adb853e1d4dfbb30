"""Mamba-2's block: a state space that each head forgets at a rate read from the token.

H_t = exp(-exp(A) dt_t) H_{t-1} + dt_t x_t B_t^T and y_t = H_t C_t + D x_t, which is linear
attention with query C, key B, value dt x and a decay per token and head. Source: Dao and Gu 2024
(arXiv 2405.21060).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.nn.conv import ConvState, ShortConv
from effattn.nn.layers import statistics_dtype
from effattn.nn.linear_state import (
    DocumentState,
    attend_on,
    attend_step,
    init_document_state,
    start_sums,
)
from effattn.nn.param import Dense, log_uniform, normal, parameter, step_bias, uniform
from effattn.nn.start import Learned, Start
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class SSDConfig:
    """expand: inner width / width. The inner width is cut into heads of head_dim channels.

    state_dim: channels of B and C. num_groups: how many heads share a B and a C: head j uses group
    j // (num_heads / num_groups), and the norm is over a group's channels. dt_min, dt_max,
    dt_floor: steps at first, drawn log-uniformly. a_min, a_max: of exp(A) at first.
    out_init_scale: shrinks the output projection at first. init_std, out_init_std: draw projections
    from N(0, std^2) instead. chunk_size None: the backend's choice.
    decay_scale, write_scale: times the log decay and times what enters the sums. A trained model
    whose sums overflow beyond its training length forgets in time with decay_scale > 1 (Chen et al.
    2024, Stuffed Mamba, arXiv 2410.07145); both change no parameter.
    """

    expand: int = 2
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    kernel_size: int = 4
    eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    a_min: float = 1.0
    a_max: float = 16.0
    out_init_scale: float = 1.0
    init_std: float | None = None
    out_init_std: float | None = None
    chunk_size: int | None = None
    decay_scale: float = 1.0
    write_scale: float = 1.0

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "SSD":
        """Raises ValueError where widths, heads and groups do not fit together."""
        for name in ("expand", "head_dim", "state_dim", "num_groups", "kernel_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.chunk_size is not None:
            check_at_least("chunk_size", self.chunk_size, 1)
        check_at_least("decay_scale", self.decay_scale, 0)
        check_multiple("expand * width", self.expand * width, "head_dim", self.head_dim)
        num_heads = self.expand * width // self.head_dim
        check_multiple("num_heads", num_heads, "num_groups", self.num_groups)
        return SSD(
            width, num_heads=num_heads, config=self, sequence=sequence, dtype=dtype, rngs=rngs
        )


class SSDState(NamedTuple):
    """convs: of value, key and query. sums: kv [batch, num_heads, state_dim, head_dim]."""

    convs: tuple[ConvState, ...]
    sums: DocumentState


class SSD(nnx.Module):
    """`out(norm(ssd(x, B, C, dt) * silu(gate(u))))`: x, B and C convolved, then silu; dt softplus.

    One projection and one convolution of the paper's figure are five and three here, by what they
    make, because splitting a sharded axis makes XLA reshard. Projections start as
    U(+-1 / sqrt(fan_in)), without biases.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        config: SSDConfig,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim = num_heads, config.head_dim
        self.num_groups, self.state_dim = config.num_groups, config.state_dim
        self.eps, self.chunk_size = config.eps, config.chunk_size
        self.decay_scale, self.write_scale = config.decay_scale, config.write_scale
        self.sequence, self.dtype = sequence, dtype
        inner, groups = num_heads * config.head_dim, config.num_groups * config.state_dim

        def project(features: int, axis: str = "heads") -> Dense:
            axes, std = ("embed", axis), config.init_std
            init = uniform(width**-0.5) if std is None else normal(std)
            return Dense(width, features, axes, init=init, dtype=dtype, rngs=rngs)

        def conv(channels: int) -> ShortConv:
            options: dict[str, Any] = {"sequence": sequence, "dtype": dtype, "rngs": rngs}
            return ShortConv(channels, config.kernel_size, use_bias=True, **options)

        self.gate, self.value = project(inner), project(inner)
        self.key, self.query = project(groups, "kv_heads"), project(groups, "kv_heads")
        self.step_size = project(num_heads)
        self.value_conv, self.key_conv, self.query_conv = conv(inner), conv(groups), conv(groups)

        per_head = (num_heads,), ("heads",)
        steps = step_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.step_bias = parameter(*per_head, steps, rngs)
        self.log_rate = parameter(*per_head, log_uniform(config.a_min, config.a_max), rngs)
        self.skip = parameter(*per_head, jax.nn.initializers.ones, rngs)
        self.norm_scale = parameter((inner,), ("heads",), jax.nn.initializers.ones, rngs)
        std = config.out_init_std
        init = uniform(config.out_init_scale * inner**-0.5) if std is None else normal(std)
        self.out = Dense(inner, width, ("heads", "embed"), init=init, dtype=dtype, rngs=rngs)

    def _convolve(
        self, x: jax.Array, info: TokenInfo, states: tuple[ConvState, ...] | None
    ) -> tuple[tuple[jax.Array, ...], tuple[ConvState, ...]]:
        """Value, key and query, [batch, seq_len, channels], and the convolutions' next states."""
        convs = (self.value_conv, self.key_conv, self.query_conv)
        inputs = (self.value(x), self.key(x), self.query(x))
        if states is None:
            return tuple(c(y, info) for c, y in zip(convs, inputs, strict=True)), ()
        pairs = [c.prefill(y, info, s) for c, y, s in zip(convs, inputs, states, strict=True)]
        return tuple(y for y, _ in pairs), tuple(state for _, state in pairs)

    def _heads(
        self, x: jax.Array, convolved: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """query, key [..., groups, state_dim], value [..., heads, head_dim], step [..., heads]."""
        value, key, query = (jax.nn.silu(y) for y in convolved)
        groups = (*x.shape[:-1], self.num_groups, self.state_dim)
        value = value.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        step = self.step_size(x).astype(statistics_dtype(x.dtype)) + self.step_bias[...]
        return query.reshape(groups), key.reshape(groups), value, jax.nn.softplus(step)

    def _log_decay(self, step: jax.Array) -> jax.Array:
        return -self.decay_scale * jnp.exp(self.log_rate[...]) * step

    def _written(self, value: jax.Array, step: jax.Array) -> jax.Array:
        """What enters the sums: value times step, multiplied in float32."""
        return (value * (self.write_scale * step)[..., None]).astype(value.dtype)

    def _output(self, y: jax.Array, value: jax.Array, x: jax.Array) -> jax.Array:
        """The skip, the gate, then RMSNorm over each group, in float32."""
        y = checkpoint_name(y, "mixer")
        wide = statistics_dtype(x.dtype)
        y = y.astype(wide) + self.skip[...][:, None] * value
        y = y.reshape(*x.shape[:-1], -1) * jax.nn.silu(self.gate(x).astype(wide))
        by_group = y.reshape(*x.shape[:-1], self.num_groups, -1)
        mean_square = jnp.mean(jnp.square(by_group), axis=-1, keepdims=True)
        y = (by_group * jax.lax.rsqrt(mean_square + self.eps)).reshape(y.shape)
        return self.out((y * self.norm_scale[...]).astype(self.dtype))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: SSDState | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is None and start is not None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        query, keys, value, step = self._heads(x, self._convolve(x, info, None)[0])
        y, _ = self.sequence.linear_attention(
            query,
            keys,
            self._written(value, step),
            log_decay=self._log_decay(step),
            segment_ids=info.segments,
            chunk_size=self.chunk_size,
        )
        return self._output(y, value, x), None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> SSDState:
        """The convolutions keep activations in `dtype`, the sums are float32."""
        convs = (self.value_conv, self.key_conv, self.query_conv)
        sums = init_document_state(batch, self.num_heads, self.state_dim, self.head_dim, dtype)
        return SSDState(tuple(conv.init_state(batch, dtype) for conv in convs), sums)

    def start_shapes(self, length: int) -> dict[str, Learned]:
        """Of the sums; the convolutions start empty."""
        return start_sums(self.num_heads, self.state_dim, self.head_dim)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: SSDState, start: Start | None = None
    ) -> tuple[jax.Array, SSDState]:
        convolved, convs = self._convolve(x, info, state.convs)
        query, key, value, step = self._heads(x, convolved)
        y, sums = attend_on(
            self.sequence,
            query,
            key,
            self._written(value, step),
            info,
            state.sums,
            start,
            log_decay=self._log_decay(step),
            chunk_size=self.chunk_size,
        )
        return self._output(y, value, x), SSDState(convs, sums)

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: SSDState, start: Start | None = None
    ) -> tuple[jax.Array, SSDState]:
        one = TokenInfo(*(field[:, None] for field in info))
        convolved, convs = self._convolve(x_t[:, None], one, state.convs)
        query, key, value, step = self._heads(x_t, tuple(y[:, 0] for y in convolved))
        log_decay = self._log_decay(step)
        y, sums = attend_step(
            query, key, self._written(value, step), info, state.sums, start, log_decay=log_decay
        )
        return self._output(y, value, x_t), SSDState(convs, sums)
