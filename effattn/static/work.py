"""What a compiled program computes and moves to and from memory on one chip, loops counted.

Matrix products and convolutions count, 2 per multiplication that touches no padding; what a Pallas
call computes is not in the text. Traffic: operands and results in the chip's memory of everything
that the schedule runs; a slice counts as its part, an update in place as what it writes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from effattn.static.module import HBM, Instruction, Module, arrays

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# They move nothing, or what they run is counted by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "domain",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Of one chip, over the whole program. pallas_calls: as often as they run."""

    flops: float
    hbm_bytes: float
    pallas_calls: int


def work_of(module: Module) -> Work:
    totals = _Totals(module)
    entry = module.entry
    return Work(
        totals.flops(entry),
        totals.traffic(entry),
        totals.calls(entry),
    )


class _Totals:
    """Sums over a computation, each found once."""

    def __init__(self, module: Module):
        self.module = module
        self.types = {
            name: {i.name: i.type for i in instructions}
            for name, instructions in module.computations.items()
        }
        self._known: dict[tuple[str, str], float] = {}

    def _sum(self, what: str, name: str, one: Callable[[Instruction, str], float]) -> float:
        key = what, name
        if key not in self._known:
            self._known[key] = sum(one(i, name) for i in self.module.computations.get(name, []))
        return self._known[key]

    def _inside(self, instruction: Instruction, of: Callable[[str], float]) -> float:
        """What the computations that an instruction runs come to."""
        if instruction.opcode == "while":
            body = instruction.attribute("body") or ""
            return of(body) * self.module.trips(instruction)
        totals = [of(name) for name in instruction.called()]
        return max(totals, default=0) if instruction.opcode == "conditional" else sum(totals)

    def flops(self, name: str) -> float:
        return self._sum("flops", name, self._flops_of)

    def _flops_of(self, instruction: Instruction, name: str) -> float:
        if instruction.opcode == "dot":
            return _dot_flops(instruction, self.types[name])
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, self.types[name])
        if instruction.opcode in ("while", "call", "conditional", "fusion"):
            return self._inside(instruction, self.flops)
        return 0.0

    def calls(self, name: str) -> int:
        return int(self._sum("calls", name, self._calls_of))

    def _calls_of(self, instruction: Instruction, name: str) -> float:
        if instruction.opcode == "custom-call":
            return float('"tpu_custom_call"' in instruction.attributes)
        if instruction.opcode in ("while", "call", "conditional"):
            return self._inside(instruction, self.calls)
        return 0.0

    def traffic(self, name: str) -> float:
        return self._sum("traffic", name, self._traffic_of)

    def _traffic_of(self, instruction: Instruction, name: str) -> float:
        if instruction.opcode in ("while", "call", "conditional"):
            return self._inside(instruction, self.traffic)
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        types = self.types[name]
        if instruction.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * _in_hbm(instruction.type)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            written = types.get(instruction.operands[-1], "")
            if instruction.opcode == "dynamic-update-slice" and len(instruction.operands) > 1:
                written = types.get(instruction.operands[1], "")
            return 2 * _in_hbm(written)
        if instruction.opcode == "fusion":
            return self._fusion_traffic(instruction)
        read = sum(_in_hbm(types.get(operand, "")) for operand in instruction.operands)
        return read + _in_hbm(instruction.type)

    def _fusion_traffic(self, fusion: Instruction) -> float:
        called = fusion.called()
        inside = self.module.computations.get(called[0], []) if called else []
        readers: dict[str, list[Instruction]] = {}
        for instruction in inside:
            for operand in instruction.operands:
                readers.setdefault(operand, []).append(instruction)
        updates = [i for i in inside if i.opcode == "dynamic-update-slice"]
        total = 0.0
        for parameter in (i for i in inside if i.opcode == "parameter"):
            size, users = _in_hbm(parameter.type), readers.get(parameter.name, [])
            if users and all(u.opcode in ("dynamic-slice", "gather") for u in users):
                size = min(size, sum(u.bytes for u in users))
            elif users and all(u in updates and u.operands[0] == parameter.name for u in users):
                size = 0.0  # it is written into, in place
            total += size
        written = _in_hbm(fusion.type)
        types = self.types[called[0]] if called else {}
        if updates and any(u.bytes == fusion.bytes for u in updates):
            written = sum(_in_hbm(types.get(u.operands[1], "")) for u in updates)
        return total + written


def _in_hbm(text: str) -> float:
    return float(sum(array.bytes for array in arrays(text) if array.space == HBM))


def _dot_flops(dot: Instruction, types: dict[str, str]) -> float:
    left, contracted = arrays(types.get(dot.operands[0], "")), _CONTRACTED.search(dot.attributes)
    if not left or contracted is None:
        return 0.0
    depth = math.prod(left[0].shape[int(n)] for n in contracted[1].split(",") if n)
    return 2.0 * math.prod(dot.arrays[0].shape) * depth


def _convolution_flops(convolution: Instruction, types: dict[str, str]) -> float:
    """XLA writes matrix products for TPUs as convolutions too."""
    labels = _LABELS.search(convolution.attributes)
    sides = [arrays(types.get(operand, "")) for operand in convolution.operands[:2]]
    if labels is None or not all(sides):
        return 0.0
    image, kernel = (side[0].shape for side in sides)
    out = convolution.arrays[0].shape
    of_image, of_kernel, of_out = labels.groups()
    flops = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * kernel[of_kernel.index("i")]
    window = _WINDOW.search(convolution.attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window is not None else {}
    for axis in sorted(c for c in of_image if c.isdigit()):
        places = (
            image[of_image.index(axis)],
            kernel[of_kernel.index(axis)],
            out[of_out.index(axis)],
        )
        flops *= _products(*places, int(axis), fields)
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    return flops / (int(groups[1]) if groups is not None else 1)


def _products(image: int, kernel: int, out: int, axis: int, fields: dict[str, str]) -> int:
    """Pairs of an output place and a kernel place that meet a true element, along one axis."""

    def number(name: str, default: int) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else default

    stride, dilation = number("stride", 1), number("rhs_dilate", 1)
    spread = number("lhs_dilate", 1)
    before = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    span, count = (image - 1) * spread + 1, 0
    for place in range(kernel):
        offset = place * dilation - before
        if spread == 1:
            first = max(0, -(offset // stride))
            last = min(out - 1, (span - 1 - offset) // stride)
            count += max(0, last - first + 1)
        else:
            at = (i * stride + offset for i in range(out))
            count += sum(0 <= x < span and x % spread == 0 for x in at)
    return count
