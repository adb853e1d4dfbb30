"""Neighborhood attention over 1-3 axes: tokens in the order of tiles, then `attention` as it is.

The permuted tokens keep their places in the grid as positions known at trace time, so the mask
`Neighborhood` yields the exact list of blocks, and every backend of `attention` takes it.
"""

from collections.abc import Sequence
from typing import Any

import jax

from effattn.blocks import BlockSizes
from effattn.checks import Dims, check_at_least, check_multiple, check_same_length, check_shape
from effattn.masks import Neighborhood
from effattn.pallas_kernels.attention.api import attention
from effattn.pallas_kernels.attention.simulator import tile_for
from effattn.pallas_kernels.attention.tiles import Tiling
from effattn.pallas_kernels.target import tpu_target

PerAxis = int | Sequence[int]


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
    extra_key: jax.Array | None = None,
    extra_value: jax.Array | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    tile: PerAxis | None = None,
) -> Any:
    """Softmax attention in which each token of a grid sees the `window` tokens around it.

    query: [batch, *axes, num_heads, head_dim] with 1 to 3 axes; key: [batch, *axes, num_kv_heads,
    head_dim]; value: [batch, *axes, num_kv_heads, value_dim]; num_kv_heads divides num_heads.
    window, stride, dilation, causal: one for all axes, or one per axis. At an edge the window is
    shifted, never cut, so every query sees prod(window) keys; on a causal axis it ends at the query
    itself. `effattn.masks.Neighborhood` has the exact rule.
    extra_key, extra_value: [batch, num_extra, num_kv_heads, ...], seen by every query.
    scale: default head_dim ** -0.5. logit_soft_cap: cap * tanh(logits / cap), before the mask.
    implementation: as in `attention`. tile: tokens per axis that stand together, counted inside a
    dilation group; None: the cheapest by `simulator.tile_for`.

    Returns out [batch, *axes, num_heads, value_dim] in the dtype of query; with return_lse also the
    log-sum-exp of the logits [batch, *axes, num_heads], float32 or wider. Both are differentiable.
    Raises ValueError for a window x dilation longer than its axis, a stride longer than the window,
    and arrays that do not fit together.
    Source: Hassani et al. 2023 (Neighborhood Attention Transformer), Hassani and Shi 2022
    (dilation), Hassani et al. 2025 (Generalized Neighborhood Attention: stride).
    """
    axes = _check_arrays(query, key, value)
    mask = neighborhood_mask(axes, window=window, stride=stride, dilation=dilation, causal=causal)
    if tile is None:
        on_tpu = implementation.startswith("tpu") or tpu_target() is not None
        platform = "tpu" if on_tpu else jax.default_backend()
        sides = tile_for(mask, platform, query.shape[0] * query.shape[-2])
    else:
        sides = per_axis("tile", tile, len(axes))
    tiling = Tiling(axes, sides, mask.dilation or (1,) * len(axes))
    arrays = [query, key, value]
    if tiling.is_plain:
        positions: dict[str, Any] = {}
    else:
        arrays = [tiling.permute(x) for x in arrays]
        positions = {"q_positions": tiling.q_positions(), "kv_positions": tiling.kv_positions()}
    size = tiling.tokens_per_tile
    # A grid in one tile is an ordinary short sequence, whose blocks the backend knows best.
    block_sizes = None if tiling.num_slots == size else BlockSizes(size, size)
    out, lse = attention(
        *arrays,
        mask=mask,
        **positions,
        extra_key=extra_key,
        extra_value=extra_value,
        scale=scale,
        logit_soft_cap=logit_soft_cap,
        implementation=implementation,
        return_lse=True,
        block_sizes=block_sizes,
    )
    if not tiling.is_plain:
        out, lse = tiling.restore(out), tiling.restore(lse)
    return (out, lse) if return_lse else out


def neighborhood_mask(
    axes: tuple[int, ...],
    *,
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """The mask of `neighborhood_attention` over a grid, its arguments spelled out per axis."""
    rank = len(axes)
    flags = (causal,) * rank if isinstance(causal, bool) else tuple(bool(c) for c in causal)
    check_same_length("causal", flags, rank, "axis")
    windows, strides = per_axis("window", window, rank), per_axis("stride", stride, rank)
    dilations = per_axis("dilation", dilation, rank)
    for axis, (n, w, s, d) in enumerate(zip(axes, windows, strides, dilations, strict=True)):
        if w * d > n:
            product = f"{w}" if d == 1 else f"{w} x dilation {d} = {w * d}"
            raise ValueError(
                f"window: got {product} on axis {axis}, expected at most its length, {n}"
            )
        if s > w:
            raise ValueError(f"stride: got {s} on axis {axis}, expected at most window={w}")
    return Neighborhood(axes, windows, strides, dilations, flags)


def per_axis(name: str, value: PerAxis, rank: int) -> tuple[int, ...]:
    """One number per axis, each at least 1, from one for all or a sequence of them."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    check_same_length(name, values, rank, "axis")
    for one in values:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise ValueError(f"{name}: got {one!r}, expected an integer, or one per axis")
        check_at_least(name, one, 1)
    return tuple(int(one) for one in values)


def _check_arrays(query: Any, key: Any, value: Any) -> tuple[int, ...]:
    """The grid's axes. Raises ValueError unless the three fit together."""
    rank = query.ndim - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            "query: expected [batch, *axes, num_heads, head_dim] with 1 to 3 axes, "
            f"got {tuple(query.shape)}"
        )
    grid = " ".join("xyz"[:rank])
    dims: Dims = {}
    check_shape("query", query, f"b {grid} n h", dims)
    check_shape("key", key, f"b {grid} k h", dims)
    check_shape("value", value, f"b {grid} k e", dims)
    check_multiple("query's num_heads", dims["n"][0], "key's num_kv_heads", dims["k"][0])
    return tuple(query.shape[1:-2])
