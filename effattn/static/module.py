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
    stands in place of operands there; of a parameter its number."""

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
        """How often a `while` runs that counts from one constant up to another, by a constant."""
        known = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if known is not None:
            return int(known[1])
        condition = self.computations.get(loop.attribute("condition") or "", [])
        constants = _constants(condition)
        # The limit is what the root compares with; inside a fusion it is one of its operands.
        roots = [i for i in condition if i.root]
        compared = [constants[o] for i in roots for o in i.operands if o in constants]
        limit = max(compared or list(constants.values()) or [1])
        counters = [
            int(i.attribute("index") or 0)
            for i in condition
            if i.opcode == "get-tuple-element" and any(i.name in root.operands for root in roots)
        ]
        if len(counters) != 1:
            return limit
        return -(-(limit - self._start(loop, counters[0])) // self._step(loop, counters[0]))

    def _start(self, loop: Instruction, counter: int) -> int:
        """Where a loop's counter begins: past 0 where XLA runs the first turns before the loop."""
        around = next(c for c in self.computations.values() if any(i is loop for i in c))
        named = {i.name: i for i in around}
        begun = named.get(loop.operands[0])
        if begun is None or begun.opcode != "tuple" or counter >= len(begun.operands):
            return 0
        first = named.get(begun.operands[counter])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = named.get(first.operands[0])
        return _constants([first]).get(first.name, 0) if first is not None else 0

    def _step(self, loop: Instruction, counter: int) -> int:
        """What a loop's body adds to its counter. XLA unrolls the loops in which it gathers and
        multiplies at once, and then counts by 2."""
        body = self.computations.get(loop.attribute("body") or "", [])
        named, constants = {i.name: i for i in body}, _constants(body)
        result = next((i for i in body if i.root and i.opcode == "tuple"), None)
        if result is None or counter >= len(result.operands):
            return 1
        update = named.get(result.operands[counter])
        if update is not None and update.opcode == "fusion":
            inside = self.computations.get(update.called()[0], [])
            given = dict(zip(_parameters(inside), update.operands, strict=False))
            known = {name: constants[at] for name, at in given.items() if at in constants}
            constants = {**known, **_constants(inside)}
            update = next((i for i in inside if i.root), None)
        if update is None or update.opcode != "add":
            return 1
        steps = [constants[name] for name in update.operands if name in constants]
        return steps[0] if steps and steps[0] > 0 else 1


def _constants(instructions: list[Instruction]) -> dict[str, int]:
    return {
        i.name: int(i.constant)
        for i in instructions
        if i.opcode == "constant" and _CONSTANT.match(i.constant)
    }


def _parameters(instructions: list[Instruction]) -> list[str]:
    """Names in the order of their numbers."""
    found = [i for i in instructions if i.opcode == "parameter"]
    return [i.name for i in sorted(found, key=lambda i: int(i.constant))]


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
        inside if opcode[1] in ("constant", "parameter") else "",
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
