"""Mixture-of-Recursions, a recursive and a vanilla transformer at equal training FLOPs.

    python scripts/mor_study.py --workdir=runs/mor_study
    python scripts/mor_study.py --workdir=runs/mor_study --step-time

The first trains `configs/mor_study.py:<name>` for every name and seed, and writes the table, the
figure, the depths of a held-out text and docs/results/mor.md. Finished runs are not run again, so
an interrupted study goes on. The second measures a step with a router against one without, and
leaves the numbers for the page in the workdir.
"""

import argparse
import copy
import dataclasses
import json
import time
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import jax
import numpy as np
from flax import nnx
from result_page import markdown_table, new_figure, save_figure, write_page

from effattn.batch import Batch, whole_rows
from effattn.commands.run_directory import open_run, tokenizer_of
from effattn.config import load_config
from effattn.configs.mor_study import NAMES
from effattn.data.pipeline import open_dataset
from effattn.data.tokenizer import ByteTokenizer
from effattn.experiment import Experiment
from effattn.inspection import draw, inspect, word_starts
from effattn.models.mor import MoRConfig, mode_gap
from effattn.nn.mixer import state_bytes
from effattn.train.flops import training_flops
from effattn.train.loop import train
from effattn.train.metrics import read_lines
from effattn.train.optimizer import make_optimizer
from effattn.train.schedule import make_schedule
from effattn.train.state import abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step
from effattn.versions import provenance

WORDS = {
    "vanilla": "vanilla, 8 layers",
    "recursive": "recursive, 2 + 2 x 3",
    "expert": "expert choice",
    "token": "token choice",
}
GAP_BATCHES = 8
DRAWN_BYTES = 1000
# A stack whose shared layers are most of it, as in the published sizes.
STEP_MODEL = MoRConfig(num_layers=14, width=192, num_heads=4, num_kv_heads=None)
STEP_BATCH, STEP_LEN, STEP_REPEATS = 8, 256, 10

PAGE = """\
# Mixture-of-Recursions at equal training FLOPs

![training loss against training FLOPs]({picture})

Python's standard library, byte by byte; width {width}, {flops:.1e} FLOPs of training for each
(`configs/mor_study.py`), Muon, batches of {batch} rows of {seq_len} bytes. The recursive model and
the two with routers have the same layers: a private first and last one, and two shared ones that
run three times. Expert choice takes 1, 2/3 and 1/3 of a row's tokens, decided in evaluation by the
sign of each token's own logit. Bits per byte on the held-out files, by seed {seeds}; gap: what the
causal mode of evaluation loses against the top-k of training, nats per byte, on {gap_batches}
held-out batches; recursions: their mean number per byte; state: bytes that decoding keeps for a
row of {seq_len}, float32, where every recursion has room for every token.

{table}

{step_time}

## How deep the bytes go

![a held-out text, coloured by depth]({depth_picture})

{depth_words}

{made}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/mor_study"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/mor.md"))
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="default: the configs'; another table of runs")
    parser.add_argument("--step-time", action="store_true", help="measure steps, train nothing")
    arguments = parser.parse_args()
    if arguments.step_time:
        found = step_times()
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        (arguments.workdir / "step_time.json").write_text(json.dumps(found, indent=2) + "\n")
        print(told(found))
        return

    command = f"python scripts/mor_study.py --seeds {' '.join(map(str, arguments.seeds))}"
    if arguments.steps is not None:
        command += f" --steps {arguments.steps}"
    found = {}
    for name in arguments.names:
        points = []
        for seed in arguments.seeds:
            experiment = load_config(f"mor_study:{name}")
            experiment.train.seed = seed
            run = arguments.workdir / f"{name}_{seed}"
            if arguments.steps is not None:
                experiment.train.steps = arguments.steps
                run = run.with_name(f"{run.name}_{arguments.steps}")
            result = train(experiment, run)
            if result["status"] != "finished":
                raise SystemExit("stopped; the same command goes on")
            points.append(measure(experiment, run, result))
        found[name] = points
        print(f"{name}: {points}", flush=True)
    write(found, arguments, provenance(command))


# ---- a run


def measure(experiment: Experiment, run: Path, result: dict[str, Any]) -> dict[str, Any]:
    opened, data = open_run(str(run), None), experiment.data
    batches = list(islice(open_dataset(data).evaluation_batches("validation"), GAP_BATCHES))
    gap, depth = None, float(experiment.model.num_recursions)
    if experiment.model.routing != "none":
        graphdef, params = nnx.split(opened.model)

        @jax.jit
        def both(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            depths = model.depths(batch.tokens, batch.info)
            return mode_gap(model, batch), depths.sum() / batch.info.valid.sum()

        pairs = [jax.device_get(both(params, batch)) for batch in batches]
        gap, depth = (float(np.mean(column)) for column in zip(*pairs, strict=True))
    cost = result["flops_per_token"] * data.batch_size * data.seq_len
    lines = read_lines(run / "metrics.jsonl")
    return {
        "run": str(run),
        "parameters": result["parameters"],
        "steps": experiment.train.steps,
        "flops": cost * experiment.train.steps,
        "bits_per_byte": result["validation"]["bits_per_byte"],
        "gap": gap,
        "depth": depth,
        "state": state_bytes(opened.model, 1, data.seq_len, np.float32),
        "curve": [(cost * line["step"], line["loss"]) for line in lines],
        "agreement": lines[-1].get("recursion_2_agreement"),
    }


def depths_of_words(run: str, page: Path) -> tuple[str, str]:
    """(the picture of a held-out text's depths beside the page, a sentence on words)."""
    opened = open_run(run, None)
    corpus: Any = open_dataset(opened.experiment.data).parts[0]
    tokens = np.asarray(corpus.tokens["validation"])
    start = int(np.flatnonzero(tokens == ByteTokenizer.end_of_document)[0]) + 1
    codes = tokens[start:][:DRAWN_BYTES]
    text = codes[codes < 256].astype(np.uint8).tobytes()
    tokenizer = tokenizer_of(opened.experiment.data, opened.vocab_size)
    assert tokenizer is not None
    inspection = inspect(opened.model, text, tokenizer)
    picture = page.with_name(f"{page.stem}_depth.png")
    save_figure(draw(inspection), picture)
    depths, starts = inspection.pictures[0].groups, word_starts(text)
    return picture.name, (
        f"Expert choice on {len(text):,} held-out bytes: {np.mean(depths[starts]):.2f} recursions "
        f"on the first bytes of words, {np.mean(depths[~starts]):.2f} on the others."
    )


# ---- the step's time


def step_times() -> dict[str, Any]:
    """Seconds of a training step, clock and CPU, with expert choice at shares of 1, 2/3, 1/3 and
    without a router, in turns; the least of several, because other work only ever adds."""
    models = {"expert": STEP_MODEL, "recursive": dataclasses.replace(STEP_MODEL, routing="none")}
    runs = {name: prepared(model) for name, model in models.items()}
    clock: dict[str, list[float]] = {name: [] for name in models}
    cpu: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(STEP_REPEATS + 1):
        for name, run in runs.items():
            began = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first compiles
                clock[name].append(time.perf_counter() - began[0])
                cpu[name].append(time.process_time() - began[1])
    flops = [
        training_flops(model, vocab_size=ByteTokenizer.vocab_size, seq_len=STEP_LEN) or 0.0
        for model in (models["recursive"], models["expert"])
    ]
    return {
        "layers": STEP_MODEL.layout().num_layers,
        "width": STEP_MODEL.width,
        "clock": {name: [min(times), median(times)] for name, times in clock.items()},
        "cpu": {name: [min(times), median(times)] for name, times in cpu.items()},
        "flops_ratio": flops[0] / flops[1],
        "made": provenance("python scripts/mor_study.py --step-time"),
    }


def prepared(model: MoRConfig) -> Any:
    """A function that takes one training step of the model on a random batch."""
    experiment = Experiment(model=copy.deepcopy(model))
    abstract = abstract_model(experiment, ByteTokenizer.vocab_size)
    schedule = make_schedule(
        experiment.optimizer, steps=1000, batch_size=STEP_BATCH, seq_len=STEP_LEN
    )
    optimizer = make_optimizer(experiment.optimizer, abstract.axes, schedule)
    mesh = experiment.mesh.build()
    tokens = np.random.default_rng(0).integers(0, 256, (STEP_BATCH, STEP_LEN), dtype=np.int32)
    ones = np.ones(tokens.shape, np.float32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), ones, jax.device_get(whole_rows(tokens)))
    with jax.set_mesh(mesh):
        init, placed, _ = build_state(abstract, optimizer, mesh)
        step = make_train_step(
            abstract.graphdef, optimizer, schedule, shardings=shardings_of(placed)
        )
        state = init(jax.random.key(0))

    def run() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)

    return run


def told(found: dict[str, Any]) -> str:
    def ratios(kind: str) -> str:
        least, middle = (
            slow / fast
            for slow, fast in zip(found[kind]["recursive"], found[kind]["expert"], strict=True)
        )
        seconds = f"{found[kind]['recursive'][0]:.2f} s against {found[kind]['expert'][0]:.2f} s"
        return f"{least:.2f} times ({seconds}; {middle:.2f} by medians)"

    return (
        f"A training step of the recursive model takes {ratios('clock')} as long as one of expert "
        f"choice by the clock and {ratios('cpu')} in CPU seconds, least of {STEP_REPEATS} in "
        f"turns; {found['flops_ratio']:.2f} times the FLOPs. {found['layers']} layers at full "
        f"depth, width {found['width']}, {STEP_BATCH} rows of {STEP_LEN} bytes, AdamW. "
        f"{found['made']}"
    )


# ---- the page


def write(found: dict[str, list[dict[str, Any]]], arguments: Any, made: str) -> None:
    page: Path = arguments.page
    header = ["model", "parameters", "steps", "bits per byte", "gap", "recursions", "state, bytes"]
    rows = []
    for name, points in found.items():
        bits = ", ".join(f"{point['bits_per_byte']:.3f}" for point in points)
        gaps = [point["gap"] for point in points if point["gap"] is not None]
        rows.append(
            [
                WORDS[name],
                f"{points[0]['parameters']:,}",
                f"{points[0]['steps']:,}",
                bits,
                f"{mean(gaps):.4f}" if gaps else "",
                f"{mean(point['depth'] for point in points):.2f}",
                f"{points[0]['state']:,}",
            ]
        )
    picture, depth_picture, depth_words = page.with_suffix(".png"), "", ""
    save_figure(drawn(found), picture)
    if "expert" in found:
        depth_picture, depth_words = depths_of_words(found["expert"][0]["run"], page)
    step_time = arguments.workdir / "step_time.json"
    experiment = load_config(f"mor_study:{arguments.names[0]}")
    write_page(
        page,
        PAGE.format(
            picture=picture.name,
            width=experiment.model.width,
            flops=next(iter(found.values()))[0]["flops"],
            batch=experiment.data.batch_size,
            seq_len=experiment.data.seq_len,
            seeds=", ".join(map(str, arguments.seeds)),
            gap_batches=GAP_BATCHES,
            table=markdown_table(header, rows),
            step_time=told(json.loads(step_time.read_text())) if step_time.exists() else "",
            depth_picture=depth_picture,
            depth_words=depth_words,
            made=made,
        ),
    )


def drawn(found: dict[str, list[dict[str, Any]]]) -> Any:
    figure, axes = new_figure()
    for name, points in found.items():
        flops, losses = zip(*points[0]["curve"], strict=True)
        axes.plot(flops, losses, linewidth=0.9, label=WORDS[name])
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("training loss, nats per byte")
    axes.set_ylim(top=3.0)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
