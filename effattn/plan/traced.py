"""What a traced program keeps alive, computes and moves, estimated without compiling it.

A jaxpr says which arrays there are, and not which of them a compiler makes. Here an operation that
fuses (elementwise, shapes, casts) makes none as long as what it is computed from is no larger;
products, reductions, gathers, loops and kernels write their results. The result is as good as that
rule: compare `tests/test_plan_analytic.py`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Operations whose results are arrays in memory. Everything else fuses into what reads it.
_WRITES = {
    "dot_general", "conv_general_dilated", "pallas_call", "ffi_call", "gather", "scatter",
    "scatter-add", "sort", "cumsum", "cumlogsumexp", "cummax", "top_k", "dynamic_update_slice",
    "concatenate", "reduce_sum", "reduce_max", "argmax", "fft", "approx_top_k", "device_put",
}  # fmt: skip
_LOOPS = {"scan", "while", "cond"}
# Operations that read or write a part of an array: which operand has the size of that part.
_UPDATES = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}

Size = Callable[[tuple[int, ...], Any], float]
Ways = Callable[[tuple[int, ...]], float]


@dataclass(frozen=True)
class Estimate:
    """Of one run of a program. peak: bytes alive at the worst moment, arguments and final results
    aside; alive: shape and bytes of the arrays then, outside loops, and `inside` what a loop has
    beside them. host: bytes in the host's memory. flops: of matrix products, Pallas calls not
    counted. traffic: bytes that operations read and write. kernels: how often a Pallas call runs.
    """

    peak: float
    alive: tuple[tuple[tuple[int, ...], float], ...]
    inside: float
    host: float
    flops: float
    traffic: float
    kernels: dict[str, int]


class _Equation(NamedTuple):
    """primitive, parameters, and the numbers of the values that go in (None: a literal) and out."""

    name: str
    params: dict[str, Any]
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]


def estimate(program: core.ClosedJaxpr, size: Size, ways: Ways) -> Estimate:
    """size: (shape, dtype) -> bytes on one chip. ways: shape -> how many chips share its work."""
    flat = _Flat(program.jaxpr)
    return _estimate(flat, size, ways, final=set(flat.results))


class _Flat:
    """A jaxpr with every call in it written out, loops and kernels left whole."""

    def __init__(self, jaxpr: Any):
        self.avals: list[Any] = []
        self.equations: list[_Equation] = []
        names = {var: self._new(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
        self.arguments = set(names.values())
        self.inputs = [names[var] for var in jaxpr.invars]
        self._inline(jaxpr, names)
        self.results = [n for n in (self._read(v, names) for v in jaxpr.outvars) if n is not None]

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    @staticmethod
    def _read(atom: Any, names: dict[Any, int]) -> int | None:
        return None if isinstance(atom, core.Literal) else names[atom]

    def _inline(self, jaxpr: Any, names: dict[Any, int]) -> None:
        for equation in jaxpr.eqns:
            primitive = equation.primitive.name
            inner = _called(primitive, equation.params)
            if inner is None:
                inputs = tuple(self._read(v, names) for v in equation.invars)
                outputs = tuple(self._new(v.aval) for v in equation.outvars)
                names.update(zip(equation.outvars, outputs, strict=True))
                self.equations.append(_Equation(primitive, equation.params, inputs, outputs))
                continue
            inside: dict[Any, int] = {var: self._new(var.aval) for var in inner.constvars}
            # Leading operands of some calls are not arguments of the function they call.
            given = equation.invars[len(equation.invars) - len(inner.invars) :]
            for var, atom in zip(inner.invars, given, strict=True):
                number = self._read(atom, names)
                inside[var] = self._new(var.aval) if number is None else number
            self._inline(inner, inside)
            for var, result in zip(equation.outvars, inner.outvars, strict=True):
                number = self._read(result, inside)
                names[var] = self._new(var.aval) if number is None else number


def _called(primitive: str, params: dict[str, Any]) -> Any:
    """The jaxpr of a call that is as good as written out; None of anything else."""
    if primitive in _LOOPS or primitive == "pallas_call":
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        inner = params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def bodies(name: str, params: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """(jaxpr, how often it runs) of what is inside a loop or a choice.

    A loop whose end hangs on data counts once; of a choice only the longest branch counts.
    """
    if name == "scan":
        yield params["jaxpr"].jaxpr, params["length"]
    elif name == "while":
        yield params["body_jaxpr"].jaxpr, 1
    elif name == "cond":
        yield max((b.jaxpr for b in params["branches"]), key=lambda b: len(b.eqns)), 1


def _estimate(flat: _Flat, size: Size, ways: Ways, final: set[int]) -> Estimate:
    sizes = [_bytes(aval, size) for aval in flat.avals]
    roots: dict[int, frozenset[int]] = {n: frozenset() for n in flat.arguments}
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    inside = [0.0] * len(flat.equations)
    host_inside = [0.0] * len(flat.equations)
    flops = traffic = 0.0
    kernels: dict[str, int] = {}
    last_read = _last_reads(flat)
    for index, (name, params, inputs, outputs) in enumerate(flat.equations):
        read = [n for n in inputs if n is not None]
        for root in {r for n in read for r in roots.get(n, ())}:
            last[root] = index
        if name in _LOOPS:
            for body, times in bodies(name, params):
                inner = _Flat(body)
                found = _estimate(inner, size, ways, final=set())
                flops, traffic = flops + times * found.flops, traffic + times * found.traffic
                for kernel, count in found.kernels.items():
                    kernels[kernel] = kernels.get(kernel, 0) + times * count
                # What comes out of a body has its place outside.
                own, away = (
                    sum(
                        _bytes(inner.avals[n], size)
                        for n in inner.results
                        if _on_host(inner.avals[n]) == host
                    )
                    for host in (False, True)
                )
                inside[index] = max(inside[index], found.peak - own, 0.0)
                host_inside[index] = max(host_inside[index], found.host - away, 0.0)
            taken = _in_place(flat, index, last_read, roots)
            for number in outputs:
                if number in taken:
                    roots[number] = taken[number]
                    continue
                roots[number], born[number] = frozenset({number}), index
            continue
        if name == "pallas_call":
            kernel = str(params.get("name") or "kernel")
            kernels[kernel] = kernels.get(kernel, 0) + 1
        if name in _WRITES:
            traffic += _traffic(flat.equations[index], sizes)
            flops += _product(flat, index, ways)
        if name in _UPDATES and last_read.get(inputs[0] if inputs[0] is not None else -1) == index:
            roots[outputs[0]] = roots[read[0]]  # in place
            continue
        for number in outputs:
            made_of = frozenset(r for n in read for r in roots.get(n, ()))
            held = sum(sizes[r] for r in made_of)
            if name in _WRITES or sizes[number] < held:
                roots[number], born[number] = frozenset({number}), index
            else:
                roots[number] = made_of
    for number in flat.results:
        for root in roots.get(number, ()):
            last[root] = len(flat.equations)
    peak, alive, beside = _sweep(flat, sizes, born, last, final, inside, host=False)
    host, _, _ = _sweep(flat, sizes, born, last, final, host_inside, host=True)
    return Estimate(peak, alive, beside, host, flops, traffic, kernels)


def _traffic(equation: _Equation, sizes: list[float]) -> float:
    outputs = sum(sizes[n] for n in equation.outputs)
    if equation.name in ("gather", "dynamic_slice"):
        return 2 * outputs
    if equation.name in _UPDATES:
        written = equation.inputs[_UPDATES[equation.name]]
        return 0.0 if written is None else 2 * sizes[written]
    return outputs + sum(sizes[n] for n in equation.inputs if n is not None)


def _last_reads(flat: _Flat) -> dict[int, int]:
    found: dict[int, int] = {}
    for index, equation in enumerate(flat.equations):
        found.update((n, index) for n in equation.inputs if n is not None)
    found.update((n, len(flat.equations)) for n in flat.results)
    return found


def _in_place(
    flat: _Flat, index: int, last_read: dict[int, int], roots: dict[int, frozenset[int]]
) -> dict[int, frozenset[int]]:
    """What a scan carries stays where it was, if nobody else reads it afterwards."""
    name, params, inputs, outputs = flat.equations[index]
    if name != "scan":
        return {}
    body = params["jaxpr"].jaxpr
    # What is stacked over the steps has an axis more outside than inside; constants come first.
    scanned = sum(
        n is not None and len(flat.avals[n].shape) > len(var.aval.shape)
        for n, var in zip(inputs, body.invars, strict=True)
    )
    carried = sum(
        len(flat.avals[n].shape) == len(var.aval.shape)
        for n, var in zip(outputs, body.outvars, strict=True)
    )
    first, taken = len(inputs) - scanned - carried, {}
    for place in range(carried):
        number = inputs[first + place]
        if number is not None and last_read[number] == index and len(roots.get(number, ())) == 1:
            taken[outputs[place]] = roots[number]
    return taken


def _sweep(
    flat: _Flat,
    sizes: list[float],
    born: dict[int, int],
    last: dict[int, int],
    final: set[int],
    inside: list[float],
    *,
    host: bool,
) -> tuple[float, tuple[tuple[tuple[int, ...], float], ...], float]:
    """The most that is alive at once in one of the two memories, what that is, and what is inside a
    loop then."""
    spans = [
        (index, last.get(number, index), number)
        for number, index in born.items()
        if _on_host(flat.avals[number]) == host and number not in final
    ]
    change = [0.0] * (len(flat.equations) + 2)
    for first, end, number in spans:
        change[first] += sizes[number]
        change[end + 1] -= sizes[number]
    alive, peak, worst = 0.0, 0.0, 0
    for index, beside in enumerate([*inside, 0.0]):
        alive += change[index]
        if alive + beside > peak:
            peak, worst = alive + beside, index
    then = [number for first, end, number in spans if first <= worst <= end]
    shapes = tuple((tuple(flat.avals[n].shape), sizes[n]) for n in then)
    return peak, shapes, [*inside, 0.0][worst]


def _on_host(aval: Any) -> bool:
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def _bytes(aval: Any, size: Size) -> float:
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    if shape is None or dtype is None or not hasattr(dtype, "itemsize"):
        return 0.0
    return size(tuple(shape), dtype)


def _product(flat: _Flat, index: int, ways: Ways) -> float:
    name, params, inputs, outputs = flat.equations[index]
    if name != "dot_general" or inputs[0] is None:
        return 0.0
    (contracted, _), _ = params["dimension_numbers"]
    left, out = flat.avals[inputs[0]], flat.avals[outputs[0]]
    flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
    arrays = [flat.avals[n] for n in (*inputs, *outputs) if n is not None]
    return flops / max(ways(tuple(aval.shape)) for aval in arrays)
