"""Reports as JSON and as Markdown, and the check of our kernels against a recorded file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effattn.static.gpu import GpuReport
from effattn.static.profile import KernelReport, Report, label
from effattn.versions import version_of

ALLOWED_RISE = 0.03

NOTE = (
    "Static cycles: read off the code that libtpu schedules, executed as often as the block lists "
    "say; of one TensorCore that runs the whole grid. No DMA, no contention, no clock: they rank "
    "kernels and find regressions, and are not a device time. MXU: useful matrix FLOP over the "
    "matrix units' peak in these cycles. XLA: the compiler's cost model of its own work beside the "
    "kernels (it prices sums over large arrays above what the memory needs). Walk: libtpu's own "
    "evaluation of the same code, where control flow hangs on grid indices alone (it gives a "
    "parallel grid to both cores of a v5p). DMA floor: a kernel's traffic at the full bandwidth of "
    "the HBM, where a case states it. Spills count instructions in the code."
)


def compiler_versions() -> dict[str, str | None]:
    return {name: version_of(name) for name in ("jax", "jaxlib", "libtpu", "tokamax")}


def to_json(
    reports: Sequence[Report], gpu_reports: Sequence[GpuReport], command: str, date: str
) -> str:
    """One object: what was compiled with what, and a row per variant and chip."""
    rows = [{**asdict(report), "static_cycles": report.static_cycles} for report in reports]
    document = {
        "about": NOTE,
        "command": command,
        "date": date,
        "versions": compiler_versions(),
        "rows": rows,
        "gpu_rows": [asdict(report) for report in gpu_reports],
    }
    return json.dumps(document, indent=1) + "\n"


def to_markdown(
    reports: Sequence[Report], gpu_reports: Sequence[GpuReport], command: str, date: str
) -> str:
    """A table per case, one line per kernel, chip and variant."""
    versions = ", ".join(f"{n} {v}" for n, v in compiler_versions().items() if v is not None)
    lines = [
        "# Kernels compiled for chips that are not here: static figures",
        "",
        f"{date}, {versions}",
        "",
        f"    {command}",
        "",
    ]
    lines += [NOTE] if reports else []
    cases: dict[str, list[Report]] = {}
    for report in reports:
        cases.setdefault(report.case, []).append(report)
    for name, group in cases.items():
        lines += ["", f"## {name}: static", "", *_table(group)]
    if gpu_reports:
        lines += ["", "## Hopper: static resources", "", *_gpu_table(gpu_reports)]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "parameters",
    "chip",
    "kernel",
    "static k cycles",
    "static walk k cycles",
    "static DMA floor k cycles",
    "static MXU",
    "spills",
    "fills",
    "VMEM MiB",
    "static XLA k cycles",
)


def _table(reports: Sequence[Report]) -> list[str]:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for report in reports:
        first = [label(report.parameters), report.chip]
        if report.message is not None:
            cells = [*first, f"does not compile: {_sentence(report.message)}"]
            lines.append(f"| {' | '.join(cells)} |" + " |" * (len(_COLUMNS) - 3))
            continue
        xla = _thousands(report.static_xla_cycles)
        for kernel in report.kernels:
            cells = [*first, *_kernel_cells(kernel)]
            cells.append(xla if len(report.kernels) == 1 else "")
            lines.append(f"| {' | '.join(cells)} |")
        if len(report.kernels) != 1:
            total = [_thousands(report.static_cycles), "", "", _fraction(report.matrix_fraction)]
            lines.append(f"| {' | '.join([*first, 'all', *total, '', '', '', xla])} |")
    return lines


def _gpu_table(reports: Sequence[GpuReport]) -> list[str]:
    columns = ["case", "GPU", "stage", "kernel", "registers", "spill bytes", "shared memory KiB"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for report in reports:
        stage = report.stage if report.message is None else f"{report.stage}: {report.message}"
        first = [report.case, report.gpu, _sentence(stage)]
        rows = [
            [
                kernel.name,
                str(kernel.registers),
                str(kernel.spill_store_bytes + kernel.spill_load_bytes),
                "" if kernel.shared_memory_bytes is None else str(kernel.shared_memory_bytes >> 10),
            ]
            for kernel in report.kernels
        ]
        lines += [f"| {' | '.join([*first, *row])} |" for row in rows or [[""] * 4]]
    return lines


def _sentence(message: str) -> str:
    """A message as one cell of a table."""
    return " ".join(message.split()).replace("|", "\\|")[:200]


def _kernel_cells(kernel: KernelReport) -> list[str]:
    cycles = _thousands(kernel.static_cycles)
    if kernel.low is not None and kernel.low != kernel.high:
        cycles += f" ({_thousands(kernel.low)} to {_thousands(kernel.high)})"
    if kernel.message is not None:
        cycles = f"no estimate: {_sentence(kernel.message)}"
    return [
        kernel.name,
        cycles,
        _thousands(kernel.static_walk_cycles),
        _thousands(kernel.floor_cycles),
        _fraction(kernel.matrix_fraction),
        _count(kernel.spills),
        _count(kernel.fills),
        "" if kernel.vmem_bytes is None else f"{kernel.vmem_bytes / 2**20:.1f}",
    ]


def _thousands(cycles: float | None) -> str:
    return "" if cycles is None else f"{cycles / 1e3:,.1f}"


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def read_recorded(path: Path) -> dict[str, Any]:
    """A file that `to_json` has written. Raises ValueError where it is something else."""
    try:
        recorded = json.loads(path.read_text())
        if isinstance(recorded["rows"], list) and isinstance(recorded["versions"], dict):
            return recorded
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise ValueError(f"--check: {path} is not a file that `effattn bench --static --json` wrote")


def compare(recorded: Mapping[str, Any], reports: Sequence[Report]) -> tuple[list[str], list[str]]:
    """(failures, notes), a sentence each: our kernels now against the recorded rows.

    A failure: a kernel whose static cycles, or a case whose XLA cycles, rose by more than 3 %; a
    recorded case that no longer compiles or has no estimate. A note: what was not recorded, and
    what became cheaper by as much. Raises ValueError where another compiler recorded the file, or
    nothing in it can be compared.
    """
    libtpu = recorded["versions"].get("libtpu"), version_of("libtpu")
    if libtpu[0] != libtpu[1]:
        raise ValueError(
            f"--check: recorded with libtpu {libtpu[0]}, but {libtpu[1]} is installed: the cycles "
            "of two compilers cannot be compared"
        )
    rows = {_key(row): row for row in recorded["rows"] if row["own"]}
    failures, notes, compared = [], [], 0
    for report in reports:
        if not report.own:
            continue
        title = f"{report.title} on {report.chip}"
        row = rows.get(_key(asdict(report)))
        if row is None:
            notes.append(f"{title}: not recorded")
            continue
        compared += 1
        if report.message is not None and row["message"] is None:
            failures.append(f"{title}: no longer compiles: {report.message.splitlines()[0]}")
            continue
        before, now = _cycles_by_name(row), _cycles_by_name(asdict(report))
        for name, old in before.items():
            new = now.get(name)
            if old is None:
                continue
            if new is None:
                failures.append(f"{title}: {name} has no static cycles any more")
            elif new > (1 + ALLOWED_RISE) * old:
                failures.append(f"{title}: {name} {_change(old, new)}")
            elif new < (1 - ALLOWED_RISE) * old:
                notes.append(f"{title}: {name} {_change(old, new)}")
    if not compared:
        raise ValueError("--check: none of the chosen cases and chips is in the recorded file")
    return failures, notes


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["case"], json.dumps(row["parameters"], sort_keys=True), row["chip"]


def _cycles_by_name(row: Mapping[str, Any]) -> dict[str, float | None]:
    cycles = {kernel["name"]: kernel["static_cycles"] for kernel in row["kernels"]}
    return {**cycles, "XLA's work beside the kernels": row["static_xla_cycles"]}


def _change(before: float, now: float) -> str:
    direction = "rose" if now > before else "fell"
    share = f" by {abs(now / before - 1):.1%}" if before else ""
    return f"{direction}{share}, from {before:,.0f} to {now:,.0f} static cycles"
