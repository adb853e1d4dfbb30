"""Cycles of a kernel from its code and from how often each part of it runs.

cycles = sum over regions of (cycles of one execution) x (executions). There is no memory in this
sum: no DMA that is waited for, no contention, no pipeline that fills. It ranks kernels and finds
regressions; it is not a device time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from effattn.static.bundles import Region


@dataclass(frozen=True)
class Counts:
    """How often the parts of one kernel run, and what it is worth.

    steps: grid steps.
    hot: executions of each branch that multiplies matrices, in program order: (full, partial) for
        a kernel with a masked variant behind an unmasked one. One number: of all of them together,
        and which of them runs is not known; the estimate is then a range.
    outer: executions of a branch without matrix work (initialise, finish); by default every step.
    rare: of those whose condition to be skipped is known: {"ne 9": 8} for `step == 9`, 8 times.
    trips: mean number of iterations of each loop that does not count to a constant, in program
        order, without the grid loop.
    flops: useful matrix FLOP, two per multiply-add; what a mask removes is not useful.
    hbm_bytes: traffic of the kernel, for its floor by bandwidth.
    """

    steps: float
    hot: float | tuple[float, ...] | None = None
    outer: float | None = None
    rare: Mapping[str, float] = field(default_factory=dict)
    trips: tuple[float, ...] = ()
    flops: float | None = None
    hbm_bytes: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Static cycles; low < high where it is unknown which variant of a step runs."""

    low: float
    high: float
    hot_cycles: tuple[int, ...]

    @property
    def cycles(self) -> float:
        return (self.low + self.high) / 2


def estimate(kernel: Region, counts: Counts) -> Estimate:
    """Static cycles of a kernel whose parts run as often as `counts` says.

    Raises RuntimeError where the counts do not fit the code: another number of branches with matrix
    work, or of loops without a constant bound.
    """
    hot = hot_regions(kernel)
    hot_cycles = tuple(region.whole_cycles for region in hot)
    given = counts.steps if counts.hot is None else counts.hot
    if isinstance(given, (tuple, list)):
        if len(given) != len(hot):
            raise RuntimeError(
                f"counts for {len(given)} branches with matrix work, but the code has {len(hot)} "
                f"(of {', '.join(map(str, hot_cycles))} cycles)"
            )
        choices = [tuple(given)]
    elif len(hot) < 2:
        choices = [(given,) * len(hot)]
    else:
        cheap, dear = hot_cycles.index(min(hot_cycles)), hot_cycles.index(max(hot_cycles))
        choices = [tuple(given * (i == all_) for i in range(len(hot))) for all_ in (cheap, dear)]
    totals = [_Executions(kernel, counts, hot, choice).total() for choice in choices]
    return Estimate(min(totals), max(totals), hot_cycles)


def hot_regions(kernel: Region) -> list[Region]:
    """The branches that multiply matrices themselves or in their loops, in program order."""

    def multiplies(region: Region) -> bool:
        loops = [inner for inner in region.inner if inner.kind == "loop"]
        return region.matmuls > 0 or any(map(multiplies, loops))

    return [r for r in kernel.walk() if r.kind == "branch" and multiplies(r)]


class _Executions:
    """One walk over the regions, from the outside in."""

    def __init__(
        self, kernel: Region, counts: Counts, hot: Sequence[Region], each: Sequence[float]
    ) -> None:
        self.kernel, self.counts = kernel, counts
        self.hot = {id(region): times for region, times in zip(hot, each, strict=True)}
        loops = [r for r in kernel.walk() if r.kind == "loop"]
        self.grid = next((r for r in loops if r.has_matmul), loops[0] if loops else None)
        open_loops = [r for r in loops if r.trips is None and r is not self.grid]
        if len(open_loops) != len(counts.trips):
            raise RuntimeError(
                f"trips for {len(counts.trips)} loops, but the code has {len(open_loops)} that do "
                f"not count to a constant (of {', '.join(str(r.whole_cycles) for r in open_loops)} "
                "cycles)"
            )
        self.trips = {id(r): n for r, n in zip(open_loops, counts.trips, strict=True)}

    def total(self) -> float:
        return self._cycles(self.kernel, 1.0, True)

    def _cycles(self, region: Region, times: float, alone: bool) -> float:
        """alone: branches without matrix work have counts of their own here."""
        total = region.cycles * times
        for inner in region.inner:
            # Beside the body of the grid loop stands what fetches the next step's blocks: it runs
            # in each step, at most. What stands inside a hot branch runs with it.
            beside = region is self.grid and not inner.has_matmul
            alone_there = alone and not beside and id(inner) not in self.hot
            here = self._times(inner, region, times, alone and not beside)
            total += self._cycles(inner, here, alone_there)
        return total

    def _times(self, region: Region, parent: Region, parent_times: float, alone: bool) -> float:
        if region is self.grid:
            return self.counts.steps
        if region.kind == "loop":
            trips = self.trips.get(id(region), region.trips)
            return parent_times * (1 if trips is None else trips)
        if id(region) in self.hot:
            return min(self.hot[id(region)], parent_times)
        if region.has_matmul:
            if parent is self.grid or any(inner is self.grid for inner in region.walk()):
                return parent_times
            return max(self.hot.get(id(inner), 0.0) for inner in region.walk())
        if not alone:
            return parent_times
        outer = self.counts.steps if self.counts.outer is None else self.counts.outer
        return min(self.counts.rare.get(region.condition, outer), parent_times)
