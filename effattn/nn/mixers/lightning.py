"""Lightning attention: linear attention whose past fades at a rate of its own in each head.

out_t = scale sum_{j<=t} exp(-rate_h (t - j)) (q_t . k_j) v_j, without a denominator: a norm after
it keeps the scale. Sources: Qin et al. 2023, TransNormerLLM (arXiv 2307.14995); Qin et al. 2024,
Lightning Attention-2 (arXiv 2401.04658) and its successor (arXiv 2405.17381).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.nn.layers import LayerNorm, SimpleRMSNorm, statistics_dtype
from effattn.nn.linear_state import (
    DocumentState,
    attend_on,
    attend_step,
    init_document_state,
    start_sums,
)
from effattn.nn.param import Dense, normal, parameter
from effattn.nn.start import Learned, Start
from effattn.parallel.sequence import Local, SequenceParallel

SLOPES = ("transnormer", "paper", "fla")


def slopes(num_heads: int, convention: str = "transnormer") -> tuple[float, ...]:
    """The rate of every head in a layer of scale 1: three conventions that do not agree.

    "transnormer", the authors' code: 2^(-8 (i + 1) / h); where the number of heads h is no power of
    two, those of c heads, the largest below h, then every other one of 2 c heads. "paper" and "fla"
    (flash-linear-attention): 8 i / h, so that head 0 never forgets. Raises ValueError.
    """
    check_in("slopes", convention, SLOPES)
    check_at_least("num_heads", num_heads, 1)
    if convention != "transnormer":
        return tuple(8 * i / num_heads for i in range(num_heads))
    power = 1 << (num_heads.bit_length() - 1)
    first = tuple(2 ** (-8 * (i + 1) / power) for i in range(power))
    if power == num_heads:
        return first
    return first + slopes(2 * power)[0::2][: num_heads - power]


def slope_scale(layer: int, num_layers: int, convention: str = "transnormer") -> float:
    """The factor of a layer's slopes, smaller the deeper it stands; layers count from 0.

    "transnormer": 1 - l / (L - 1) + 1e-5, or 1 for a single layer; the last layer hardly forgets.
    "paper" and "fla": 1 - l / L. Raises ValueError for a layer that there is not.
    """
    check_in("slopes", convention, SLOPES)
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer: got {layer}, expected 0 <= layer < num_layers={num_layers}")
    if convention != "transnormer":
        return 1 - layer / num_layers
    return 1.0 if num_layers == 1 else 1 - layer / (num_layers - 1) + 1e-5


@dataclass(kw_only=True)
class LightningConfig:
    """version: 1 is TransNormerLLM as released; 2 the layer of its second paper (2405.17381).

    slopes: "transnormer", "paper" or "fla", see `slopes`; "fla" also scales scores by
    head_dim^-1/2. layer, num_layers: where the layer stands, which sets its slopes. lrpe: turns
    query and key by learned angles, as the first layer does; they become twice as wide.
    head_dim None: width / num_heads. eps None: 1e-6 (version 1) or 1e-5.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    version: int = 1
    slopes: str = "transnormer"
    layer: int = 0
    num_layers: int = 1
    lrpe: bool = False
    eps: float | None = None
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
    ) -> "Lightning":
        """Raises ValueError where heads and widths, the layer or the names do not fit."""
        check_at_least("num_heads", self.num_heads, 1)
        check_in("version", self.version, [1, 2])
        if self.chunk_size is not None:
            check_at_least("chunk_size", self.chunk_size, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        eps = (1e-6 if self.version == 1 else 1e-5) if self.eps is None else self.eps
        return Lightning(
            width,
            version=self.version,
            num_heads=self.num_heads,
            head_dim=head_dim,
            slopes=slopes(self.num_heads, self.slopes),
            slope_scale=slope_scale(self.layer, self.num_layers, self.slopes),
            scale=head_dim**-0.5 if self.slopes == "fla" else 1.0,
            lrpe=self.lrpe,
            eps=eps,
            chunk_size=self.chunk_size,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class LRPE(nnx.Module):
    """Turns a channel x at position p into (x cos(p theta), x sin(p theta)), theta trained.

    A score becomes sum_r q_r k_r cos(theta_r (i - j)). theta: [num_heads * head_dim], at first
    10000^(-2 r / its length), so that the frequencies fall from head to head. Angles in float32.
    """

    def __init__(self, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.heads = num_heads, head_dim

        def frequencies(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return 10000 ** (-2 * jnp.arange(shape[0], dtype=dtype) / shape[0])

        self.theta = parameter((num_heads * head_dim,), ("heads",), frequencies, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x: [..., num_heads, head_dim], positions: [...] -> [..., num_heads, 2 head_dim]."""
        dtype = statistics_dtype(x.dtype)
        theta = self.theta[...].reshape(self.heads).astype(dtype)
        angles = positions[..., None, None].astype(dtype) * theta
        parts = [x * jnp.cos(angles), x * jnp.sin(angles)]
        return jnp.concatenate(parts, axis=-1).astype(x.dtype)


class LowRankGate(nnx.Module):
    """`sigmoid(up(down(x)))`, no biases."""

    def __init__(
        self, width: int, rank: int, out: int, *, init_std: float, dtype: Any, rngs: nnx.Rngs
    ):
        init = normal(init_std)
        self.down = Dense(width, rank, ("embed", "rank"), init=init, dtype=dtype, rngs=rngs)
        self.up = Dense(rank, out, ("rank", "heads"), init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.up(self.down(x)))


class Lightning(nnx.Module):
    """`out(norm(attention(silu(q), silu(k), v)) * gate(x))`, no biases.

    Version 1: v and the gate are linear, the norm has no scale. Version 2: silu on v, LayerNorm and
    a sigmoid gate of rank head_dim. The norm is over all heads together. A token that is padding
    does not count, whereas the authors' takes part in the decay.

    slope_scale, an argument of the calls: the factor of the slopes in this layer, instead of the
    one that the config's `layer` gives.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        version: int,
        num_heads: int,
        head_dim: int,
        slopes: tuple[float, ...],
        slope_scale: float,
        scale: float,
        lrpe: bool,
        eps: float,
        chunk_size: int | None,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.version, self.num_heads, self.head_dim = version, num_heads, head_dim
        self.slopes, self.slope_scale, self.scale = slopes, slope_scale, scale
        self.chunk_size, self.sequence = chunk_size, sequence
        inner = num_heads * head_dim

        def project() -> Dense:
            axes, init = ("embed", "heads"), normal(init_std)
            return Dense(width, inner, axes, init=init, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = project(), project(), project()
        self.lrpe = LRPE(num_heads, head_dim, rngs=rngs) if lrpe else None
        self.norm: SimpleRMSNorm | LayerNorm
        self.gate: Dense | LowRankGate
        if version == 1:
            self.norm = SimpleRMSNorm(eps=eps, dtype=dtype)
            self.gate = project()
        else:
            self.norm = LayerNorm(inner, axes=("heads",), eps=eps, dtype=dtype, rngs=rngs)
            self.gate = LowRankGate(
                width, head_dim, inner, init_std=init_std, dtype=dtype, rngs=rngs
            )
        axes, init = ("heads", "embed"), normal(out_init_std)
        self.out = Dense(inner, width, axes, init=init, dtype=dtype, rngs=rngs)

    def _project(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., width] -> query, key and value [..., num_heads, channels]."""
        heads = (*x.shape[:-1], self.num_heads, self.head_dim)
        query = jax.nn.silu(self.query(x)).reshape(heads)
        key = jax.nn.silu(self.key(x)).reshape(heads)
        value = self.value(x).reshape(heads)
        if self.version == 2:
            value = jax.nn.silu(value)
        if self.lrpe is not None:
            query, key = self.lrpe(query, positions), self.lrpe(key, positions)
        return query, key, value

    def _options(self, slope_scale: jax.Array | None) -> dict[str, Any]:
        """Of the op, in all its forms."""
        factor = self.slope_scale if slope_scale is None else slope_scale
        return {"log_decay": -jnp.asarray(self.slopes) * factor, "scale": self.scale}

    def _output(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = checkpoint_name(y, "mixer")
        return self.out(self.norm(y.reshape(*x.shape[:-1], -1)) * self.gate(x))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: DocumentState | None = None,
        key: jax.Array | None = None,
        slope_scale: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is None and start is not None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        if state is not None:
            return self.prefill(x, info, state, slope_scale, start)[0], None
        y, _ = self.sequence.linear_attention(
            *self._project(x, info.positions),
            **self._options(slope_scale),
            segment_ids=info.segments,
            chunk_size=self.chunk_size,
        )
        return self._output(y, x), None

    def _sizes(self) -> tuple[int, int, int]:
        """Of the sums: heads, channels of keys and of values."""
        key_dim = self.head_dim if self.lrpe is None else 2 * self.head_dim
        return self.num_heads, key_dim, self.head_dim

    def init_state(self, batch: int, max_len: int, dtype: Any) -> DocumentState:
        return init_document_state(batch, *self._sizes(), dtype)

    def start_shapes(self, length: int) -> dict[str, Learned]:
        return start_sums(*self._sizes())

    def prefill(
        self,
        x: jax.Array,
        info: TokenInfo,
        state: DocumentState,
        slope_scale: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, DocumentState]:
        heads = self._project(x, info.positions)
        options = {**self._options(slope_scale), "chunk_size": self.chunk_size}
        y, state = attend_on(self.sequence, *heads, info, state, start, **options)
        return self._output(y, x), state

    def step(
        self,
        x_t: jax.Array,
        info: TokenInfo,
        state: DocumentState,
        slope_scale: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, DocumentState]:
        heads = self._project(x_t, info.positions)
        y, state = attend_step(*heads, info, state, start, **self._options(slope_scale))
        return self._output(y, x_t), state
