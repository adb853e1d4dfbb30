"""Over which mesh axes an array varies inside `jax.shard_map`, which its type says.

A loop's carry must vary as what is added to it, a cotangent as its primal, and a Pallas call says
of its outputs how they vary.
"""

from typing import Any

import jax


def varying_alike(tree: Any) -> Any:
    """The arrays, each varying over all mesh axes that one of them varies over.

    The cotangent of an array that all devices share is a sum over them; jax adds it here.
    """
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    if not axes:
        return tree

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def varying_shape(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """The type of an output that varies over all mesh axes that an array of `like` varies over."""
    some = jax.tree.leaves(varying_alike(like))[0]
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(some).manual_axis_type)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
