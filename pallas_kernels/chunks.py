"""A row of tokens cut into chunks of one length, for a loop over them, and put together again."""

from typing import Any

import jax
import jax.numpy as jnp


def cut(tree: Any, size: int) -> tuple[Any, Any]:
    """[b, s, ...] -> (whole chunks [n, b, size, ...], the shorter last [b, rest, ...] or None)."""
    count, rest = divmod(jax.tree.leaves(tree)[0].shape[1], size)

    def stacked(x: jax.Array) -> jax.Array:
        x = x[:, : count * size]
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)

    tail = jax.tree.map(lambda x: x[:, count * size :], tree) if rest else None
    return jax.tree.map(stacked, tree), tail


def joined(chunks: Any, tail: Any) -> Any:
    """The inverse of `cut`."""

    def row(x: jax.Array, *rest: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return jnp.concatenate([x, *rest], axis=1) if rest else x

    return jax.tree.map(row, chunks) if tail is None else jax.tree.map(row, chunks, tail)
