"""DeltaNet and gated DeltaNet: a state that is corrected where a key comes back, not added to.

S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T, o_t = key_dim^-1/2 S_t^T q_t, with S'_t = S_{t-1} or,
gated, exp(g_t) S_{t-1}. Sources: Yang et al. 2024 (arXiv 2406.06484); gated: Yang, Kautz and
Hatamizadeh 2024 (arXiv 2412.06464); beta up to 2: Grazzi et al. 2024 (arXiv 2411.12537).
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
from effattn.nn.layers import RMSNorm, statistics_dtype
from effattn.nn.linear_state import continued, segments_at_ends
from effattn.nn.param import Dense, log_uniform, normal, parameter, step_bias
from effattn.pallas_kernels.delta_rule import delta_rule_step
from effattn.parallel.sequence import Local, SequenceParallel

# Added to the squared length of a query or a key: padding is a zero vector.
_LENGTH_EPS = 1e-6


@dataclass(kw_only=True)
class DeltaConfig:
    """gated: the state decays by a number per token and head, and silu of a gate multiplies the
    output (gated DeltaNet); without: neither (DeltaNet).

    num_key_heads: of queries and keys, each read by num_heads / num_key_heads value heads; None:
    num_heads. head_dim: channels of a key head; None: width / num_heads. value_dim: of a value
    head; None: head_dim. negative_eigenvalues: beta reaches 2 instead of 1, so that a state can
    turn over. kernel_size: tokens of the convolution before query, key and value. eps: of the norm
    over each head. dt_min, dt_max, dt_floor, a_min, a_max: the decay's start, as in SSDConfig.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    num_key_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    gated: bool = False
    negative_eigenvalues: bool = False
    kernel_size: int = 4
    eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    a_min: float = 1.0
    a_max: float = 16.0
    chunk_size: int | None = None
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Delta":
        """Raises ValueError where heads and widths do not fit together, or chunk_size < 1."""
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("kernel_size", self.kernel_size, 2)
        if self.chunk_size is not None:
            check_at_least("chunk_size", self.chunk_size, 1)
        num_key_heads = self.num_heads if self.num_key_heads is None else self.num_key_heads
        check_multiple("num_heads", self.num_heads, "num_key_heads", num_key_heads)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        return Delta(
            width,
            num_key_heads=num_key_heads,
            key_dim=head_dim,
            value_dim=head_dim if self.value_dim is None else self.value_dim,
            config=self,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class DeltaState(NamedTuple):
    """convs: of query, key and value. memory: S, [batch, num_heads, key_dim, value_dim], float32 or
    more, of segment `segment` [batch] (0: none yet).
    """

    convs: tuple[ConvState, ...]
    memory: jax.Array
    segment: jax.Array


class Delta(nnx.Module):
    """`out(norm(delta_rule(q, k, v, beta)))`, gated: `out(norm(...) * silu(gate(x)))`.

    q, k and v are convolved and pass silu; q and k become unit vectors. beta = sigmoid(strength(x))
    per head. Gated: g = -exp(log_rate) softplus(step_size(x) + step_bias). The norm is over each
    head. No other biases, no positions.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        num_key_heads: int,
        key_dim: int,
        value_dim: int,
        config: DeltaConfig,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_key_heads = config.num_heads, num_key_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.beta_max = 2.0 if config.negative_eigenvalues else 1.0
        self.chunk_size, self.sequence = config.chunk_size, sequence
        keys, values = num_key_heads * key_dim, self.num_heads * value_dim

        def project(features: int, axis: str = "heads") -> Dense:
            init = normal(config.init_std)
            return Dense(width, features, ("embed", axis), init=init, dtype=dtype, rngs=rngs)

        def conv(channels: int) -> ShortConv:
            options: dict[str, Any] = {"sequence": sequence, "dtype": dtype, "rngs": rngs}
            return ShortConv(channels, config.kernel_size, **options)

        self.query, self.key = project(keys, "kv_heads"), project(keys, "kv_heads")
        self.value = project(values)
        self.query_conv, self.key_conv, self.value_conv = conv(keys), conv(keys), conv(values)
        self.strength = project(self.num_heads)
        gate = step_size = bias = log_rate = None
        if config.gated:
            gate, step_size = project(values), project(self.num_heads)
            per_head = (self.num_heads,), ("heads",)
            steps = step_bias(config.dt_min, config.dt_max, config.dt_floor)
            bias = parameter(*per_head, steps, rngs)
            log_rate = parameter(*per_head, log_uniform(config.a_min, config.a_max), rngs)
        self.gate, self.step_size, self.step_bias, self.log_rate = gate, step_size, bias, log_rate
        self.norm = RMSNorm(value_dim, axes=(None,), eps=config.eps, dtype=dtype, rngs=rngs)
        out_std = config.init_std if config.out_init_std is None else config.out_init_std
        axes = ("heads", "embed")
        self.out = Dense(values, width, axes, init=normal(out_std), dtype=dtype, rngs=rngs)

    def _heads(
        self, x: jax.Array, info: TokenInfo, states: tuple[ConvState, ...] | None
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[ConvState, ...]]:
        """Query and key [..., key heads, key_dim] and value [..., heads, value_dim], and the
        convolutions' next states. x: [batch, seq_len, width]."""
        convs = (self.query_conv, self.key_conv, self.value_conv)
        inputs = (self.query(x), self.key(x), self.value(x))
        after: tuple[ConvState, ...] = ()
        if states is None:
            convolved = [conv(y, info) for conv, y in zip(convs, inputs, strict=True)]
        else:
            pairs = [c.prefill(y, info, s) for c, y, s in zip(convs, inputs, states, strict=True)]
            convolved, after = [y for y, _ in pairs], tuple(state for _, state in pairs)
        # Rounded once, when they are done: a state that nearly turns over remembers roundings long.
        query, key, value = (jax.nn.silu(y.astype(statistics_dtype(y.dtype))) for y in convolved)
        keys = (*x.shape[:2], self.num_key_heads, self.key_dim)
        query, key = _unit(query.reshape(keys)), _unit(key.reshape(keys))
        value = value.reshape(*x.shape[:2], self.num_heads, self.value_dim)
        dtype = convolved[0].dtype
        return (query.astype(dtype), key.astype(dtype), value.astype(dtype)), after

    def _beta(self, x: jax.Array) -> jax.Array:
        return self.beta_max * jax.nn.sigmoid(self.strength(x).astype(statistics_dtype(x.dtype)))

    def _log_decay(self, x: jax.Array) -> jax.Array | None:
        if self.step_size is None or self.step_bias is None or self.log_rate is None:
            return None
        step = self.step_size(x).astype(statistics_dtype(x.dtype)) + self.step_bias[...]
        return -jnp.exp(self.log_rate[...]) * jax.nn.softplus(step)

    def _mix(
        self, x: jax.Array, info: TokenInfo, convs: tuple[ConvState, ...] | None, memory: Any
    ) -> tuple[jax.Array, tuple[ConvState, ...], jax.Array]:
        """(y, the convolutions' next states, the next memory)."""
        heads, convs = self._heads(x, info, convs)
        y, memory = self.sequence.delta_rule(
            *heads,
            self._beta(x),
            log_decay=self._log_decay(x),
            state=memory,
            segment_ids=info.segments,
            chunk_size=self.chunk_size,
        )
        return self._output(y, x), convs, memory

    def _output(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = self.norm(checkpoint_name(y, "mixer")).reshape(*x.shape[:-1], -1)
        return self.out(y if self.gate is None else y * jax.nn.silu(self.gate(x)))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: DeltaState | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        if state is not None:
            return self.prefill(x, info, state)[0], None
        return self._mix(x, info, None, None)[0], None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> DeltaState:
        """The convolutions keep activations in `dtype`, the memory is float32."""
        convs = (self.query_conv, self.key_conv, self.value_conv)
        shape = (batch, self.num_heads, self.key_dim, self.value_dim)
        return DeltaState(
            tuple(conv.init_state(batch, dtype) for conv in convs),
            jnp.zeros(shape, statistics_dtype(dtype)),
            jnp.zeros((batch,), jnp.int32),
        )

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: DeltaState
    ) -> tuple[jax.Array, DeltaState]:
        first, last = segments_at_ends(info)
        memory = continued(state.memory, state.segment, first)
        y, convs, memory = self._mix(x, info, state.convs, memory)
        return y, DeltaState(convs, memory, jnp.where(last == 0, state.segment, last))

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: DeltaState
    ) -> tuple[jax.Array, DeltaState]:
        one = TokenInfo(*(field[:, None] for field in info))
        heads, convs = self._heads(x_t[:, None], one, state.convs)
        query, key, value = (head[:, 0] for head in heads)
        y, memory = delta_rule_step(
            query,
            key,
            value,
            self._beta(x_t),
            continued(state.memory, state.segment, info.segments),
            log_decay=self._log_decay(x_t),
            valid=info.valid,
        )
        segment = jnp.where(info.valid, info.segment_ids, state.segment)
        return self._output(y, x_t), DeltaState(convs, memory, segment)


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _LENGTH_EPS)
