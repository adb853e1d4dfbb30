"""Recall against the size of the state, BASED's Pareto curve in small: table, figure, page.

    python scripts/recall_curve.py --workdir=runs/recall

Trains `configs/recall.py:<layers>` for every entry of LAYERS and seed, and writes
docs/results/recall_curve.md and .png after each. Finished runs are not run again, so an interrupted
study goes on.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import jax.numpy as jnp
from flax import nnx
from result_page import markdown_table, new_figure, save_figure, write_page

from effattn.config import load_config
from effattn.experiment import Experiment
from effattn.nn.mixer import state_bytes
from effattn.train.loop import train
from effattn.versions import provenance

LAYERS = {
    "plain linear (elu)": ["elu8", "elu16", "elu32"],
    "Taylor": ["taylor2", "taylor4", "taylor8"],
    "window": ["window16", "window32"],
    "attention": ["attention"],
    "Taylor and a window, 600 steps": ["taylor2+window32"],
}
PAGE = """\
# Recall against the size of the state

![accuracy against state bytes]({picture})

Associative recall (MQAR, Arora et al. 2023): {pairs} key-value pairs, then each key once more, at
T = {seq_len} and a vocabulary of {vocab_size}. A short convolution, then the table's layers, at
width {width} with one head; Muon, {batch_size} rows a step. Accuracy: share of {questions:,}
held-out questions answered right. Naming any value of the row gives {one_of_row:.3f}, any value at
all {one_of_all:.3f}. State: bytes that decoding keeps for one row after T tokens, all in float32,
{conv_bytes:,} of them the convolution's.
`taylorN`, `eluN`: linear attention over N channels of query and key; `windowN`: attention to the
token itself and N to its left.

{table}

{made}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/recall")
    parser.add_argument("--page", default="docs/results/recall_curve.md")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--families", nargs="+", choices=LAYERS, default=list(LAYERS))
    arguments = parser.parse_args()

    command = f"python scripts/recall_curve.py --seeds {' '.join(map(str, arguments.seeds))}"
    found: list[dict[str, Any]] = []
    for family in arguments.families:
        for layers in LAYERS[family]:
            point = {"family": family, "layers": layers, "accuracies": []}
            found.append(point)
            for seed in arguments.seeds:
                experiment = load_config(f"recall:{layers}")
                experiment.train.seed = seed
                point |= sizes(experiment) | {"steps": experiment.train.steps}
                result = train(experiment, Path(arguments.workdir) / f"{layers}_{seed}")
                if result["status"] != "finished":
                    raise SystemExit("stopped; the same command goes on")
                point["accuracies"].append(result["validation"]["accuracy"])
            print(f"{layers}: {point['accuracies']}", flush=True)
            write(found, Path(arguments.page), provenance(command), experiment)


def sizes(experiment: Experiment) -> dict[str, int]:
    """Bytes of one row's state after a whole row, of all layers and of the convolution in them."""

    def of(model: Any) -> int:
        built = nnx.eval_shape(
            lambda: model.build(vocab_size=experiment.data.vocab_size, rngs=nnx.Rngs(0))
        )
        return state_bytes(built, 1, experiment.data.seq_len, jnp.float32)

    whole = of(experiment.model)
    first = type(experiment.model)(num_layers=1, width=experiment.model.width, pattern=("conv",))
    return {"bytes": whole, "conv_bytes": of(first)}


def write(found: list[dict[str, Any]], page: Path, made: str, experiment: Experiment) -> None:
    data = experiment.data
    header = ["layers after the convolution", "state, bytes", "steps", "accuracy by seed", "mean"]
    rows = [
        [
            f"`{point['layers']}`",
            f"{point['bytes']:,}",
            str(point["steps"]),
            ", ".join(f"{accuracy:.4f}" for accuracy in point["accuracies"]),
            f"{mean(point['accuracies']):.4f}",
        ]
        for point in found
    ]
    picture = page.with_suffix(".png")
    save_figure(draw(found), picture)
    write_page(
        page,
        PAGE.format(
            picture=picture.name,
            pairs=data.num_pairs,
            seq_len=data.seq_len,
            vocab_size=data.vocab_size,
            width=experiment.model.width,
            batch_size=data.batch_size,
            questions=data.validation_examples * data.num_pairs,
            one_of_row=1 / data.num_pairs,
            one_of_all=2 / data.vocab_size,
            conv_bytes=found[0]["conv_bytes"],
            table=markdown_table(header, rows),
            made=made,
        ),
    )


def draw(found: list[dict[str, Any]]) -> Any:
    figure, axes = new_figure()
    for family in dict.fromkeys(point["family"] for point in found):
        points = [point for point in found if point["family"] == family]
        x = [point["bytes"] for point in points]
        axes.plot(x, [mean(point["accuracies"]) for point in points], marker="o", label=family)
        for point in points:
            axes.plot(
                [point["bytes"]] * len(point["accuracies"]), point["accuracies"], "k.", markersize=2
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}")
    axes.set_xlabel("state after T tokens, KiB per row")
    axes.set_ylabel("recall accuracy")
    axes.set_ylim(0, 1.03)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
