"""BASED's gated short convolution (BaseConv): exact local mixing with a state of two tokens.

Source: Arora et al. 2024 (arXiv 2402.18668), the reference code's path without a conv bias.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.nn.conv import ConvState, ShortConv
from effattn.nn.param import Dense, normal
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class ShortConvConfig:
    """expand: the input projection is expand * width wide, half of it convolved, half the gate.

    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    kernel_size: int = 3
    expand: int = 4
    use_bias: bool = True
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "GatedShortConv":
        """Raises ValueError for an odd expanded width or kernel_size < 1."""
        check_at_least("kernel_size", self.kernel_size, 1)
        check_multiple("expand * width", self.expand * width, "branches", 2)
        return GatedShortConv(
            width,
            inner_width=self.expand * width // 2,
            kernel_size=self.kernel_size,
            use_bias=self.use_bias,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class GatedShortConv(nnx.Module):
    """out(silu(conv(inner(x))) * gate(x)): the activation is on the convolved branch only."""

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        inner_width: int,
        kernel_size: int,
        use_bias: bool,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        def project(fan_in: int, fan_out: int, axes: tuple[str, str], std: float) -> Dense:
            init = normal(std)
            return Dense(
                fan_in, fan_out, axes, init=init, use_bias=use_bias, dtype=dtype, rngs=rngs
            )

        self.inner = project(width, inner_width, ("embed", "conv"), init_std)
        self.gate = project(width, inner_width, ("embed", "conv"), init_std)
        self.conv = ShortConv(inner_width, kernel_size, sequence=sequence, dtype=dtype, rngs=rngs)
        self.out = project(inner_width, width, ("conv", "embed"), out_init_std)

    def _gated(self, convolved: jax.Array, x: jax.Array) -> jax.Array:
        return self.out(checkpoint_name(jax.nn.silu(convolved) * self.gate(x), "mixer"))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: ConvState | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        if state is not None:
            return self.prefill(x, info, state)[0], None
        return self._gated(self.conv(self.inner(x), info), x), None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> ConvState:
        return self.conv.init_state(batch, dtype)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: ConvState
    ) -> tuple[jax.Array, ConvState]:
        convolved, state = self.conv.prefill(self.inner(x), info, state)
        return self._gated(convolved, x), state

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: ConvState
    ) -> tuple[jax.Array, ConvState]:
        one = TokenInfo(*(field[:, None] for field in info))
        y, state = self.prefill(x_t[:, None], one, state)
        return y[:, 0], state
