"""`jax.vmap` of a kernel: the mapped axis becomes more rows of the batch that it has anyway.

Left to jax, a mapped Pallas call gets one more grid axis, or a loop where its block lists are
mapped too, and refs that it copies from by hand are cut up beneath it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def vmap_as_rows(run: Callable[..., Any], call: Any, *arguments: Any) -> Any:
    """`run(call, *arguments)`, which under vmap is one call with a larger batch.

    call: has the field `batch`, and `with_rows(times)` for a larger one. arguments: arrays
    [batch, ...], and tuples of arrays [batch | 1, ...] of which a 1 stands for every row; numpy
    arrays in them stay numpy. run gives arrays [batch, ...].
    """
    leaves, tree = jax.tree.flatten(arguments)
    # An array that is an argument itself has all rows, where the leaf of a tuple may share one.
    whole = [not isinstance(x, tuple) for x in arguments for _ in jax.tree.leaves(x)]
    fixed = [x if isinstance(x, np.ndarray) else None for x in leaves]

    def join(traced: Any) -> Any:
        traced = iter(traced)
        return jax.tree.unflatten(tree, [next(traced) if x is None else x for x in fixed])

    @jax.custom_batching.custom_vmap
    def rows(*traced: Any) -> Any:
        return run(call, *join(traced))

    @rows.def_vmap
    def more_rows(size: int, mapped: Any, *traced: Any) -> Any:
        def fold(x: Any, whole: bool, mapped: bool) -> Any:
            xp: Any = np if isinstance(x, np.ndarray) else jnp
            if not mapped:
                if x.shape[0] == 1 and not whole:
                    return x
                x = xp.broadcast_to(x[None], (size, *x.shape))
            x = xp.broadcast_to(x, (size, call.batch, *x.shape[2:]))
            return x.reshape(size * call.batch, *x.shape[2:])

        flags = iter(mapped)
        is_mapped = [next(flags) if x is None else False for x in fixed]
        folded = map(fold, jax.tree.leaves(join(traced)), whole, is_mapped)
        result = vmap_as_rows(run, call.with_rows(size), *jax.tree.unflatten(tree, folded))
        split = jax.tree.map(lambda x: x.reshape(size, call.batch, *x.shape[1:]), result)
        return split, jax.tree.map(lambda _: True, result)

    return rows(*(x for x, held in zip(leaves, fixed, strict=True) if held is None))
