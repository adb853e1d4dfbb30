"""ParScale: loss against the number of streams at fixed parameters. Table, figure, page.

    python scripts/parscale_study.py --workdir=runs/parscale_study

Trains `configs/parscale_stdlib.py:<P>`, shortened, for every P and seed, fits the loss by ln P and
writes docs/results/parscale.md and .png after each run. Finished runs are not run again, so an
interrupted study goes on.
"""

import argparse
import math
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from result_page import markdown_table, new_figure, save_figure, write_page

from effattn.config import load_config
from effattn.train.flops import forward_flops
from effattn.train.loop import train
from effattn.versions import provenance

VOCAB_SIZE = 257
# Chen et al. 2025, fitted to code: the exponent of the loss in N (1 + k ln P), and k.
ALPHA, PUBLISHED_K = 0.18937, 0.39346

PAGE = """\
# ParScale: loss against the number of streams

![bits per byte by streams]({picture})

One decoder, {base:,} parameters ({layers} layers of width {width}: short convolutions, Taylor
linear attention, a window), read by P streams at once (Chen et al. 2025). The streams differ in
what a document starts from, {prefix} learned keys and values per attention layer or what these
leave in a linear layer's sums; a perceptron joins them. All runs of a seed see the same {tokens:,}
bytes of the standard library, {steps} steps of Muon over {batch_size} rows of {seq_len}. Bits per
byte on all held-out files.

{table}

{fit}

{made}
"""

FIT = """\
Least squares, all runs: bits per byte = {a:.4f} {b:+.4f} ln P (the line; it misses the points by
{rms:.4f} rms). Doubling the streams changes {doubling:+.4f} bits per byte.

The paper's law, L = E + (A / (N (1 + k ln P)))^alpha, has four constants, of which runs of one
size N cannot tell E, A and alpha apart: near P = 1 its slope in ln P is -alpha k (L(1) - E), one
number. With alpha = {alpha} of the paper's fit to code and E = 0 the curve drawn has k = {k:.2f};
the paper's k there is {published:.2f}, with E > 0. {equal}"""

HELPS = """\
Any E > 0 asks for a larger k, so this is the least that explains the points. By the curve
P = {largest} is worth {times:.2f} times the parameters, for {largest} times the computation."""


class Fit(NamedTuple):
    """bits = intercept + slope ln P, missed by rms; bits = first (1 + k ln P)^-ALPHA."""

    intercept: float
    slope: float
    rms: float
    k: float
    first: float


def fit(points: list[tuple[int, float]]) -> Fit | None:
    """Of (streams, bits per byte); None where all have one number of streams."""
    if len({streams for streams, _ in points}) < 2:
        return None
    logs = np.log([streams for streams, _ in points])
    bits = np.array([value for _, value in points])
    matrix = np.stack([np.ones_like(logs), logs], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(matrix, bits)
    rms = float(np.sqrt(np.mean(np.square(matrix @ (intercept, slope) - bits))))

    # The scale of a given k is in closed form, so one grid is enough. A loss that rises with P has
    # k < 0, down to where the logarithm of the largest P takes all parameters away.
    grid = np.arange(-0.9 / max(logs.max(), 1e-9), 20, 1e-3)
    shapes = (1 + grid[:, None] * logs) ** -ALPHA
    scales = shapes @ bits / np.sum(np.square(shapes), axis=1)
    best = int(np.argmin(np.sum(np.square(scales[:, None] * shapes - bits), axis=1)))
    return Fit(float(intercept), float(slope), rms, float(grid[best]), float(scales[best]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/parscale_study")
    parser.add_argument("--page", default="docs/results/parscale.md")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=350)
    arguments = parser.parse_args()

    words = (
        f"--streams {' '.join(map(str, arguments.streams))}",
        f"--seeds {' '.join(map(str, arguments.seeds))} --steps {arguments.steps}",
    )
    made = provenance(f"python scripts/parscale_study.py {' '.join(words)}")
    found: dict[int, dict[str, Any]] = {}
    for seed in arguments.seeds:
        for streams in arguments.streams:
            experiment = shortened(streams, seed, arguments.steps)
            run = Path(arguments.workdir) / f"{streams}_{seed}_{arguments.steps}"
            result = train(experiment, run)
            if result["status"] != "finished":
                raise SystemExit("stopped; the same command goes on")
            point = found.setdefault(streams, {"streams": streams, "bits": []})
            point["bits"].append(result["validation"]["bits_per_byte"])
            point["parameters"] = result["parameters"]
            print(f"{streams} streams, seed {seed}: {point['bits'][-1]:.4f}", flush=True)
            ordered = [found[number] for number in sorted(found)]
            write(ordered, Path(arguments.page), made, experiment)


def shortened(streams: int, seed: int, steps: int) -> Any:
    """parscale_stdlib in rows half as long, for a study of a few CPU minutes a run."""
    experiment = load_config(f"parscale_stdlib:{streams}")
    experiment.data.seq_len = 128
    experiment.train.seed, experiment.train.steps = seed, steps
    experiment.train.checkpoint_every = None
    experiment.train.tensorboard = False
    return experiment


def write(found: list[dict[str, Any]], page: Path, made: str, experiment: Any) -> None:
    """found: per number of streams, `parameters` and the `bits` per byte by seed."""
    data, base = experiment.data, experiment.model.base
    points = [(point["streams"], bits) for point in found for bits in point["bits"]]
    law = fit(points)
    header = ["P", "parameters", "forward FLOPs per byte", "bits per byte, by seed", "mean"]
    rows = [
        [
            str(point["streams"]),
            f"{point['parameters']:,}",
            f"{flops(point['streams'], data.seq_len):,.0f}",
            ", ".join(f"{bits:.4f}" for bits in point["bits"]),
            f"{mean(point['bits']):.4f}",
        ]
        for point in found
    ]
    text = "One number of streams alone: no fit."
    if law is not None:
        equal = "The loss does not fall with P in these runs."
        if law.k > 0:
            largest = max(point["streams"] for point in found)
            equal = HELPS.format(largest=largest, times=1 + law.k * math.log(largest))
        text = FIT.format(
            a=law.intercept,
            b=law.slope,
            rms=law.rms,
            doubling=law.slope * math.log(2),
            alpha=ALPHA,
            k=law.k,
            published=PUBLISHED_K,
            equal=equal,
        )
    picture = page.with_suffix(".png")
    save_figure(draw(found, law), picture)
    write_page(
        page,
        PAGE.format(
            picture=picture.name,
            base=num_parameters(base),
            layers=base.num_layers,
            width=base.width,
            prefix=load_config("parscale_stdlib").model.prefix_length,
            tokens=experiment.train.steps * data.batch_size * data.seq_len,
            steps=experiment.train.steps,
            batch_size=data.batch_size,
            seq_len=data.seq_len,
            table=markdown_table(header, rows),
            fit=text,
            made=made,
        ),
    )


def flops(streams: int, seq_len: int) -> float:
    config = load_config(f"parscale_stdlib:{streams}").model
    count = forward_flops(config, vocab_size=VOCAB_SIZE, seq_len=seq_len)
    assert count is not None  # the base is counted
    return count


def num_parameters(base: Any) -> int:
    """How many parameters a model of this config has."""
    model = nnx.eval_shape(lambda: base.build(vocab_size=VOCAB_SIZE, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def draw(found: list[dict[str, Any]], law: Fit | None) -> Any:
    figure, axes = new_figure()
    for point in found:
        axes.plot([point["streams"]] * len(point["bits"]), point["bits"], "k.", markersize=5)
    if law is not None:
        streams = np.geomspace(1, max(point["streams"] for point in found), 100)
        logs = np.log(streams)
        axes.plot(streams, law.intercept + law.slope * logs, label=f"{law.slope:+.3f} ln P")
        curve = law.first * (1 + law.k * logs) ** -ALPHA
        axes.plot(streams, curve, "--", label=f"(1 + {law.k:.2f} ln P)^-{ALPHA:.3f}")
        axes.legend(fontsize=8)
    numbers = [point["streams"] for point in found]
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.set_xlabel("streams P")
    axes.set_ylabel("bits per byte, held out")
    return figure


if __name__ == "__main__":
    main()
