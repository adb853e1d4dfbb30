"""One number for all the bits of a pytree, so that a damaged checkpoint is not taken for whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def _checksum(leaves: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        bits = leaf
        if leaf.dtype != bool:
            size = min(leaf.dtype.itemsize, 4)  # 64 bits become two words
            bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * size}"))
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32) * np.uint32(2 * number + 1)
    return total


def checksum(tree: Any) -> int:
    """A sum of all bits that any changed bit changes, the same on every mesh.

    The array files are compressed without one: a flipped bit may read as another number.
    """
    return int(_checksum(jax.tree.leaves(tree)))
