"""Measure a trained model on a whole split: the same figures whatever the batch size.

effattn evaluate --workdir=runs/quickstart --baselines
effattn evaluate --workdir=runs/quickstart --config.data.source=other/text
"""

import argparse
import sys
import time

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's directory")
    parser.add_argument(
        "--split", default="validation", choices=("train", "validation"), help="default: validation"
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help="default: the run's own")
    parser.add_argument(
        "--step", metavar="STEP", help="a checkpoint's number, best or latest (default: latest)"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="beside it n-gram models, zlib and lzma on the same held-out bytes",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"--batch_size: got {arguments.batch_size}, expected at least 1")
    if arguments.baselines and arguments.split != "validation":
        raise ValueError("--baselines: they are counted on train, so only --split=validation fits")
    # Imported here: jax and flax take seconds, and `--help` needs neither.
    from effattn.commands.run_directory import open_run
    from effattn.data.baselines import baselines
    from effattn.data.pipeline import open_dataset
    from effattn.evaluate import evaluate

    opened = open_run(arguments.workdir, arguments.step, arguments.overrides)
    data = opened.experiment.data
    dataset = open_dataset(data)
    if dataset.vocab_size != opened.vocab_size:
        raise ValueError(
            f"data.source: {data.source!r} has a vocabulary of {dataset.vocab_size}, "
            f"the model in {arguments.workdir} one of {opened.vocab_size}"
        )
    progress = _Progress()
    result = evaluate(
        opened.model, dataset, arguments.split, batch_size=arguments.batch_size, on_tokens=progress
    )
    progress.clear()
    num_bytes = dataset.num_bytes(arguments.split)
    size = f", {num_bytes:,} bytes" if num_bytes is not None else ""
    print(f"{arguments.workdir}, step {opened.step}")
    print(f"{', '.join(data.sources)}: {arguments.split} split{size}, {result.tokens:,} targets")
    print()
    rows: list[tuple[str, str]] = []
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    rows += [
        ("loss (nats per token)", f"{result.loss:.5f}"),
        ("perplexity per token", f"{result.perplexity:.4f}"),
        ("accuracy", f"{result.accuracy:.4f}"),
    ]
    for name, value in rows:
        print(f"{name:24}{value:>10}")
    if arguments.baselines:
        others = baselines(dataset)
        print()
        if others is None:
            print("no baselines: they are made for text read as bytes")
        else:
            print("bits per byte of others on the same bytes")
            table = [*others.bits_per_byte.items(), ("this model", result.bits_per_byte or 0.0)]
            for name, bits in table:
                print(f"  {name:22}{bits:>10.4f}")
            print(f"n-grams are counted on {others.train_bytes:,} training bytes and smoothed by")
            print("interpolated Witten-Bell; the compressors see the held-out bytes alone")
    return 0


class _Progress:
    """How many targets are scored: a line that renews itself on a terminal, else one every 5 s."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = self._said = time.monotonic()

    def __call__(self, tokens: int) -> None:
        now = time.monotonic()
        if now - self._said < (0.2 if self._terminal else 5.0):
            return
        self._said = now
        text = f"evaluating: {tokens:,} targets, {tokens / (now - self._began):,.0f}/s"
        sys.stderr.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
