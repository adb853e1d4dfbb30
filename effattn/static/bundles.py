"""Reading the scheduled code that libtpu dumps: bundles, regions, slots, spills.

A TPU core issues one bundle of instructions per cycle. The pass `packed-bundles-post-ra` writes
them after register allocation and before waits are folded away, so that its number of bundles is
the number of issue cycles. Branches span regions: a backward branch a loop, a forward one code that
a predicate skips.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUNDLES = "packed-bundles-post-ra"
SLOTS = "pre-delay_hlo-static-per-bundle-utilization"
PASSES = (BUNDLES, SLOTS)
TWINS = "deduplication-map"

DELAY_SLOTS = 4  # bundles that still run after a branch

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]{2}\s*)?:\s*(?:>\s*)*\{")
_COMPARISON = re.compile(r"%(\w+) = scmp\.(\w+)\.\w+(?:\.totalorder)? %\w+, (-?\d+)")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\((!?)%(\w+)\))?\s*target bundleno = (\d+)")
_MATMUL = re.compile(r"\bvmatmul\.")
_COPY = re.compile(r"= dma\.")
_FILE = re.compile(r"\d+-(?P<kernel>.+?)-\d\d+-(?P<label>.+)\.txt$")


@dataclass
class Region:
    """Bundles [start, end) of a kernel: all of it, a loop, or what a predicate may skip.

    trips: how often a loop runs, where it counts to a constant. cycles and the other numbers are
    of one execution and of this region alone, without the regions inside it. slots: which part of
    the issue slots of each unit is used. matmuls, copies (DMA), spills, fills: instructions.
    """

    kind: str  # "kernel", "loop" or "branch"
    start: int
    end: int
    condition: str = ""
    trips: int | None = None
    inner: list["Region"] = field(default_factory=list)
    cycles: int = 0
    matmuls: int = 0
    copies: int = 0
    spills: int = 0
    fills: int = 0
    slots: dict[str, float] = field(default_factory=dict)

    @property
    def whole_cycles(self) -> int:
        """One execution, with every region inside it executed once."""
        return self.end - self.start

    def walk(self) -> Iterator["Region"]:
        """This region and all inside it, in program order."""
        yield self
        for region in self.inner:
            yield from region.walk()

    @property
    def has_matmul(self) -> bool:
        return any(region.matmuls for region in self.walk())

    @property
    def has_copy(self) -> bool:
        return any(region.copies for region in self.walk())


def dumped_kernels(folder: Path) -> dict[str, dict[str, Path]]:
    """Name of a computation -> pass -> file, for the passes that are read here.

    Of computations that are the same code libtpu dumps one; the others get its files.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.txt")):
        match = _FILE.match(path.name)
        if match is not None and match["label"] in PASSES:
            found.setdefault(match["kernel"], {})[match["label"]] = path
    complete = {name: files for name, files in found.items() if len(files) == len(PASSES)}
    for path in folder.glob(f"*-{TWINS}.txt"):
        for group in path.read_text().split("key:")[1:]:
            name, *lines = group.splitlines()
            for twin in map(str.strip, lines[2:]):
                if name in complete:
                    complete.setdefault(twin, complete[name])
    return complete


def read_kernel(files: dict[str, Path]) -> Region:
    """The tree of regions of one computation. Raises RuntimeError where the dump has a new form."""
    bundles = read_bundles(files[BUNDLES].read_text(errors="replace"))
    root = find_regions(bundles)
    names, capacities, rows = read_slots(files[SLOTS].read_text())
    if len(rows) != len(bundles):
        raise RuntimeError(
            f"{files[BUNDLES].name}: {len(bundles)} bundles were read, but {len(rows)} rows of "
            "their slots; this libtpu writes another form of dump"
        )
    matmuls = [len(_MATMUL.findall(bundle)) for bundle in bundles]
    copies = [len(_COPY.findall(bundle)) for bundle in bundles]
    for region in root.walk():
        own = _own_bundles(region)
        region.cycles = len(own)
        region.matmuls = sum(matmuls[i] for i in own)
        region.copies = sum(copies[i] for i in own)
        used = {name: sum(rows[i][column] for i in own) for column, name in enumerate(names)}
        region.spills, region.fills = used.get("VSTORE:SPILL", 0), used.get("VLOAD:FILL", 0)
        region.slots = {
            name: used[name] / (len(own) * capacity)
            for name, capacity in zip(names, capacities, strict=True)
            if own and capacity
        }
    return root


def read_bundles(text: str) -> list[str]:
    """The text of each bundle, in order."""
    bundles: list[list[str]] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match is not None:
            while len(bundles) < int(match[1], 0):
                bundles.append([])
            bundles.append([line])
        elif bundles:
            bundles[-1].append(line)
    return ["\n".join(lines) for lines in bundles]


def find_regions(bundles: Sequence[str]) -> Region:
    """The tree of what the branches span; the cycles are not counted yet."""
    comparisons: dict[str, tuple[str, int]] = {}
    for bundle in bundles:
        for name, relation, constant in _COMPARISON.findall(bundle):
            comparisons[name] = (f"{relation} {constant}", int(constant))
    spans = []
    for number, bundle in enumerate(bundles):
        for negated, predicate, target in _BRANCH.findall(bundle):
            # A register's name ends in _p3 where it was renamed after the comparison.
            plain = re.sub(r"_p\d+$", "", predicate)
            known = comparisons.get(predicate, comparisons.get(plain))
            condition = predicate if known is None else known[0]
            condition = f"not {condition}" if negated else condition
            after = min(number + 1 + DELAY_SLOTS, len(bundles))
            if int(target) <= number:
                trips = known[1] if known is not None and known[1] > 0 else None
                spans.append(Region("loop", int(target), after, condition, trips))
            elif int(target) > after:
                spans.append(Region("branch", after, int(target), condition))
    root = Region("kernel", 0, len(bundles))
    open_regions = [root]
    for region in sorted(spans, key=lambda span: (span.start, -span.end)):
        while region.start >= open_regions[-1].end:
            open_regions.pop()
        # Spans that overlap (a jump out of a region) are cut, so that they stay a tree.
        region.end = min(region.end, open_regions[-1].end)
        open_regions[-1].inner.append(region)
        open_regions.append(region)
    return root


def read_slots(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """(names of the issue slots, how many there are of each, how many each bundle uses)."""
    names: list[str] = []
    numbers: list[list[int]] = []
    for line in text.splitlines():
        words = line.replace(",", " ").split()
        if words and words[0] == "MATMUL":
            names = words
        elif words and words[0].isdigit():
            numbers.append([int(word) for word in words])
    return names, numbers[0] if numbers else [], numbers[1:]


def _own_bundles(region: Region) -> list[int]:
    inside = [range(inner.start, inner.end) for inner in region.inner]
    return [i for i in range(region.start, region.end) if not any(i in span for span in inside)]
