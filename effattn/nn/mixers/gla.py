"""Gated linear attention: a decay per key channel, per head, or fixed, and a normed, gated output.

S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = key_dim^-1/2 q_t^T S_t. Sources: Yang et al. 2024,
GLA (arXiv 2312.06635); simple GLA, one g per head, as in flash-linear-attention; Sun et al. 2023,
retention (arXiv 2307.08621).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.nn.layers import RMSNorm, statistics_dtype
from effattn.nn.linear_state import (
    DocumentState,
    attend_on,
    attend_step,
    init_document_state,
    start_sums,
)
from effattn.nn.param import Dense, normal
from effattn.nn.rotary import rotary_tables, rotate
from effattn.nn.start import Learned, Start
from effattn.parallel.sequence import Local, SequenceParallel

GATES = ("channel", "scalar", "retention")


def retention_log_decay(num_heads: int) -> tuple[float, ...]:
    """log(1 - 2^(-5 - i)) of head i: from 1 / 32 per token to almost nothing."""
    return tuple(math.log1p(-(2.0 ** (-5 - i))) for i in range(num_heads))


@dataclass(kw_only=True)
class GLAConfig:
    """gate: what decays: "channel" (GLA), "scalar" (simple GLA), "retention" (fixed per head).

    key_width, value_width: of all heads together; None: half the width, the width. gate_rank: of
    the projection to the channels' gates. gate_normalizer: divides the logarithm of a gate.
    rotary_base: turns query and key as RetNet does; None: not. eps: of the norm over each head.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    gate: str = "channel"
    key_width: int | None = None
    value_width: int | None = None
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    rotary_base: float | None = None
    eps: float = 1e-6
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
    ) -> "GLA":
        """Raises ValueError for an unknown gate or where heads and widths do not fit together."""
        check_in("gate", self.gate, GATES)
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("gate_rank", self.gate_rank, 1)
        if self.chunk_size is not None:
            check_at_least("chunk_size", self.chunk_size, 1)
        key_width = width // 2 if self.key_width is None else self.key_width
        value_width = width if self.value_width is None else self.value_width
        check_multiple("key_width", key_width, "num_heads", self.num_heads)
        check_multiple("value_width", value_width, "num_heads", self.num_heads)
        if self.rotary_base is not None:
            check_multiple("key_width / num_heads", key_width // self.num_heads, "pairs", 2)
        return GLA(
            width,
            key_dim=key_width // self.num_heads,
            value_dim=value_width // self.num_heads,
            config=self,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class GLA(nnx.Module):
    """`out(norm(attention(q, k, v, g)) * silu(output_gate(x)))`, the norm over each head.

    g = log_sigmoid(up(down(x)) + bias) / gate_normalizer per channel, without `down` per head. No
    other biases, no activation on q, k and v.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        key_dim: int,
        value_dim: int,
        config: GLAConfig,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.key_dim, self.value_dim = config.num_heads, key_dim, value_dim
        self.kind, self.gate_normalizer = config.gate, config.gate_normalizer
        self.rotary_base, self.chunk_size = config.rotary_base, config.chunk_size
        self.sequence = sequence
        init = normal(config.init_std)

        def project(fan_in: int, fan_out: int, *axes: str, use_bias: bool = False) -> Dense:
            return Dense(
                fan_in, fan_out, axes, init=init, use_bias=use_bias, dtype=dtype, rngs=rngs
            )

        keys, values = self.num_heads * key_dim, self.num_heads * value_dim
        self.query = project(width, keys, "embed", "heads")
        self.key = project(width, keys, "embed", "heads")
        self.value = project(width, values, "embed", "heads")
        self.output_gate = project(width, values, "embed", "heads")
        down = up = None
        if self.kind == "channel":
            down = project(width, config.gate_rank, "embed", "rank")
            up = project(config.gate_rank, keys, "rank", "heads", use_bias=True)
        elif self.kind == "scalar":
            up = project(width, self.num_heads, "embed", "heads", use_bias=True)
        self.gate_down, self.gate_up = down, up
        self.norm = RMSNorm(value_dim, axes=(None,), eps=config.eps, dtype=dtype, rngs=rngs)
        out_std = config.init_std if config.out_init_std is None else config.out_init_std
        axes = ("heads", "embed")
        self.out = Dense(values, width, axes, init=normal(out_std), dtype=dtype, rngs=rngs)

    def _project(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., width] -> query, key [..., heads, key_dim], value [..., heads, value_dim]."""
        heads = (*x.shape[:-1], self.num_heads, -1)
        query, key = self.query(x).reshape(heads), self.key(x).reshape(heads)
        if self.rotary_base is not None:
            tables = rotary_tables(positions, self.key_dim, self.rotary_base, x.dtype)
            query, key = rotate(query, tables), rotate(key, tables)
        return query, key, self.value(x).reshape(heads)

    def _options(self, x: jax.Array) -> dict[str, Any]:
        """Of the op, in all its forms."""
        if self.gate_up is None:
            log_decay = jnp.asarray(retention_log_decay(self.num_heads))
        else:
            gate = self.gate_up(x if self.gate_down is None else self.gate_down(x))
            gate = gate.astype(statistics_dtype(x.dtype))
            log_decay = jax.nn.log_sigmoid(gate) / self.gate_normalizer
            if self.kind == "channel":
                log_decay = log_decay.reshape(*x.shape[:-1], self.num_heads, self.key_dim)
        return {"log_decay": log_decay, "scale": self.key_dim**-0.5}

    def _output(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = self.norm(checkpoint_name(y, "mixer")).reshape(*x.shape[:-1], -1)
        return self.out(y * jax.nn.silu(self.output_gate(x)))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: DocumentState | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is None and start is not None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        y, _ = self.sequence.linear_attention(
            *self._project(x, info.positions),
            **self._options(x),
            segment_ids=info.segments,
            chunk_size=self.chunk_size,
        )
        return self._output(y, x), None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> DocumentState:
        return init_document_state(batch, self.num_heads, self.key_dim, self.value_dim, dtype)

    def start_shapes(self, length: int) -> dict[str, Learned]:
        return start_sums(self.num_heads, self.key_dim, self.value_dim)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: DocumentState, start: Start | None = None
    ) -> tuple[jax.Array, DocumentState]:
        heads = self._project(x, info.positions)
        options = {**self._options(x), "chunk_size": self.chunk_size}
        y, state = attend_on(self.sequence, *heads, info, state, start, **options)
        return self._output(y, x), state

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: DocumentState, start: Start | None = None
    ) -> tuple[jax.Array, DocumentState]:
        heads = self._project(x_t, info.positions)
        y, state = attend_step(*heads, info, state, start, **self._options(x_t))
        return self._output(y, x_t), state
