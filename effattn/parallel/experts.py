"""Tokens to the experts that they chose and back, over the devices that share the experts.

The experts lie over some axes of the mesh (a fold), whatever attention does with the same axes: of
16 devices, attention may have 4 parts of a row x 4 groups of heads, and the MLPs 16 experts. Two
ways to meet:

- dropless: every device of the group gathers the group's tokens and keeps the rows that chose its
  own experts, whose number only the routing knows; one product over rows sorted by expert. Of N
  devices, a token's vector reaches N - 1 others, and comes back in one reduce-scatter.
- capacity: an expert has so many slots for the tokens of a group of tokens; what fits is exchanged
  in one all-to-all, slots and all. What does not fit is dropped, by the order of the tokens.

Sources: Lepikhin et al. 2020, GShard (arXiv 2006.16668), groups and capacity; Gale et al. 2022,
MegaBlocks (arXiv 2211.15841), dropless; Liu et al. 2025, MoE Parallel Folding (arXiv 2504.14960).
Where we differ: slots go to the earlier token, not to the first choices of all tokens first, so
that no token changes what an earlier one of its group gets.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from effattn.parallel.mesh import SEQUENCE_AXIS, dividing_axes, free_axes, mesh_axes
from effattn.parallel.tiles import ROW_AXES
from effattn.parallel.weights import gathered, parts_of


class Slots(NamedTuple):
    """per_expert: slots of an expert for the tokens of a group. group: tokens of a row that share
    them, which lie together on a device."""

    per_expert: int
    group: int


class _Layout(NamedTuple):
    """What a device knows of the others.

    experts: mesh axes of the experts, in order. shared: those of them that the tokens lie over too;
    over the others every device has all of its neighbours' tokens. partial: axes over which results
    are still to be summed.
    """

    experts: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()


def over_experts(
    experts: Any, x: jax.Array, choice: jax.Array, weight: jax.Array, slots: Slots | None
) -> tuple[jax.Array, jax.Array]:
    """(sum over the choices of weight x expert(x), which choices were taken).

    experts: a module whose parameters are [count, ...], with `count`; `up`, the one [count, width,
    inner] that says how both lie; and `rows(x, sizes)`, what experts make of rows: x [rows, width]
    sorted by expert, `sizes` of them each, or with None x [count, rows, width].
    x: [batch, seq_len, width]. choice: int32 [batch, seq_len, choices], `count` for none; weight:
    float, the same. slots: None is dropless. Returns ([batch, seq_len, width] in x's dtype, bool
    [batch, seq_len, choices]).
    """
    free, (batch, seq_len) = free_axes(), x.shape[:2]
    of_rows = dividing_axes(ROW_AXES, free, batch)
    of_columns = dividing_axes((SEQUENCE_AXIS,), free, seq_len)
    of_tokens = (*of_rows, *of_columns)
    if all(ways == 1 for ways in free.values()):
        return _own(experts, x, choice, weight, slots, _Layout())
    of_experts, _, of_inner = mesh_axes(parts_of(experts.up, free))
    layout = _Layout(
        experts=of_experts,
        shared=tuple(name for name in of_experts if name in of_tokens),
        partial=tuple(name for name in (*of_experts, *of_inner) if name not in of_tokens),
    )
    manual = {*of_tokens, *of_experts, *of_inner}
    parts = parts_of(experts, manual)

    def own(
        experts: Any, x: jax.Array, choice: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        own_experts = gathered(experts, parts, but={*of_experts, *of_inner})
        return _own(own_experts, x, choice, weight, slots, layout)

    tokens = PartitionSpec(of_rows, of_columns)
    split = jax.shard_map(
        own,
        in_specs=(parts, tokens, tokens, tokens),
        out_specs=tokens,
        axis_names=manual,
        check_vma=False,
    )
    return split(experts, x, choice, weight)


def _own(
    experts: Any,
    x: jax.Array,
    choice: jax.Array,
    weight: jax.Array,
    slots: Slots | None,
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    """`over_experts` of the tokens of one device; the parameters are those of its own experts."""
    if slots is None:
        y, taken = _dropless(experts, x, choice, weight, layout)
    else:
        y, taken = _with_slots(experts, x, choice, weight, slots, layout)
    # In x's dtype: a device's part has been summed in float32, and at most `choices` parts differ
    # from zero.
    y = y.astype(x.dtype)
    return (jax.lax.psum(y, layout.partial) if layout.partial else y), taken


def _dropless(
    experts: Any, x: jax.Array, choice: jax.Array, weight: jax.Array, layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    choices, taken = choice.shape[-1], choice < experts.count
    tokens = x.reshape(-1, x.shape[-1])
    flat, scale = choice.reshape(-1, choices), weight.reshape(-1, choices)
    if layout.shared:
        tokens, flat, scale = (
            jax.lax.all_gather(a, layout.shared, tiled=True) for a in (tokens, flat, scale)
        )
    held = experts.up.shape[0]
    local = flat.reshape(-1) - _index(layout.experts) * held
    local = jnp.where((local >= 0) & (local < held), local, held)
    sizes = jnp.sum(local[:, None] == jnp.arange(held), axis=0, dtype=jnp.int32)
    # A token chooses an expert once: so many rows may be a device's own.
    rows = len(tokens) * min(choices, held)
    source = jnp.argsort(local, stable=True)[:rows]
    source = jnp.where(jnp.arange(rows) < jnp.sum(sizes), source, local.size)
    place = _inverse(source, local.size)

    y = experts.rows(_spread(tokens, source, place), sizes)
    y = _weighed(_collect(y, source, place), scale)
    if layout.shared:
        y = jax.lax.psum_scatter(y.astype(x.dtype), layout.shared, tiled=True)
    return y.reshape(x.shape), taken


def _with_slots(
    experts: Any,
    x: jax.Array,
    choice: jax.Array,
    weight: jax.Array,
    slots: Slots,
    layout: _Layout,
) -> tuple[jax.Array, jax.Array]:
    batch, seq_len, width = x.shape
    choices, count, capacity = choice.shape[-1], experts.count, slots.per_expert
    if seq_len % slots.group:
        raise ValueError(
            f"model.experts.group_size: got {slots.group}, expected a divisor of the {seq_len} "
            "tokens of a row that lie on one device"
        )
    tokens = x.reshape(-1, slots.group, width)
    flat = choice.reshape(len(tokens), -1)  # the choices of a token stand together
    source, taken = jax.vmap(functools.partial(_slots, count=count, capacity=capacity))(flat)
    # Of experts that other devices hold beside the same tokens, those see to the slots.
    held = experts.up.shape[0]
    ways = [jax.lax.axis_size(name) for name in layout.experts]
    source = source.reshape(-1, *ways, held * capacity)
    for axis, name in reversed(list(enumerate(layout.experts, start=1))):
        if name not in layout.shared:
            source = jax.lax.dynamic_index_in_dim(
                source, jax.lax.axis_index(name), axis, keepdims=False
            )
    source = source.reshape(len(tokens), -1)
    place = jax.vmap(lambda row: _inverse(row, flat.shape[1]))(source)
    sent = jax.vmap(_spread)(tokens, source, place)

    others = math.prod(jax.lax.axis_size(name) for name in layout.shared)
    sent = sent.reshape(len(tokens), others, held, capacity, width)
    if layout.shared:
        sent = jax.lax.all_to_all(sent, layout.shared, split_axis=1, concat_axis=0, tiled=True)
    # [groups of all, 1, held, capacity, width] -> [held, rows, width]
    sent = sent.reshape(-1, held, capacity, width).swapaxes(0, 1)
    shape = sent.shape
    y = experts.rows(sent.reshape(held, -1, width), None)
    y = y.reshape(shape).swapaxes(0, 1)[:, None]
    if layout.shared:
        y = jax.lax.all_to_all(y, layout.shared, split_axis=0, concat_axis=1, tiled=True)
    y = jax.vmap(_collect)(y.reshape(len(tokens), -1, width), source, place)
    y = _weighed(y.reshape(-1, width), weight.reshape(-1, choices))
    return y.reshape(x.shape), taken.reshape(choice.shape)


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    """Which part of what is laid over `axes` this device has."""
    return jax.lax.axis_index(axes) if axes else 0


def _slots(choice: jax.Array, *, count: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(which entry of `choice` [entries] each of the count x capacity slots holds, `entries` where
    it is free; which entries have a slot). Earlier entries come first."""
    entries = len(choice)
    order = jnp.argsort(choice, stable=True)
    ranked = choice[order]
    rank = jnp.arange(entries) - jnp.searchsorted(ranked, ranked, side="left")
    fits = (rank < capacity) & (ranked < count)
    slot = jnp.where(fits, ranked * capacity + rank, count * capacity)
    source = jnp.full((count * capacity,), entries, jnp.int32)
    source = source.at[slot].set(order.astype(jnp.int32), mode="drop")
    return source, jnp.zeros((entries,), bool).at[order].set(fits)


def _inverse(source: jax.Array, entries: int) -> jax.Array:
    """int32 [entries]: the row of `source` that names each entry, `len(source)` for none."""
    place = jnp.full((entries,), len(source), jnp.int32)
    return place.at[source].set(jnp.arange(len(source), dtype=jnp.int32), mode="drop")


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x[rows], zeros for a row that x does not have."""
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)


# Entry e is choice e % choices of token e // choices. `source` names the entry of every row,
# `place` the row of every entry: with both, each way is a gather forward and backward.


@jax.custom_vjp
def _spread(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """x [tokens, width] -> [rows, width], the token of every row's entry."""
    return _take(x, source // (len(place) // len(x)))


def _spread_forward(x: jax.Array, source: jax.Array, place: jax.Array) -> Any:
    return _spread(x, source, place), (place, x.shape)


def _spread_backward(saved: Any, dy: jax.Array) -> Any:
    place, (tokens, width) = saved
    parts = _take(dy, place).reshape(tokens, -1, width)
    return jnp.sum(parts, axis=1, dtype=jnp.float32).astype(dy.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """y [rows, width] -> [entries, width], the row of every entry, zeros where it has none."""
    return _take(y, place)


def _collect_forward(y: jax.Array, source: jax.Array, place: jax.Array) -> Any:
    return _collect(y, source, place), source


def _collect_backward(source: jax.Array, dy: jax.Array) -> Any:
    return _take(dy, source), None, None


_collect.defvjp(_collect_forward, _collect_backward)


def _weighed(y: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over a token's choices. y: [tokens x choices, width]; weight: [tokens, choices]."""
    dtype = jnp.promote_types(weight.dtype, jnp.float32)
    y = y.reshape(*weight.shape, -1)
    return jnp.sum(y.astype(dtype) * weight.astype(dtype)[..., None], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_product(x: jax.Array, kernel: jax.Array, sizes: jax.Array, dtype: Any) -> jax.Array:
    """[rows, out]: each row x [rows, in] times its expert's kernel [experts, in, out].

    Rows are sorted by expert, `sizes` int32 [experts] of them each; zeros behind the last.
    As in `effattn.nn.param.project`: factors in `dtype`, the kernel's gradient in its own. For TPUs
    XLA has a kernel that leaves the rows behind the last group out.
    """
    y = jax.lax.ragged_dot(
        x.astype(dtype), kernel.astype(dtype), sizes, preferred_element_type=dtype
    )
    return _masked(y, sizes)


def _masked(y: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(len(y))[:, None] < jnp.sum(sizes), y, 0)


def _grouped_forward(x: jax.Array, kernel: jax.Array, sizes: jax.Array, dtype: Any) -> Any:
    return grouped_product(x, kernel, sizes, dtype), (x, kernel, sizes)


def _grouped_backward(dtype: Any, saved: Any, dy: jax.Array) -> Any:
    x, kernel, sizes = saved
    dy = _masked(dy.astype(dtype), sizes)
    transposed = kernel.astype(dtype).swapaxes(1, 2)
    dx = jax.lax.ragged_dot(dy, transposed, sizes, preferred_element_type=dtype)
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    dkernel = jax.lax.ragged_dot_general(
        x.astype(dtype), dy, sizes, over_rows, preferred_element_type=kernel.dtype
    )
    return _masked(dx, sizes).astype(x.dtype), dkernel, None


grouped_product.defvjp(_grouped_forward, _grouped_backward)
