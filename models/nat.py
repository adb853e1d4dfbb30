"""The Neighborhood Attention Transformer: images, and any grid of 1-3 axes, to classes.

A stem of strided convolutions, stages of pre-norm neighborhood attention and MLP, a strided
convolution between stages that halves the grid and doubles the width, a mean over the grid, a
classifier. Source: Hassani et al. 2023 (arXiv 2204.07143), figure 4; dilated blocks: Hassani and
Shi 2022 (arXiv 2209.15001). Where we differ: rotary embeddings, one per axis, in place of relative
position biases, which fused kernels lack; RMSNorm in place of LayerNorm.

An image is a row of tokens: intensities 0 .. vocab_size - 1, row by row, channels last. Its class
is the target at whichever places carry a loss weight; the answer is the same at each.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.nn.layers import Head, RMSNorm, statistics_dtype
from effattn.nn.mixer import Output, State
from effattn.nn.mixers.neighborhood import NeighborhoodConfig
from effattn.nn.param import Dense, normal, parameter
from effattn.parallel.mesh import constrain_rows
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class NATConfig:
    """The defaults are NAT-Mini on ImageNet.

    axes: the image, or the video. width: of the last stage; each stage before it has half of the
    next one's. window: along every axis, cut to the axis where that is shorter. dilated: every
    second block takes the largest dilation that its grid allows (DiNAT). stem_strides: one 3-wide
    convolution each.
    """

    axes: tuple[int, ...] = (224, 224)
    channels: int = 3
    depths: tuple[int, ...] = (3, 4, 6, 5)
    width: int = 512
    head_dim: int = 32
    window: int = 7
    dilated: bool = False
    stem_strides: tuple[int, ...] = (2, 2)
    mlp_ratio: int = 3
    rotary_base: float = 100.0  # coordinates are small
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def grids(self) -> list[tuple[int, ...]]:
        """The grid of every stage: a convolution of stride s makes n into ceil(n / s)."""
        grid = tuple(self.axes)
        for stride in self.stem_strides:
            grid = tuple(-(-n // stride) for n in grid)
        grids = [grid]
        for _ in self.depths[1:]:
            grids.append(tuple(-(-n // 2) for n in grids[-1]))
        return grids

    def widths(self) -> list[int]:
        """The width of every stage. Raises ValueError where they are no whole number of heads."""
        check_at_least("len(model.depths)", len(self.depths), 1)
        last = len(self.depths) - 1
        check_multiple("model.width", self.width, "head_dim x 2^downsamplings", self.unit)
        return [self.width // 2 ** (last - stage) for stage in range(last + 1)]

    @property
    def unit(self) -> int:
        return self.head_dim * 2 ** (len(self.depths) - 1)

    def mixer(self, grid: tuple[int, ...], width: int, block: int) -> NeighborhoodConfig:
        """The attention of one block of a stage; the residual stream's share is in `Block`."""
        window = tuple(min(self.window, n) for n in grid)
        dilation = (1,) * len(grid)
        if self.dilated and block % 2:
            dilation = tuple(n // w for n, w in zip(grid, window, strict=True))
        return NeighborhoodConfig(
            axes=grid,
            window=window,
            dilation=dilation,
            causal=(False,),
            num_heads=width // self.head_dim,
            rotary_base=self.rotary_base,
            init_std=self.initializer_range,
        )

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "NAT":
        """Raises ValueError where a field does not fit another."""
        check_at_least("vocab_size", vocab_size, 2)
        check_at_least("model.channels", self.channels, 1)
        for name in ("stem_strides", "depths"):
            for value in getattr(self, name):
                check_at_least(f"model.{name}", value, 1)
        return NAT(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class GridConv(nnx.Module):
    """A 3-wide convolution over the axes of a grid: [batch, *axes, in] -> [batch, *axes', out]."""

    def __init__(
        self, rank: int, fan_in: int, fan_out: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.stride, self.dtype = stride, dtype
        shape = (*(3,) * rank, fan_in, fan_out)
        axes = (*(None,) * (rank + 1), "embed")
        self.kernel = parameter(shape, axes, normal((3**rank * fan_in) ** -0.5), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        rank = x.ndim - 2
        space = "DHW"[-rank:]
        return jax.lax.conv_general_dilated(
            # Images stay whole: where their places lie over devices, XLA of jaxlib 0.11.2 gets the
            # gradient of a kernel wrong.
            constrain_rows(x.astype(self.dtype)),
            self.kernel[...].astype(self.dtype),
            window_strides=(self.stride,) * rank,
            padding=((1, 1),) * rank,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        )


class MLP(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, width: int, inner: int, std: float, *, dtype: Any, rngs: nnx.Rngs):
        init, options = normal(std), {"use_bias": True, "dtype": dtype, "rngs": rngs}
        self.up = Dense(width, inner, ("embed", "mlp"), init=init, **options)
        self.down = Dense(inner, width, ("mlp", "embed"), init=init, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x)))


class Block(nnx.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))` on a grid, the residual stream in x's dtype."""

    def __init__(
        self,
        config: NATConfig,
        mixer: NeighborhoodConfig,
        width: int,
        *,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        std, inner = config.initializer_range, config.mlp_ratio * width
        self.attention_norm = RMSNorm(width, eps=config.norm_eps, **options)
        self.attention = mixer.build(width, sequence=sequence, **options)
        self.mlp_norm = RMSNorm(width, eps=config.norm_eps, **options)
        self.mlp = MLP(width, inner, std, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention.grid(self.attention_norm(x)).astype(x.dtype)
        return x + self.mlp(self.mlp_norm(x)).astype(x.dtype)


class NAT(nnx.Module):
    """tokens [batch, prod(axes) * channels] -> the class's hidden vector at every place.

    A row is one image, so rows are not packed, and nothing is decoded.
    """

    causal = False
    decodes = False
    packs = False

    def __init__(
        self,
        config: NATConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.axes, self.channels, self.levels = tuple(config.axes), config.channels, vocab_size
        self.dtype = dtype
        rank, widths, grids = len(self.axes), config.widths(), config.grids()
        options = {"dtype": dtype, "rngs": rngs}

        self.stem: nnx.List[GridConv] = nnx.List()
        fan_in = config.channels
        for i, stride in enumerate(config.stem_strides):
            # The first convolutions have half of the first stage's width (figure 4).
            last = i == len(config.stem_strides) - 1
            fan_out = widths[0] if last else widths[0] // 2
            self.stem.append(GridConv(rank, fan_in, fan_out, stride, **options))
            fan_in = fan_out
        self.stem_norm = RMSNorm(widths[0], eps=config.norm_eps, **options)
        self.stages: nnx.List[nnx.List[Block]] = nnx.List()
        self.downsamplers: nnx.List[GridConv] = nnx.List()
        self.downsampler_norms: nnx.List[RMSNorm] = nnx.List()
        for stage, (depth, grid, width) in enumerate(
            zip(config.depths, grids, widths, strict=True)
        ):
            if stage:
                self.downsamplers.append(GridConv(rank, widths[stage - 1], width, 2, **options))
                self.downsampler_norms.append(RMSNorm(width, eps=config.norm_eps, **options))
            self.stages.append(
                nnx.List(
                    Block(
                        config,
                        config.mixer(grid, width, i),
                        width,
                        sequence=sequence,
                        **options,
                    )
                    for i in range(depth)
                )
            )
        self.final_norm = RMSNorm(config.width, eps=config.norm_eps, **options)
        self.head = Head(config.width, vocab_size, init_std=config.initializer_range, **options)

    def _image(self, tokens: jax.Array) -> jax.Array:
        """Intensities from -1 to 1, [batch, *axes, channels]."""
        shape = (tokens.shape[0], *self.axes, self.channels)
        if tokens.size != tokens.shape[0] * self._places:
            raise ValueError(
                f"tokens: got rows of {tokens.shape[1]}, expected {self._places}: an image of "
                f"{self.axes} with {self.channels} channels"
            )
        wide = statistics_dtype(self.dtype)
        return (2 * tokens.astype(wide) / (self.levels - 1) - 1).reshape(shape)

    @property
    def _places(self) -> int:
        places = self.channels
        for n in self.axes:
            places *= n
        return places

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """Raises ValueError where a row does not hold exactly one image."""
        x = self._image(tokens)
        wide = x.dtype
        for convolution in self.stem:
            x = convolution(x)
        x = self.stem_norm(x).astype(wide)
        for stage, blocks in enumerate(self.stages):
            if stage:
                x = self.downsamplers[stage - 1](x)
                x = self.downsampler_norms[stage - 1](x).astype(wide)
            for block in blocks:
                x = block(x)
        x = self.final_norm(x).astype(wide)
        pooled = jnp.mean(x.reshape(x.shape[0], -1, x.shape[-1]), axis=1).astype(self.dtype)
        hidden = jnp.broadcast_to(pooled[:, None], (*tokens.shape, pooled.shape[-1]))
        return Output(hidden, losses={}, metrics={}, extra=extra)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.head.logits(hidden)

    def init_state(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> State:
        raise ValueError("this model reads whole images: it has no state and generates nothing")
