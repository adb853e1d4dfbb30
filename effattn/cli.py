"""The `effattn` command: one sub-command per module of effattn.commands.

A user's mistake is one sentence on stderr and exit code 2; a run that fails for a reason of its own
(a full disk, a loss that is not finite) is a sentence and exit code 1; a bug keeps its traceback.
Nothing heavy is imported before the arguments are known to be right.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from effattn.versions import versions

# name -> (module with add_arguments(parser) and run(arguments), what it does)
COMMANDS = {
    "train": ("effattn.commands.train", "train a model, or go on with a run that was interrupted"),
    "evaluate": ("effattn.commands.evaluate", "measure a trained model on a whole split"),
    "generate": ("effattn.commands.generate", "continue prompts with a trained model"),
    "inspect": ("effattn.commands.inspect", "show the learned chunks or depths of a text"),
    "plan": (
        "effattn.commands.plan",
        "whether a run fits on TPUs that are not here",
    ),
    "bench": ("effattn.commands.bench", "static cycles of the TPU kernels, no TPU needed"),
    "selfcheck": ("effattn.commands.selfcheck", "check the installed package on this device"),
}

_PCI_VENDORS = "sys/bus/pci/devices/*/vendor"
_OVERRIDE = re.compile(r"--?(no)?config\.")


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, with near matches for an unknown option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is not None:
            option = unknown[1].split("=")[0]
            near = get_close_matches(option, list(self._option_string_actions), n=3)
            message = f"unknown argument {option}"
            message += f"; did you mean {', '.join(near)}?" if near else ""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line, sys.argv's by default; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _quiet_libtpu()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # while a broken pipe can still be caught
        return code
    except SystemExit as stop:
        # argparse leaves this way; a caller in the same process gets the code instead.
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("effattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); flushing at exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        failure = _exit_code(error)
        if failure is None:
            raise
        name = f"effattn {arguments[0]}" if arguments else "effattn"
        print(f"{name}: {_sentence(error)}", file=sys.stderr)
        return failure


def _quiet_libtpu() -> None:
    """Spares a host without a TPU libtpu's complaints on stderr, when jax looks for devices.

    libtpu is there as a compiler too (the extra `test`). It asks the environment, then a cloud's
    metadata, what it runs on; with an answer it finds no TPU in silence, and jax takes the CPU.
    """
    google = "0x1ae0"  # the maker's PCI number, by which jax looks for TPUs as well
    found = any(path.read_text().strip() == google for path in Path("/").glob(_PCI_VENDORS))
    if not found and "JAX_PLATFORMS" not in os.environ:
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _dispatch(arguments: list[str]) -> int:
    overrides, rest = split_overrides(arguments)
    parser = _Parser(
        prog="effattn",
        description="Efficient attention models in JAX: train, evaluate, generate.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="command", parser_class=_Parser
    )
    chosen = next((word for word in rest if not word.startswith("-")), None)
    for name, (module_name, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
    if chosen is not None and chosen not in COMMANDS:
        near = get_close_matches(chosen, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unknown command {chosen}, expected one of {', '.join(COMMANDS)}{hint}")
    namespace, unknown = parser.parse_known_args(rest)
    if namespace.version:
        print(", ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if chosen is None:
        parser.print_help()
        return 2
    if unknown:
        commands.choices[chosen].error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides and not module.TAKES_OVERRIDES:
        commands.choices[chosen].error(f"{overrides[0]}: this command takes no config fields")
    namespace.overrides = overrides
    return module.run(namespace)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(`--config.key=value` overrides, everything else); `--config.key value` becomes one word."""
    overrides, rest = [], []
    words = iter(range(len(arguments)))
    for index in words:
        word = arguments[index]
        if not _OVERRIDE.match(word):
            rest.append(word)
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if "=" not in word and not following.startswith("--"):
            word = f"{word}={following}"
            next(words)
        overrides.append(word)
    return overrides, rest


def _exit_code(error: Exception) -> int | None:
    """2 for a user's mistake, 1 for a run that failed, None for a bug."""
    if isinstance(error, OSError):
        return 2
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    # A ValueError from within jax or numpy is a bug of ours: its traceback is needed.
    if module.split(".")[0] != "effattn":
        return None
    if isinstance(error, ValueError):
        return 2
    return 1 if isinstance(error, (RuntimeError, ArithmeticError)) else None


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return str(error)
