"""Neighborhood attention: each token of a grid attends to the tokens around it.

`grid` mixes whole grids, [batch, *axes, width], tile by tile. As a sequence mixer the same layer
reads each token's place from its position, the row-major index in the grid, so packed rows, parts
of grids and, where every axis is causal, decoding work too.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo, whole_rows
from effattn.checks import check_at_least, check_multiple, check_same_length
from effattn.masks import Neighborhood
from effattn.nn.mixers.attention import Attention, KVCache
from effattn.nn.rotary import rotary_tables, rotate
from effattn.parallel.sequence import Local, SequenceParallel

# The length of the one axis of text. Its last stride group is never cut.
ENDLESS = 2**30


@dataclass(kw_only=True)
class NeighborhoodConfig:
    """axes: the grid; None: one axis without end, which must be causal.

    window, stride, dilation, causal: one entry per axis, or one for all; see
    `effattn.masks.Neighborhood`. rotary_dim: channels of a head that turn, shared out evenly among
    the axes, each by its own coordinate; None: as many as fit, 0: none. The rest as in
    AttentionConfig.
    """

    axes: tuple[int, ...] | None = None
    window: tuple[int, ...] = (7,)
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (True,)
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    init_std: float = 0.02
    out_init_std: float | None = None

    def mask(self) -> Neighborhood:
        """Raises ValueError where the fields do not fit together."""
        axes = (ENDLESS,) if self.axes is None else tuple(self.axes)

        def per_axis(name: str) -> tuple[Any, ...]:
            values = tuple(getattr(self, name))
            values = values * len(axes) if len(values) == 1 else values
            check_same_length(name, values, len(axes), "axis")
            return values

        if self.axes is None and not all(per_axis("causal")):
            raise ValueError(
                "axes: got None, expected the lengths of the grid: only a causal axis has no end"
            )
        names = ("window", "stride", "dilation", "causal")
        return Neighborhood(axes, *(per_axis(name) for name in names))

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "NeighborhoodAttention":
        """Raises ValueError where axes, windows, heads or widths do not fit together."""
        mask = self.mask()
        check_at_least("num_heads", self.num_heads, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_multiple("num_heads", self.num_heads, "num_kv_heads", num_kv_heads)
        pairs = 2 * len(mask.axes)
        rotary_dim = head_dim // pairs * pairs if self.rotary_dim is None else self.rotary_dim
        check_multiple("rotary_dim", rotary_dim, "pairs of all axes", pairs)
        if rotary_dim > head_dim:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected at most head_dim={head_dim}")
        return NeighborhoodAttention(
            width,
            mask=mask,
            num_heads=self.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rotary_base=self.rotary_base,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class NeighborhoodAttention(Attention):
    """Attention under a Neighborhood mask; order comes from rotary embeddings, one per axis.

    Causal, and able to decode, where every axis is: row by row, no token then sees a later one.
    """

    mask: Neighborhood

    def __init__(
        self,
        width: int,
        *,
        mask: Neighborhood,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        rotary_base: float,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            width,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary_dim=0,  # positions do not turn heads here, coordinates do
            rotary_base=rotary_base,
            window=_reach(mask),
            qk_norm_eps=None,
            soft_cap=None,
            init_std=init_std,
            out_init_std=out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )
        self.mask = mask
        self.axis_rotary_dim = rotary_dim // len(mask.axes)
        self.causal = self.decodes = all(axis[-1] for axis in mask.per_axis())

    def _project(self, x: jax.Array, info: TokenInfo) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value = super()._project(x, info)
        size = self.axis_rotary_dim
        if size:
            tables = [
                rotary_tables(coordinate, size, self.rotary_base, x.dtype)
                for coordinate in self.mask.coordinates(info.positions)
            ]

            def turn(x: jax.Array) -> jax.Array:
                parts = jnp.split(x, [size * (i + 1) for i in range(len(tables))], axis=-1)
                turned = [rotate(part, table) for part, table in zip(parts, tables, strict=False)]
                return jnp.concatenate([*turned, parts[-1]], axis=-1)

            query, key = turn(query), turn(key)
        return query, key, value

    def grid(self, x: jax.Array) -> jax.Array:
        """Mixes whole grids: [batch, *axes, width] -> the same shape.

        Equal to a call on rows of prod(axes) tokens; blocks outside of the neighborhood are left
        out at trace time. Raises ValueError for axes other than the config's (any length where that
        has none).
        """
        axes = x.shape[1:-1]
        if len(axes) != len(self.mask.axes) or self.mask.axes not in (axes, (ENDLESS,)):
            raise ValueError(f"x: got a grid of {axes}, expected one of {self.mask.axes}")
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        heads = [
            y.reshape(x.shape[0], *axes, *y.shape[2:])
            for y in self._project(rows, whole_rows(rows))
        ]
        _, window, stride, dilation, causal = zip(*self.mask.per_axis(), strict=True)
        y = self.sequence.neighborhood_attention(
            *heads, window=window, stride=stride, dilation=dilation, causal=causal
        )
        y = checkpoint_name(y, "mixer")
        return self.out(y.reshape(*x.shape[:-1], -1))

    def init_state(self, batch: int, max_len: int, dtype: Any) -> KVCache:
        if not self.decodes:
            raise ValueError(
                f"causal: got {self.mask.causal}, but decoding wants every axis causal: this layer "
                "sees later tokens"
            )
        return super().init_state(batch, max_len, dtype)


def _reach(mask: Neighborhood) -> int:
    """How far behind a query its farthest key stands, in tokens, on causal axes."""
    return sum(
        (window - 1) * dilation * math.prod(mask.axes[axis + 1 :])
        for axis, (_, window, _, dilation, _) in enumerate(mask.per_axis())
    )
