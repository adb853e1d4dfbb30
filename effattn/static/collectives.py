"""What a compiled program moves between chips, read off its HLO.

Bytes are those that one chip receives, in loops as often as they run: XLA's own cost analysis takes
the body of a loop once.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from effattn.static.module import Instruction, Module, parse

KINDS = ("collective-permute", "all-gather", "all-to-all", "all-reduce", "reduce-scatter")
_KINDS = {*KINDS, "ragged-all-to-all"}
# {{0,1,2},{3,4,5}} or [2,3]<=[3,2]T(1,0) or mesh['data'=2,'sequence'=3] {'sequence'}
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
# A reduce-scatter stands in the text as a computation of this name with an all-reduce inside.
_SCATTERED = "all-reduce-scatter"
_WORK = ("fusion", "custom-call", "while", "convolution", "dot", "conditional", "call")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# A collective that runs beside other work may stand in several computations, one that starts it and
# others that it goes on and ends in.
_STARTS = "AsyncCollectiveStart"
# Between slices XLA hands the payload to the host: a send, and what it stands for.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')


@dataclass(frozen=True)
class Collective:
    """kind: one of KINDS. bytes: received by one chip each time. times: how often it runs.

    overlapped: other work stands between its start and its end. axes: the mesh axes over which it
    goes, where a mesh was given. cycles_between: XLA's estimate of that work, Pallas calls left
    out. calls_between: Pallas calls there. across_slices: it leaves the slice.
    """

    kind: str
    bytes: int
    times: int
    overlapped: bool
    axes: tuple[str, ...] = ()
    cycles_between: int = 0
    calls_between: int = 0
    across_slices: bool = False


def collectives(hlo: str | Module, mesh: jax.sharding.Mesh | None = None) -> list[Collective]:
    """Every collective of an optimised module that runs.

    mesh: that the program was compiled for; then each tells over which of its axes it goes.
    """
    module = parse(hlo) if isinstance(hlo, str) else hlo
    return list(_Walk(module, mesh).of(module.entry, 1))


def bytes_by_kind(hlo: str | Module) -> dict[str, int]:
    """Bytes that one chip receives, over the whole run of the program."""
    totals: dict[str, int] = {}
    for found in collectives(hlo):
        totals[found.kind] = totals.get(found.kind, 0) + found.bytes * found.times
    return totals


class _Walk:
    def __init__(self, module: Module, mesh: jax.sharding.Mesh | None):
        self.module, self.mesh = module, mesh
        self.slices: list[int] = []
        if mesh is not None:
            self.slices = [getattr(d, "slice_index", None) or 0 for d in mesh.devices.flat]
        # channel -> the computation that starts its collective, of those in several
        self.starts: dict[str, str] = {}
        for name, instructions in module.computations.items():
            if any(_STARTS in i.attributes for i in instructions):
                self.starts |= {
                    channel: name
                    for i in instructions
                    for channel in _CHANNEL.findall(i.attributes)
                }

    def _begun(self, collective: Instruction) -> str | None:
        """The computation that starts it, where it stands in several."""
        channel = _CHANNEL.search(collective.attributes)
        return None if channel is None else self.starts.get(channel[1])

    def of(self, name: str, times: int) -> Iterator[Collective]:
        instructions = self.module.computations.get(name, [])
        for index, instruction in enumerate(instructions):
            following = instructions[index + 1 :]
            kind = instruction.opcode.removesuffix("-start")
            if kind in _KINDS:
                if self._begun(instruction) not in (None, name):
                    continue  # it counts where it starts
                yield self._one(instruction, name, instruction, times, following)
            elif instruction.opcode == "send" and "_xla_megascale" in instruction.attributes:
                yield self._megascale(instruction, times, following)
            elif instruction.opcode.endswith("-done"):
                continue
            else:
                started = instruction.opcode.endswith("-start") or instruction.name.startswith(
                    "async-collective-start"
                )
                repeats = times
                if instruction.opcode == "while":
                    repeats *= self.module.trips(instruction)
                for called in instruction.called():
                    if started:
                        for inner in self.module.computations.get(called, []):
                            if inner.opcode.removesuffix("-start") in _KINDS and self._begun(
                                inner
                            ) in (None, called):
                                yield self._one(inner, called, instruction, times, following)
                    else:
                        yield from self.of(called, repeats)

    def _one(
        self,
        collective: Instruction,
        computation: str,
        start: Instruction,
        times: int,
        following: list[Instruction],
    ) -> Collective:
        """start: the instruction that stands in the schedule, which may only call `collective`."""
        kind = collective.opcode.removesuffix("-start").removeprefix("ragged-")
        if kind == "all-reduce" and computation.startswith(_SCATTERED):
            kind = "reduce-scatter"
        groups = self._groups(collective)
        size = _received(kind, collective, groups)
        between = _between(start, following)
        return Collective(
            kind,
            size,
            times,
            overlapped=self._begun(collective) is not None
            or any(i.opcode in _WORK for i in between),
            axes=self._axes(groups),
            cycles_between=sum(self._cycles(i) for i in between),
            calls_between=sum(self._calls(i) for i in between),
            across_slices=self._across(groups),
        )

    def _megascale(self, send: Instruction, times: int, following: list[Instruction]) -> Collective:
        kind = _MEGASCALE.search(send.attributes)
        name = kind[1].lower().replace("_", "-") if kind is not None else "all-reduce"
        between = _until(following, lambda i: i.opcode == "recv-done") or []
        return Collective(
            name if name in KINDS else "all-reduce",
            send.arrays[0].bytes,
            times,
            overlapped=any(i.opcode in _WORK for i in between),
            axes=("data",) if self.mesh is not None and "data" in self.mesh.shape else (),
            cycles_between=sum(self._cycles(i) for i in between),
            calls_between=sum(self._calls(i) for i in between),
            across_slices=True,
        )

    def _groups(self, instruction: Instruction) -> np.ndarray | None:
        """[groups, members], the partitions that meet; of a permute [pairs, 2]."""
        text = instruction.attributes
        if (found := _PAIRS.search(text)) or (found := _LISTED.search(text)):
            lists = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
            longest = max(map(len, lists))
            return np.asarray([members for members in lists if len(members) == longest])
        if found := _IOTA.search(text):
            count, size = int(found[1]), int(found[2])
            dims = [int(n) for n in found[3].split(",")]
            ids = np.arange(math.prod(dims)).reshape(dims)
            if found[4] is not None:
                ids = ids.transpose([int(n) for n in found[4].split(",")])
            return ids.reshape(count, size)
        if found := _NAMED.search(text):
            axes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
            taken = re.findall(r"'([^']+)'", found[2])
            ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
            order = [i for i, name in enumerate(axes) if name not in taken]
            order += [i for i, name in enumerate(axes) if name in taken]
            size = math.prod(axes[name] for name in taken)
            return ids.transpose(order).reshape(-1, size)
        return None

    def _axes(self, groups: np.ndarray | None) -> tuple[str, ...]:
        if groups is None or self.mesh is None or groups.max() >= self.mesh.size:
            return ()
        shape = tuple(self.mesh.shape.values())
        places = np.stack(np.unravel_index(groups, shape), axis=-1)  # [groups, members, axes]
        varies = (places != places[:, :1]).any(axis=(0, 1))
        return tuple(name for name, v in zip(self.mesh.axis_names, varies, strict=True) if v)

    def _across(self, groups: np.ndarray | None) -> bool:
        if groups is None or len(set(self.slices)) < 2:
            return False
        of = np.asarray(self.slices)[groups]
        return bool((of != of[:, :1]).any())

    def _cycles(self, instruction: Instruction) -> int:
        if instruction.opcode == "while":
            body = instruction.attribute("body") or ""
            inner = sum(self._cycles(i) for i in self.module.computations.get(body, []))
            return inner * self.module.trips(instruction)
        found = _CYCLES.search(instruction.attributes)
        return int(found[1]) if found is not None else 0

    def _calls(self, instruction: Instruction) -> int:
        if instruction.opcode == "custom-call":
            return int('"tpu_custom_call"' in instruction.attributes)
        if instruction.opcode in ("while", "call", "conditional"):
            inner = (i for c in instruction.called() for i in self.module.computations.get(c, []))
            return sum(map(self._calls, inner))
        return 0


def _between(start: Instruction, following: list[Instruction]) -> list[Instruction]:
    """What the schedule has between a start and its end; nothing where it is not asynchronous."""
    if start.opcode.endswith("-start"):
        return _until(following, lambda i: start.name in i.operands) or []
    if start.name.startswith("async-collective-start"):
        done = start.name.replace("-start", "-done")
        exact = _until(following, lambda i: i.name == done)
        if exact is not None:
            return exact
        return _until(following, lambda i: i.name.startswith("async-collective-done")) or []
    return []


def _until(
    instructions: list[Instruction], last: Callable[[Instruction], bool]
) -> list[Instruction] | None:
    for index, instruction in enumerate(instructions):
        if last(instruction):
            return instructions[:index]
    return None


def _received(kind: str, instruction: Instruction, groups: np.ndarray | None) -> int:
    sizes = [array.bytes for array in instruction.arrays]
    if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
        # (operands, results, contexts): the results follow, one for each operand.
        counted = [size for size in sizes if size > 8]
        sizes = counted[len(counted) // 2 :]
    total = sum(sizes)
    members = 1 if groups is None else groups.shape[1]
    match kind:
        case "collective-permute":
            return total
        case "reduce-scatter" if instruction.opcode.startswith("reduce-scatter"):
            return total * (members - 1)  # the result is one part of the sum
        case "all-reduce":
            return 2 * total * (members - 1) // members
    return total * (members - 1) // members
