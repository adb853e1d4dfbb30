"""Compiling a case in a process of its own, with libtpu's dumps on.

libtpu reads its flags once, when it is loaded, and a compiler that crashes takes its process along:
hence a child per case. Run as a module it is that child.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effattn.static.bundles import PASSES, TWINS
from effattn.static.cases import Case, Problem
from effattn.static.chips import CHIPS, Chip
from effattn.static.tpu import CompileError, compile_for, environment

TIMEOUT = 600.0  # seconds for a case on all chips; the largest takes about 60


def compile_with_dumps(
    case: Case, parameters: Mapping[str, Any], chips: Sequence[Chip], folder: Path, *, walk: bool
) -> dict[str, dict[str, Any]]:
    """Compiles one variant of a case for chips; dumps and results land in `folder`/<chip>.

    walk: libtpu evaluates the code too, instead of dumping it. Returns per chip what `_compile`
    says of it; a chip on which the compiler crashed or took too long has a `message` alone.
    """
    results: dict[str, dict[str, Any]] = {}
    for name in (chip.name for chip in chips):
        (folder / name).mkdir(parents=True)
    # The child goes from chip to chip; a crash is the fault of the first that has no answer.
    while waiting := [chip for chip in chips if chip.name not in results]:
        message = _run_child(case, parameters, waiting, folder, walk)
        for chip in waiting:
            path = folder / chip.name / "result.json"
            if not path.exists():
                results[chip.name] = {"message": message}
                break
            results[chip.name] = json.loads(path.read_text())
    return results


def _run_child(
    case: Case, parameters: Mapping[str, Any], chips: Sequence[Chip], folder: Path, walk: bool
) -> str:
    """Runs until the child ends; returns the last of what it said, for the case that it crashed."""
    fresh = folder / "fresh"
    (fresh / "walk").mkdir(parents=True, exist_ok=True)
    flags = [os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={fresh}"]
    if walk:
        flags += [f"--xla_jf_dump_static_llo_profile_to={fresh}/walk"]
        flags += ["--xla_jf_dump_llo_text=false"]
    else:
        passes = "|".join((*PASSES, TWINS))
        flags += ["--xla_jf_dump_llo_text=true"]
        flags += [f"--xla_jf_dump_llo_pass_label_regex=({passes})"]
    settings = {
        **os.environ,
        **environment(chips[0]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache leaves no dump
        "LIBTPU_INIT_ARGS": " ".join(flags).strip(),
    }
    order = {
        "case": case.name,
        "parameters": dict(parameters),
        "chips": [chip.name for chip in chips],
        "folder": str(folder),
    }
    command = [sys.executable, "-m", "effattn.static.dump", json.dumps(order)]
    try:
        done = subprocess.run(
            command,
            env=settings,
            timeout=TIMEOUT,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not compiled within {TIMEOUT:.0f} s"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"the compiler ended with code {done.returncode}: " + "\n".join(said[-8:])


def main(order: Mapping[str, Any]) -> None:
    """The child: one case, chip after chip."""
    from effattn.static.profile import find_case

    folder = Path(order["folder"])
    case = find_case(order["case"])
    for name in order["chips"]:
        result = _compile(case, order["parameters"], CHIPS[name])
        for path in (folder / "fresh").glob("*.txt"):
            path.rename(folder / name / path.name)
        (folder / name / "part.json").write_text(json.dumps(result))
        (folder / name / "part.json").rename(folder / name / "result.json")


def _compile(case: Case, parameters: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
    """{"message"} where it does not compile, else {"hlo", "flops", "counts", ...}."""
    began = time.monotonic()
    try:
        problem: Problem = case.problem(chip, **parameters)
        compiled = compile_for(chip.name, problem.fn, *problem.shapes)
    except CompileError as error:
        return {"message": str(error)}
    except Exception as error:  # whatever a kernel may raise while it is built and traced
        return {"message": f"{type(error).__name__}: {error}"}
    memory: Any = compiled.memory_analysis()
    return {
        "hlo": compiled.as_text(),
        "flops": problem.flops,
        "counts": {pattern: asdict(counts) for pattern, counts in problem.counts.items()},
        "seconds": time.monotonic() - began,
        "code_bytes": memory.generated_code_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
