"""What a compiled program moves between chips, read off its HLO.

Bytes are those that one chip receives, in loops as often as they run: XLA's own cost analysis takes
the body of a loop once.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("collective-permute", "all-gather", "all-to-all", "all-reduce", "reduce-scatter")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[subf]\w*?\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^}\s]*)"
)
_CONSTANT = re.compile(r" s32\[\][^ ]* constant\((\d+)\)")
# {{0,1,2},{3,4,5}} or [2,3]<=[6] or mesh['data'=2,'sequence'=3] {'sequence'}
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
# A collective that runs beside other work may stand in several computations, one that starts it and
# others that it goes on and ends in.
_STARTS = "AsyncCollectiveStart"
# A reduce-scatter stands in the text as a computation of this name with an all-reduce inside.
_SCATTERED = "all-reduce-scatter"
_WORK = ("fusion", "custom-call", "while", "convolution", "dot", "conditional")


@dataclass(frozen=True)
class Collective:
    """kind: one of KINDS. bytes: received by one chip each time. times: how often it runs.

    overlapped: other work stands between its start and its end.
    """

    kind: str
    bytes: int
    times: int
    overlapped: bool


def collectives(hlo: str) -> list[Collective]:
    """Every collective of an optimised module that runs."""
    computations = _computations(hlo)
    entry = next(name for name, lines in computations.items() if lines and lines[0] == "ENTRY")
    starts: dict[str, str] = {}
    for name, lines in computations.items():
        if any(_STARTS in line for line in lines):
            starts |= {channel: name for line in lines for channel in _CHANNEL.findall(line)}
    return list(_walk(computations, starts, entry, 1))


def bytes_by_kind(hlo: str) -> dict[str, int]:
    """Bytes that one chip receives, over the whole run of the program."""
    totals: dict[str, int] = {}
    for found in collectives(hlo):
        totals[found.kind] = totals.get(found.kind, 0) + found.bytes * found.times
    return totals


def _computations(hlo: str) -> dict[str, list[str]]:
    """name -> lines; those of the entry begin with the line "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in hlo.split("\n"):
        begins = _COMPUTATION.match(line)
        if begins is not None:
            lines = found.setdefault(begins[1], ["ENTRY"] if line.startswith("ENTRY") else [])
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def _walk(
    computations: dict[str, list[str]], starts: dict[str, str], name: str, times: int
) -> Iterator[Collective]:
    """starts: channel -> the computation that starts its collective, of those in several."""
    lines = computations.get(name, [])
    for index, line in enumerate(lines):
        match = _INSTRUCTION.match(line)
        opcode = None if match is None else _OPCODE.search(match[2])
        if match is None or opcode is None:
            continue
        result, kind = match[2][: opcode.start()], opcode[1].removesuffix("-start")
        if kind in KINDS:
            channel = _CHANNEL.search(line)
            begun = None if channel is None else starts.get(channel[1])
            if begun not in (None, name):
                continue
            if kind == "all-reduce" and name.startswith(_SCATTERED):
                kind = "reduce-scatter"
            started = opcode[1].endswith("-start")
            size = _received(kind, result, line, started)
            overlapped = begun is not None or (
                started and _overlapped(lines[index + 1 :], match[1])
            )
            yield Collective(kind, size, times, overlapped)
            continue
        repeats = times
        if kind == "while":
            repeats *= _trips(computations, line)
        for called in _CALLED.findall(line.split(", metadata=")[0]):
            for inner in called.split(","):
                yield from _walk(computations, starts, inner.strip().lstrip("%"), repeats)


def _trips(computations: dict[str, list[str]], line: str) -> int:
    """Of a loop that counts from 0: its condition compares with a constant."""
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition is not None, line
    constants = [int(n) for x in computations[condition[1]] for n in _CONSTANT.findall(x)]
    return max(constants, default=1)


def _received(kind: str, result: str, line: str, started: bool) -> int:
    arrays = [_size(*found) for found in _ARRAY.findall(result)]
    if started and result.startswith("("):
        # (operands, results, contexts): the results follow, one for each operand.
        counted = [size for size in arrays if size > 8]
        arrays = counted[len(counted) // 2 :]
    total, group = sum(arrays), _group(line)
    match kind:
        case "collective-permute":
            return total
        case "reduce-scatter" if "reduce-scatter(" in line:  # the result is one part of the sum
            return total * (group - 1)
        case "all-reduce":
            return 2 * total * (group - 1) // group
    return total * (group - 1) // group


def _size(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group(line: str) -> int:
    groups = _GROUPS.search(line)
    if groups is None:
        return 1
    if groups[1] is not None:
        return len(groups[1].split(","))
    if groups[2] is not None:
        return int(groups[2])
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[3]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[4]))


def _overlapped(following: list[str], name: str) -> bool:
    """Whether work stands before the instruction that waits for `name`."""
    for line in following:
        match = _INSTRUCTION.match(line)
        opcode = None if match is None else _OPCODE.search(match[2])
        if match is None or opcode is None:
            continue
        if f"%{name})" in line or f"%{name}," in line:
            return False
        if opcode[1] in _WORK:
            return True
    return False
