"""The text of a compiled program as instructions: what runs, in which order, how often.

XLA prints a computation's instructions in the order of its schedule.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[subf]\w*?\d+(?:e\dm\d\w*)?|c64|c128)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-<>]+)"
)
_CONSTANT = re.compile(r"^-?\d+$")

# Memory spaces as a layout names them.
HBM, HOST = 0, 5


class Array(NamedTuple):
    """One array of an instruction's result. space: HBM, HOST, or a memory inside the chip."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    space: int


def arrays(text: str) -> list[Array]:
    """The arrays that a printed type names, tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        shape = tuple(int(n) for n in dims.split(",") if n)
        space = _SPACE.search(layout)
        size = math.prod(shape) * bits // 8
        found.append(Array(dtype, shape, size, int(space[1]) if space else HBM))
    return found


@dataclass(frozen=True, slots=True)
class Instruction:
    """type: the printed type of the result. attributes: what follows the operands. constant: what
    stands in place of operands there."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    constant: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        return arrays(self.type)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self) -> list[str]:
        """The computations that it runs."""
        head = self.attributes.split(", metadata=")[0]
        return [
            name.strip().lstrip("%")
            for names in _CALLED.findall(head)
            for name in names.strip("{}").split(",")
        ]

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-<>]+)", self.attributes)
        return None if found is None else found[1]


@dataclass
class Module:
    """computations: name -> instructions in the order of the schedule. entry: where it begins."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs that counts up from 0 to a constant."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if known is not None:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", [])
        constants = {i.name: int(i.constant) for i in condition if _CONSTANT.match(i.constant)}
        # The limit is what the root compares with; inside a fusion it is one of its operands.
        roots = [i for i in condition if i.root]
        compared = [constants[o] for i in roots for o in i.operands if o in constants]
        return max(compared or list(constants.values()) or [1])


def parse(text: str) -> Module:
    """A module as printed by `compiled.as_text()`."""
    module, current = Module(), None
    for line in text.split("\n"):
        head = _HEAD.match(line)
        if head is not None:
            current = module.computations.setdefault(head[2], [])
            module.entry = head[2] if head[1] else module.entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)) is not None:
            instruction = _instruction(found[2], found[3], bool(found[1]))
            if instruction is not None:
                current.append(instruction)
    return module


def _instruction(name: str, body: str, root: bool) -> Instruction | None:
    start = 0
    if body.startswith("("):  # a tuple's type may hold what looks like an opcode
        start = _closing(body, 0) + 1
    opcode = _OPCODE.search(body, start)
    if opcode is None:
        return None
    end = _closing(body, opcode.end() - 1)
    inside = body[opcode.end() : end]
    return Instruction(
        name,
        body[: opcode.start()],
        opcode[1],
        tuple(re.findall(r"%([\w.\-<>]+)", inside)),
        body[end + 1 :],
        inside if opcode[1] == "constant" else "",
        root,
    )


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return len(text) - 1
