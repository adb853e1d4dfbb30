"""Train a model from a config; the same command goes on where a run was interrupted.

  effattn train --config=quickstart
  effattn train --config=configs/mqar.py:based --workdir=runs/m1 --config.train.steps=500

Any field of the config is an option, `--config.data.source=path/to/text`. Ctrl-C saves and exits.

Several processes: the same command on each, with --coordinator, --num-processes and --process-id,
or the environment (EFFATTN_COORDINATOR, EFFATTN_NUM_PROCESSES, EFFATTN_PROCESS_ID), or
--distributed. Exit codes of such a job: 0 finished, 75 told to end and saved, 76 another process
has gone (after both the same command goes on), 1 failed, 2 a mistake.
"""

import argparse
import sys
from pathlib import Path

from effattn.config import config_names, load_config, split_spec

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="SPEC",
        help="file.py, file.py:argument, or a name of the package: " + ", ".join(config_names()),
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="where the run is kept, local or gs:// or s3:// (default: runs/<name of the config>)",
    )
    several = parser.add_argument_group(
        "several processes", "the same command on every host; all of them see the same --workdir"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="let jax find the others (Cloud TPU, GKE, Slurm, Open MPI)",
    )


def run(arguments: argparse.Namespace) -> int:
    experiment = load_config(arguments.config, arguments.overrides)
    workdir = arguments.workdir or default_workdir(arguments.config)
    # Imported here: jax and flax take seconds, and the config's mistakes are known by now.
    from effattn.distributed import PEER_LOST, STOPPED, join, leave, lost_peer

    several = join(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        cluster=arguments.distributed,
    )
    from effattn.train.loop import train

    try:
        result = train(experiment, workdir)
    except Exception as error:
        sentence = lost_peer(error)
        if sentence is None:
            raise
        print(f"effattn train: {sentence}", file=sys.stderr)
        leave(PEER_LOST)
    return STOPPED if several and result["status"] == "stopped" else 0


def default_workdir(spec: str) -> str:
    """runs/mqar_based for configs/mqar.py:based."""
    name, argument = split_spec(spec)
    stem = Path(name).stem
    return f"runs/{stem}" if argument is None else f"runs/{stem}_{argument.replace('/', '_')}"
