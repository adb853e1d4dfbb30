"""Whether a run fits, what it moves and how fast it can be at best, before any chip is rented.

  effattn plan --config=based_1b3 --topology=v5e:16x16 --config.mesh.fsdp=16
  effattn plan --config=quickstart --topology=v5e:2x4 --json=plan.json --html=plan.html
  effattn plan --config=quickstart --topology=v5e:2x4 --diff=plan.json --config.train.accumulation=2
  effattn plan --config=based_1b3 --topology=v5e:2x2 --decode=4096
  effattn plan --config=transformer_8b --topology=h100:8x8 --config.mesh.fsdp=64

The real step is compiled for the described TPUs; none has to be there. For GPUs (a node's x nodes),
and with --analytic, the plan is counted instead, in seconds. Exit codes: 0 it fits, 3 it does not,
and --config values are named that would make it fit; 2 a mistake, 1 the compiler failed.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from effattn.config import config_names, load_config
from effattn.plan.machine import is_gpu, machine_of
from effattn.plan.report import Plan, read, to_json

TAKES_OVERRIDES = True
DOES_NOT_FIT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="SPEC",
        help="file.py, file.py:argument, or a name of the package: " + ", ".join(config_names()),
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:16x16, v5p:4x4x8, v5p-256, ...; h100:8x4 is 8 GPUs on a node, 4 nodes",
    )
    parser.add_argument(
        "--analytic", action="store_true", help="count, compile nothing (always so for GPUs)"
    )
    parser.add_argument("--num-slices", type=int, default=1, metavar="N")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="where only the data knows it")
    parser.add_argument(
        "--decode", type=int, metavar="TOKENS", help="a decoding step after so many tokens instead"
    )
    parser.add_argument("--hbm-gib", type=float, metavar="G", help="plan for devices with less")
    parser.add_argument(
        "--search",
        type=int,
        default=3,
        metavar="N",
        help="compilations to look for values that fit (default 3)",
    )
    parser.add_argument("--timeout", type=int, default=900, metavar="S", help="of a compilation")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--html", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--diff", metavar="FILE", help="compare with a plan that --json wrote")


def run(arguments: argparse.Namespace) -> int:
    machine_of(arguments.topology, arguments.num_slices)
    analytic = arguments.analytic or is_gpu(arguments.topology)
    if analytic and arguments.decode is not None:
        raise ValueError(
            f"--decode: got {arguments.decode} for an analytic plan, which is of a training step; "
            "expected a TPU topology without --analytic"
        )
    old = None if arguments.diff is None else read(Path(arguments.diff))
    experiment = load_config(arguments.config, arguments.overrides)
    from effattn.plan import render
    from effattn.plan.analytic import analytic_plan
    from effattn.plan.compiled import compile_plan
    from effattn.plan.picture import to_png
    from effattn.plan.search import search

    command = f"effattn {shlex.join(sys.argv[1:])}"
    shared = dict(
        name=Path(arguments.config).stem,
        num_slices=arguments.num_slices,
        vocab_size=arguments.vocab_size,
        hbm_gib=arguments.hbm_gib,
        command=command,
        overrides=arguments.overrides,
    )

    def count(experiment: Any) -> Plan:
        return analytic_plan(experiment, arguments.topology, **shared)

    def compile_one(experiment: Any) -> Plan:
        return compile_plan(
            experiment,
            arguments.topology,
            decode=arguments.decode,
            timeout_seconds=arguments.timeout,
            **shared,
        )

    def write(plan: Plan) -> None:
        for path, text_of in (
            (arguments.json, to_json),
            (arguments.markdown, render.to_markdown),
            (arguments.html, render.to_html),
        ):
            if path is not None:
                Path(path).write_text(text_of(plan))
        if arguments.png is not None:
            Path(arguments.png).write_bytes(to_png(plan))

    plan = count(experiment) if analytic else compile_one(experiment)
    print(render.to_text(plan))
    write(plan)
    if old is not None:
        print(f"\nAgainst {arguments.diff}\n{render.difference(old, plan)}")
    if plan.fits:
        return 0
    print()
    if arguments.search < 1 or arguments.decode is not None:
        return DOES_NOT_FIT
    found = search(experiment, plan, count, None if analytic else compile_one, arguments.search)
    tried = f"{found.counted} candidates counted, {found.compiled} compiled"
    if found.candidate is None or found.plan is None:
        plan.notes.append(f"no values found that make it fit ({tried})")
        print(plan.notes[-1])
    else:
        flags = " ".join(found.candidate.flags())
        plan.notes.append(f"it would fit with {flags} ({tried})")
        print(f"{plan.notes[-1]}\n{render.to_text(found.plan)}")
    write(plan)
    return DOES_NOT_FIT
