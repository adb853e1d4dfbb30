"""One case on some chips: compiled, read, estimated."""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effattn.checks import check_in
from effattn.static.bundles import dumped_kernels, read_kernel
from effattn.static.cases import Case
from effattn.static.chips import Chip
from effattn.static.dump import compile_with_dumps
from effattn.static.estimate import Counts, estimate, hot_regions
from effattn.static.hlo import PallasCall, pallas_calls, xla_cycles
from effattn.static.own import CASES
from effattn.static.rivals import RIVALS

WALK_STEPS = 2048  # libtpu's evaluation takes seconds per thousand grid steps


@dataclass(frozen=True)
class KernelReport:
    """One Pallas call of a case. Cycles are static: of one core, without memory.

    low, high: where it is unknown which variant of a step runs; static_cycles is their mean.
    matrix_fraction: useful FLOP over what the matrix units do in that time. floor_cycles: what its
    HBM traffic takes at least. spills, fills: instructions in the code. message: why no estimate.
    """

    name: str
    static_cycles: float | None = None
    low: float | None = None
    high: float | None = None
    hot_cycles: tuple[int, ...] = ()
    static_walk_cycles: int | None = None
    matrix_fraction: float | None = None
    floor_cycles: float | None = None
    spills: int | None = None
    fills: int | None = None
    vmem_bytes: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class Report:
    """One variant of a case on one chip. message: the compiler's, where it does not compile.

    static_xla_cycles: XLA's cost model of its own work beside the kernels.
    """

    case: str
    parameters: Mapping[str, Any]
    chip: str
    own: bool
    message: str | None = None
    kernels: tuple[KernelReport, ...] = ()
    static_xla_cycles: int | None = None
    matrix_fraction: float | None = None
    code_bytes: int | None = None
    temp_bytes: int | None = None
    compile_seconds: float | None = None

    @property
    def static_cycles(self) -> float | None:
        """Of all kernels together, without XLA's work; None where one of them has no estimate."""
        cycles = [kernel.static_cycles for kernel in self.kernels]
        return None if not cycles or None in cycles else sum(c for c in cycles if c is not None)

    @property
    def title(self) -> str:
        """The case with its parameters."""
        return f"{self.case} ({label(self.parameters)})" if self.parameters else self.case


def label(parameters: Mapping[str, Any]) -> str:
    """ "block 1024, compute 512"."""
    return ", ".join(f"{name} {value}" for name, value in parameters.items())


def find_case(name: str) -> Case:
    """Raises ValueError with near matches for a name that is in neither table."""
    cases = {case.name: case for case in (*CASES, *RIVALS)}
    check_in("case", name, cases)
    return cases[name]


def profile(
    case: Case, parameters: Mapping[str, Any], chips: Sequence[Chip], *, walk: bool = True
) -> list[Report]:
    """A report per chip. walk: libtpu's own evaluation too, where the case says it is right."""
    with tempfile.TemporaryDirectory(prefix="effattn_static_") as name:
        folder = Path(name)
        results = compile_with_dumps(case, parameters, chips, folder / "dump", walk=False)
        short = [
            chip
            for chip in chips
            if walk and case.walk and _steps(results[chip.name]) <= WALK_STEPS
        ]
        walked = compile_with_dumps(case, parameters, short, folder / "walk", walk=True)
        return [
            _report(
                case,
                parameters,
                chip,
                results[chip.name],
                folder / "dump" / chip.name,
                walked.get(chip.name, {}),
            )
            for chip in chips
        ]


def _steps(result: Mapping[str, Any]) -> float:
    counts = result.get("counts", {})
    return max((each["steps"] for each in counts.values()), default=math.inf)


def _report(
    case: Case,
    parameters: Mapping[str, Any],
    chip: Chip,
    result: Mapping[str, Any],
    folder: Path,
    walked: Mapping[str, Any],
) -> Report:
    empty = Report(case.name, parameters, chip.name, case.own)
    if "hlo" not in result:
        return replace(empty, message=result["message"])
    walks = {call.name: call.walk_cycles for call in pallas_calls(walked.get("hlo", ""))}
    files = dumped_kernels(folder)
    counts = {pattern: Counts(**fields) for pattern, fields in result["counts"].items()}
    calls = pallas_calls(result["hlo"])
    kernels = tuple(
        replace(
            _kernel_report(call, files.get(call.name), counts, chip),
            name=name,
            vmem_bytes=call.vmem_bytes,
            static_walk_cycles=walks.get(call.name),
        )
        for name, call in zip(_stable_names([call.name for call in calls]), calls, strict=True)
    )
    report = replace(
        empty,
        kernels=kernels,
        static_xla_cycles=xla_cycles(result["hlo"]),
        code_bytes=result["code_bytes"],
        temp_bytes=result["temp_bytes"],
        compile_seconds=round(result["seconds"], 1),
    )
    if report.static_cycles is None:
        return report
    peak = report.static_cycles * chip.flop_per_cycle
    return replace(report, matrix_fraction=result["flops"] / peak)


def _stable_names(names: Sequence[str]) -> list[str]:
    """Without XLA's running number, which hangs on the rest of the program: "forward", "forward 2"
    of "forward.1", "forward.7"."""
    plain = [re.sub(r"\.\d+(\.\w+)?$", "", name) for name in names]
    return [
        name if (nth := plain[:i].count(name) + 1) == 1 else f"{name} {nth}"
        for i, name in enumerate(plain)
    ]


def _kernel_report(
    call: PallasCall, files: dict[str, Path] | None, table: Mapping[str, Counts], chip: Chip
) -> KernelReport:
    if files is None:
        return KernelReport(call.name, message="libtpu left no dump of it")
    kernel = read_kernel(files)
    counts = next((c for pattern, c in table.items() if re.search(pattern, call.name)), None)
    read = KernelReport(
        call.name,
        hot_cycles=tuple(region.whole_cycles for region in hot_regions(kernel)),
        spills=sum(region.spills for region in kernel.walk()),
        fills=sum(region.fills for region in kernel.walk()),
    )
    if counts is None:
        return replace(read, message="the case has no counts for it")
    try:
        found = estimate(kernel, counts)
    except RuntimeError as error:
        return replace(read, message=str(error))
    flops, hbm_bytes = counts.flops, counts.hbm_bytes
    peak = found.cycles * chip.flop_per_cycle
    return replace(
        read,
        static_cycles=found.cycles,
        low=found.low,
        high=found.high,
        matrix_fraction=None if flops is None else flops / peak,
        floor_cycles=None if hbm_bytes is None else hbm_bytes / chip.hbm_bytes_per_cycle,
    )
