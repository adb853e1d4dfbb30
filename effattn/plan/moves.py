"""Collectives of a training step, counted: those that the program spells out, and XLA's.

Attention and scans over a sequence axis name their collectives, so the traced program has them with
their shapes (`spelled_out`); their bytes are the formulas of `effattn.parallel`. Those that XLA
adds for parameters and for tensor parallelism follow from where the parameters lie (`implied`).
Bytes are those that one device receives.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.parallel.mesh import TENSOR_AXIS
from effattn.plan.traced import bodies

_KINDS = {
    "ppermute": "collective-permute",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}


class Move(NamedTuple):
    """times: how often in a step. bytes: each time. hides: the device can compute what does not
    need it meanwhile."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: float
    hides: bool


def spelled_out(jaxpr: Any, mesh: dict[str, int], times: int = 1) -> Iterator[Move]:
    """Those of a traced program, those in loops as often as they run."""
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        kind = _KINDS.get(name)
        if kind is not None:
            axes = _axes(params)
            members = math.prod(mesh.get(axis, 1) for axis in axes)
            if members > 1:
                yield Move(kind, axes, times, _received(kind, equation, members), _hides(kind))
            continue
        if name in ("scan", "while", "cond"):
            for body, count in bodies(name, params):
                yield from spelled_out(body, mesh, times * count)
            continue
        for inner in _inner(name, params):
            yield from spelled_out(inner, mesh, times)


def _hides(kind: str) -> bool:
    # A ring computes on the keys it has while the next ones come; others wait for what they ask.
    return kind == "collective-permute"


def _axes(params: dict[str, Any]) -> tuple[str, ...]:
    found = params.get("axis_name", params.get("axes", ()))
    return tuple(a for a in (found if isinstance(found, tuple) else (found,)) if isinstance(a, str))


def _inner(name: str, params: dict[str, Any]) -> Iterator[Any]:
    if name == "pallas_call":
        return
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if inner is not None:
            yield getattr(inner, "jaxpr", inner)


def _received(kind: str, equation: Any, members: int) -> float:
    def size(variables: Any) -> float:
        avals = [v.aval for v in variables]
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in avals if hasattr(a, "dtype"))

    match kind:
        case "collective-permute":
            return size(equation.outvars)
        case "all-gather":
            return size(equation.outvars) * (members - 1) / members
        case "all-reduce":
            return 2 * size(equation.outvars) * (members - 1) / members
    return size(equation.invars) * (members - 1) / members


def implied(
    params: Any,
    axes: Any,
    mesh: dict[str, int],
    *,
    compute_dtype: Any,
    microbatches: int,
) -> Iterator[Move]:
    """What parameters cost: gathered for the forward and the backward pass of every microbatch, and
    their gradients summed over all devices that see other tokens.

    params: ShapeDtypeStructs with shardings. Matrices travel in the compute dtype, gradients in the
    parameter's own. Of a stack of layers one is gathered at a time.
    """
    items = jnp.dtype(compute_dtype).itemsize
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    leaves = zip(jax.tree.leaves(params), jax.tree.leaves(axes, is_leaf=is_names), strict=True)
    for leaf, names in leaves:
        used = [axis for part in leaf.sharding.spec for axis in _listed(part)]
        split = tuple(axis for axis in used if axis != TENSOR_AXIS and mesh[axis] > 1)
        layers = leaf.shape[0] if names[:1] == ("layers",) else 1
        matrix = leaf.ndim - (layers > 1) >= 2
        own = math.prod(leaf.sharding.shard_shape(leaf.shape)) / layers
        ways = math.prod(mesh[axis] for axis in split)
        if ways > 1:
            gathered = own * (ways - 1) * (items if matrix else leaf.dtype.itemsize)
            yield Move("all-gather", split, 2 * layers * microbatches, gathered, True)
            scattered = own * (ways - 1) * leaf.dtype.itemsize
            yield Move("reduce-scatter", split, layers * microbatches, scattered, True)
        others = tuple(a for a, n in mesh.items() if n > 1 and a not in (*split, TENSOR_AXIS))
        members = math.prod(mesh[axis] for axis in others)
        if members > 1:
            summed = 2 * own * leaf.dtype.itemsize * (members - 1) / members
            yield Move("all-reduce", others, layers * microbatches, summed, True)


def _listed(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)


def tensor_parallel(
    halves: int, tokens: int, width: int, ways: int, *, compute_dtype: Any, passes: int
) -> Iterator[Move]:
    """Sums of what the devices of a tensor axis make of a mixer or an MLP (Megatron).

    halves: mixers and MLPs. tokens: of a device and step. passes: 2 of forward and backward, 3 with
    recomputation. Source: Shoeybi et al. 2019 (arXiv 1909.08053), figure 4.
    """
    if ways > 1:
        size = tokens * width * jnp.dtype(compute_dtype).itemsize
        yield Move(
            "all-reduce", (TENSOR_AXIS,), halves * passes, 2 * size * (ways - 1) / ways, False
        )
