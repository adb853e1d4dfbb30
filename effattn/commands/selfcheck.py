"""Check the installed package on this machine's own device: laws and golden vectors, ~1 minute."""

import argparse

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="only name the checks")


def run(arguments: argparse.Namespace) -> int:
    # Imported here: jax and flax take seconds, and `--help` needs neither.
    from effattn.selfcheck import CHECKS, run_checks

    if arguments.list:
        for check in CHECKS:
            print(f"{check.name:36}{check.about}")
        return 0
    return run_checks()
