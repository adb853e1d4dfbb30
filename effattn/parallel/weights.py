"""Parameters inside a `jax.shard_map`: they come in as they lie, and are gathered where it is used.

A parameter that came in whole would have its gradient summed whole on every device at the border,
and cut there. Gathered inside, its gradient is reduce-scattered: half the bytes.
"""

from collections.abc import Collection
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from effattn.parallel.mesh import parameter_specs


def parts_of(module: Any, manual: Collection[str]) -> Any:
    """How the parameters of a module, or of another pytree, lie over the axes `manual` of the
    ambient mesh: a prefix of the pytree, with a PartitionSpec for each. What has no axis names is
    whole."""

    def part(leaf: Any) -> PartitionSpec:
        names = leaf.get_metadata().get("out_sharding") if isinstance(leaf, nnx.Variable) else None
        if names is None:
            return PartitionSpec()
        array = leaf[...]
        # A scan has taken the leading axes of what it walks over.
        return part_of(array, tuple(names)[len(names) - array.ndim :], manual)

    return jax.tree.map(part, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def part_of(
    array: jax.Array, names: tuple[str | None, ...], manual: Collection[str]
) -> PartitionSpec:
    """The same of one array with these axis names."""
    spec, _ = parameter_specs(array, names, jax.sharding.get_abstract_mesh())
    return PartitionSpec(*(tuple(a for a in axes if a in manual) for axes in _axes(spec)))


def gathered(module: Any, parts: Any) -> Any:
    """`module` with its parameters whole, from the parts that `parts_of` has named."""

    def whole(spec: PartitionSpec, parameter: Any) -> Any:
        return jax.tree.map(lambda x: _gathered(x, spec), parameter)

    return jax.tree.map(whole, parts, module, is_leaf=lambda spec: isinstance(spec, PartitionSpec))


def _gathered(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    for axis, names in enumerate(_axes(spec)):
        if names:
            x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
    return x


def scattered(x: jax.Array, spec: PartitionSpec, manual: Collection[str]) -> jax.Array:
    """The sum of x over the devices of the axes `manual`, of which each gets its part."""
    for axis, names in enumerate(_axes(spec)):
        if names:
            x = jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    split = {name for names in _axes(spec) for name in names}
    rest = tuple(name for name in manual if name not in split)
    return jax.lax.psum(x, rest) if rest else x


def _axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes of every axis of an array."""
    return [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]
