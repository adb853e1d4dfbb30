"""Train a model from a config; the same command goes on where a run was interrupted.

  effattn train --config=quickstart
  effattn train --config=configs/mqar.py:based --workdir=runs/m1 --config.train.steps=500

Any field of the config is an option, `--config.data.source=path/to/text`. Ctrl-C saves and exits.
"""

import argparse
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


def run(arguments: argparse.Namespace) -> int:
    experiment = load_config(arguments.config, arguments.overrides)
    workdir = arguments.workdir or default_workdir(arguments.config)
    # Imported here: jax and flax take seconds, and the config's mistakes are known by now.
    from effattn.train.loop import train

    train(experiment, workdir)
    return 0


def default_workdir(spec: str) -> str:
    """runs/mqar_based for configs/mqar.py:based."""
    name, argument = split_spec(spec)
    stem = Path(name).stem
    return f"runs/{stem}" if argument is None else f"runs/{stem}_{argument.replace('/', '_')}"
