"""Static figures of the kernels: compiled for a chip that is not here, and read, never run.

  effattn bench --static
  effattn bench --static --kernel=flash --chip=v5e --set=q=1024,kv=512
  effattn bench --static --rivals --json=benchmarks/static_tpu.json
  effattn bench --static --check=benchmarks/static_tpu.json

TPU: static cycles, which rank kernels and find regressions, and are no device time. Hopper:
registers, spills and shared memory.
"""

import argparse
import datetime
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.checks import check_in

if TYPE_CHECKING:
    from effattn.static.gpu import GpuReport
    from effattn.static.profile import Report

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--static", action="store_true", help="required: there is no benchmark on a device yet"
    )
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument(
        "--kernel", metavar="REGEX", default="", help="the cases whose name fits (default: all)"
    )
    parser.add_argument(
        "--chip",
        metavar="NAMES",
        default="v5e,v5p,v6e",
        help="of v5e, v5p, v6e, tpu7x, h100, h200, comma-separated (default: v5e,v5p,v6e)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="the case's parameters instead of its own; may be given several times",
    )
    parser.add_argument("--rivals", action="store_true", help="other people's kernels too")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the table (always printed)")
    parser.add_argument(
        "--check",
        metavar="FILE",
        help="exit with 1 where our static cycles are more than 3%% above those in this JSON file",
    )


def run(arguments: argparse.Namespace) -> int:
    if not arguments.static:
        raise ValueError("--static: expected, there is no benchmark on a device yet")
    # Imported here: jax takes seconds, and `--help` does not need it.
    from effattn.static import report as reports
    from effattn.static.chips import CHIPS
    from effattn.static.gpu import GPU_CASES, GPUS, profile_gpu
    from effattn.static.own import CASES
    from effattn.static.profile import label, profile
    from effattn.static.rivals import RIVALS

    if arguments.check is not None and arguments.rivals:
        raise ValueError("--rivals: only our own kernels are checked, expected no --check with it")
    names = list(dict.fromkeys(arguments.chip.split(",")))
    for name in names:
        check_in("--chip", name, [*CHIPS, *GPUS])
    chips = [CHIPS[name] for name in names if name in CHIPS]
    gpus = [name for name in names if name in GPUS]
    table = [*CASES, *RIVALS] if arguments.rivals else list(CASES)
    cases = [case for case in table if chips and _fits(arguments.kernel, case.name)]
    gpu_cases = [name for name in GPU_CASES if gpus and _fits(arguments.kernel, name)]
    if not cases and not gpu_cases:
        known = [case.name for case in table if chips] + [name for name in GPU_CASES if gpus]
        more = "" if arguments.rivals or not chips else " (--rivals adds others')"
        raise ValueError(
            f"--kernel: {arguments.kernel!r} fits no case, expected one of: "
            f"{'; '.join(known)}{more}"
        )
    if arguments.list:
        for case in cases:
            print("; ".join([case.name, *(label(variant) for variant in case.variants if variant)]))
        for name in gpu_cases:
            print(name)
        return 0
    given = [_parameters(text) for text in arguments.set]
    for case in cases:
        for name in (name for parameters in given for name in parameters):
            check_in(f"--set: parameter of {case.name!r}", name, case.parameters)
    recorded = None
    if arguments.check is not None:
        recorded = reports.read_recorded(Path(arguments.check))
    if cases:
        _check_installed("libtpu", "test", "compiles for a TPU")
    for package in {case.package for case in cases if case.package is not None}:
        _check_installed(package, "peers", "has some of the rivals (--kernel leaves them out)")
    for path in (arguments.json, arguments.markdown):
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist")

    command, date = _command(arguments), datetime.date.today().isoformat()
    found: list[Report] = []
    gpu_found: list[GpuReport] = []

    def keep() -> None:
        # After each case: an interrupted run keeps its figures.
        if arguments.json is not None:
            Path(arguments.json).write_text(reports.to_json(found, gpu_found, command, date))

    for case in cases:
        for parameters in given if given else case.variants:
            print(f"compiling {case.name} {label(parameters)}".rstrip(), file=sys.stderr)
            found += profile(case, parameters, chips, walk=recorded is None)
            keep()
    for name in gpu_cases:
        for gpu in gpus:
            print(f"compiling {name} for {gpu}", file=sys.stderr)
            gpu_found.append(profile_gpu(name, gpu))
            keep()
    text = reports.to_markdown(found, gpu_found, command, date)
    print(text, end="")
    if arguments.markdown is not None:
        Path(arguments.markdown).write_text(text)
    if recorded is None:
        return 0
    failures, notes = reports.compare(recorded, found)
    for sentence in (*notes, *failures):
        print(sentence, file=sys.stderr)
    return 1 if failures else 0


def _fits(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"--kernel: {pattern!r} is not a regular expression: {error}") from None


def _parameters(text: str) -> dict[str, Any]:
    """{"q": 1024, "fused": True} of "q=1024,fused=true"."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"--set: got {text!r}, expected NAME=VALUE,NAME=VALUE")
        if value in ("true", "false"):
            found[name] = value == "true"
        elif value.lstrip("-").isdecimal():
            found[name] = int(value)
        else:
            raise ValueError(f"--set: got {part!r}, expected a whole number, true or false")
    return found


def _check_installed(package: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{package} is not installed, and it {purpose}: pip install 'effattn[{extra}]'"
        )


def _command(arguments: argparse.Namespace) -> str:
    """The command line that gives this table again, in one spelling."""
    words = ["effattn", "bench", "--static", f"--chip={arguments.chip}"]
    if arguments.kernel:
        words.append(f"--kernel={arguments.kernel}")
    words += [f"--set={text}" for text in arguments.set]
    words += ["--rivals"] if arguments.rivals else []
    for name in ("json", "markdown", "check"):
        path = getattr(arguments, name)
        words += [] if path is None else [f"--{name}={path}"]
    return shlex.join(words)
