"""Parameters inside a `jax.shard_map`: they come in as they lie, and are gathered where used.

A parameter that came in whole would have its gradient summed whole on every device at the border,
and cut there. Gathered inside, its gradient is reduce-scattered: half the bytes.
"""

from collections.abc import Collection
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from effattn.parallel.mesh import mesh_axes, parameter_specs


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
        names = tuple(names)[len(names) - array.ndim :]
        spec, _ = parameter_specs(array, names, jax.sharding.get_abstract_mesh())
        return PartitionSpec(*(tuple(a for a in axes if a in manual) for axes in mesh_axes(spec)))

    return jax.tree.map(part, module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def gathered(module: Any, parts: Any, but: Collection[str] = ()) -> Any:
    """`module` with its parameters whole, from the parts that `parts_of` has named; they stay in
    parts over the axes `but`."""

    def whole(spec: PartitionSpec, parameter: Any) -> Any:
        return jax.tree.map(lambda x: _gathered(x, spec, but), parameter)

    return jax.tree.map(whole, parts, module, is_leaf=lambda spec: isinstance(spec, PartitionSpec))


def _gathered(x: jax.Array, spec: PartitionSpec, but: Collection[str]) -> jax.Array:
    for axis, names in enumerate(mesh_axes(spec)):
        if names and names[0] not in but:
            # One mesh axis after another, the inner first: as many bytes as over all at once, which
            # TPUs can only do by an all-reduce where the axes make no ring together.
            for name in reversed(names):
                x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x
