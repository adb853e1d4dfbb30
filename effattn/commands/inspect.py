"""Show what an adaptive model did with a text: learned chunks (H-Net), depths (MoR).

effattn inspect --workdir=runs/hnet --text="def add(first, second): return first + second"
effattn inspect --workdir=runs/hnet --file=README.md --length=2000 --png=chunks.png
"""

import argparse
import sys
from pathlib import Path

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="what to read")
    source.add_argument("--file", type=Path, metavar="PATH", help="read this file")
    parser.add_argument(
        "--length", type=int, default=1000, metavar="N", help="bytes of it (default: 1000)"
    )
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw the picture there too")
    parser.add_argument(
        "--step", metavar="STEP", help="a checkpoint's number, best or latest (default: latest)"
    )
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="default: auto"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.length < 1:
        raise ValueError(f"--length: got {arguments.length}, expected at least 1")
    if arguments.png is not None and not arguments.png.parent.is_dir():
        raise ValueError(f"--png: no directory {arguments.png.parent}")
    text = arguments.text.encode() if arguments.file is None else arguments.file.read_bytes()
    # Imported here: jax and flax take seconds, and `--help` needs neither.
    from effattn.commands.run_directory import open_run, tokenizer_of
    from effattn.inspection import draw, in_terminal, inspect

    opened = open_run(arguments.workdir, arguments.step)
    tokenizer = tokenizer_of(opened.experiment.data, opened.vocab_size)
    if tokenizer is None:
        raise ValueError(f"--workdir: {arguments.workdir} was not trained on text")
    inspection = inspect(opened.model, text[: arguments.length], tokenizer)
    colour = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
    for picture in inspection.pictures:
        print(in_terminal(inspection.text, picture, colour=colour))
        print()
    for name, value in inspection.figures:
        print(f"{name:48}{value:>10}")
    if arguments.png is not None:
        draw(inspection).savefig(arguments.png, format="png", dpi=130)
        print(f"drawn: {arguments.png}")
    return 0
