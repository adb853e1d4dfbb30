"""Does a recurrent model gain by reading twice, or by layers that see ahead? Table, figure, page.

    python scripts/read_twice_study.py --workdir=runs/read_twice

Trains `configs/read_twice.py:<reading>` for every reading and seed, scores the two orders of the
sets apart, and writes docs/results/read_twice.md and .png after each. Finished runs are not run
again, so an interrupted study goes on.
"""

import argparse
import dataclasses
from pathlib import Path
from statistics import mean
from typing import Any

import jax.numpy as jnp
from flax import nnx
from result_page import markdown_table, new_figure, save_figure, write_page

from effattn.commands.run_directory import open_run
from effattn.config import load_config
from effattn.data.pipeline import open_dataset
from effattn.evaluate import evaluate
from effattn.experiment import Experiment
from effattn.nn.mixer import state_bytes
from effattn.train.loop import train
from effattn.versions import provenance

READINGS = ["once2", "twice2", "prefix2"]
WORDS = {"once": "read once", "twice": "read twice", "prefix": "once, prefix layers"}
ORDERS = ("short first", "long first")

PAGE = """\
# Reading twice: which token do two sets share?

![accuracy by order of the sets]({picture})

Set disjointness (Arora et al. 2024, "Just read twice"): a set of {small} tokens and one of {large},
in either order, have one token in common, to be named at the end. Both are drawn from one alphabet
of {alphabet} (`data.set_halves=False`): with an alphabet for each set, as in the authors' code, the
common token stands out as a stranger in the larger set, and nothing need be remembered.

A short convolution and three layers of Taylor linear attention, width {width}, one head over N
channels of query and key and {head_dim} of the value. `onceN` reads the sets in order; `twiceN` two
times over; `prefixN` once, by layers that see the whole row ahead (JRT-RNN). {steps} steps of Muon
over {batch_size} rows, half of them in either order. Accuracy on {examples:,} held-out rows of each
order; naming any token of the small set gives {one_of_small:.3f}. State: bytes that decoding keeps
for one row, float32.

{table}

{made}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/read_twice")
    parser.add_argument("--page", default="docs/results/read_twice.md")
    parser.add_argument("--readings", nargs="+", default=READINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: the config's; another table of runs")
    arguments = parser.parse_args()

    command = f"python scripts/read_twice_study.py --seeds {' '.join(map(str, arguments.seeds))}"
    if arguments.steps is not None:
        command += f" --steps {arguments.steps}"
    found: list[dict[str, Any]] = []
    for reading in arguments.readings:
        point: dict[str, Any] = {"reading": reading, "accuracies": []}
        found.append(point)
        for seed in arguments.seeds:
            experiment = load_config(f"read_twice:{reading}")
            experiment.train.seed = seed
            run = Path(arguments.workdir) / f"{reading}_{seed}"
            if arguments.steps is not None:
                experiment.train.steps = arguments.steps
                run = run.with_name(f"{run.name}_{arguments.steps}")
            if train(experiment, run)["status"] != "finished":
                raise SystemExit("stopped; the same command goes on")
            point["accuracies"].append(by_order(run))
        point["bytes"] = size(experiment)
        print(f"{reading}: {point['accuracies']}", flush=True)
        write(found, Path(arguments.page), provenance(command), experiment)


def by_order(run: Path) -> tuple[float, ...]:
    """Accuracy on held-out rows of each order in ORDERS alone."""
    opened = open_run(str(run), None)
    data = opened.experiment.data
    first, second = sorted(data.set_sizes)[0], sorted(data.set_sizes)[-1]
    datasets = [
        open_dataset(dataclasses.replace(data, set_sizes=sizes))
        for sizes in ((first, second), (second, first))
    ]
    return tuple(evaluate(opened.model, dataset).accuracy for dataset in datasets)


def size(experiment: Experiment) -> int:
    """Bytes of one row's state while decoding, the convolution's two tokens among them."""
    data = experiment.data
    vocab_size = data.vocab_size
    model = nnx.eval_shape(lambda: experiment.model.build(vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    return state_bytes(model, 1, data.seq_len, jnp.float32)


def write(found: list[dict[str, Any]], page: Path, made: str, experiment: Experiment) -> None:
    data = experiment.data
    header = ["reading", "state, bytes"]
    header += [f"{order}, by seed" for order in ORDERS] + [f"{order}, mean" for order in ORDERS]
    rows = [
        [
            f"`{point['reading']}`",
            f"{point['bytes']:,}",
            *(", ".join(f"{a[i]:.3f}" for a in point["accuracies"]) for i in range(2)),
            *(f"{mean(a[i] for a in point['accuracies']):.3f}" for i in range(2)),
        ]
        for point in found
    ]
    picture = page.with_suffix(".png")
    save_figure(draw(found), picture)
    write_page(
        page,
        PAGE.format(
            picture=picture.name,
            small=min(data.set_sizes),
            large=max(data.set_sizes),
            alphabet=data.vocab_size - 4,
            width=experiment.model.width,
            head_dim=experiment.model.head_dim,
            steps=experiment.train.steps,
            batch_size=data.batch_size,
            examples=data.validation_examples,
            one_of_small=1 / min(data.set_sizes),
            table=markdown_table(header, rows),
            made=made,
        ),
    )


def draw(found: list[dict[str, Any]]) -> Any:
    figure, axes = new_figure()
    for i, order in enumerate(ORDERS):
        places = [number + (i - 0.5) * 0.38 for number in range(len(found))]
        means = [mean(a[i] for a in point["accuracies"]) for point in found]
        axes.bar(places, means, width=0.36, label=order)
        for place, point in zip(places, found, strict=True):
            accuracies = [a[i] for a in point["accuracies"]]
            axes.plot([place] * len(accuracies), accuracies, "k.", markersize=3)
    labels = [
        f"{WORDS[point['reading'].rstrip('0123456789')]}\n{point['bytes']:,} bytes"
        for point in found
    ]
    axes.set_xticks(range(len(found)), labels, fontsize=7)
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=8, loc="upper right")
    return figure


if __name__ == "__main__":
    main()
