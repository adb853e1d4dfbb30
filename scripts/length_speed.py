"""Training speed against length: TransNormerLLM beside a transformer of the same size.

    python scripts/length_speed.py

Times whole training steps (forward, backward, update) of a fixed number of tokens, cut into rows of
1k to 16k, and writes docs/results/length_speed.md and .png. Repetitions go round all cases in turn,
because a shared machine's speed drifts, and are kept in the workdir: the same command goes on.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effattn.batch import Batch, whole_rows
from effattn.experiment import Experiment, OptimizerConfig
from effattn.models.lightning import LightningModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.parallel.mesh import MeshConfig
from effattn.plots import new_figure, save_figure
from effattn.train.loss import tile_length
from effattn.train.optimizer import make_optimizer
from effattn.train.schedule import make_schedule
from effattn.train.state import abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step
from effattn.versions import provenance

LENGTHS = (1024, 2048, 4096, 8192, 16384)
TOKENS = 16384
VOCAB_SIZE = 256
SIZES = {"num_layers": 2, "width": 128, "num_heads": 2}
# The widths of the MLPs make both as large: the gate of a lightning layer is a fifth matrix.
MODELS = {
    "lightning": LightningModelConfig(**SIZES, mlp_width=344, lrpe_layers=()),
    "transformer": TransformerConfig(**SIZES, mlp_width=384),
}


class Case:
    """One model at one length: its compiled step, its state and its batch."""

    def __init__(self, name: str, length: int) -> None:
        experiment = Experiment(model=MODELS[name], optimizer=OptimizerConfig(warmup_steps=0))
        mesh = MeshConfig().build()
        model = abstract_model(experiment, VOCAB_SIZE)
        rows = TOKENS // length
        schedule = make_schedule(experiment.optimizer, steps=1000, batch_size=rows, seq_len=length)
        optimizer = make_optimizer(experiment.optimizer, model.axes, schedule)
        init, abstract, _ = build_state(model, optimizer, mesh)
        step = make_train_step(
            model.graphdef,
            optimizer,
            schedule,
            shardings=shardings_of(abstract),
            tile=tile_length(batch=rows, seq_len=length, vocab_size=VOCAB_SIZE),
        )
        tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(rows, length), dtype=np.int32)
        weights = np.ones(tokens.shape, np.float32)
        info = jax.tree.map(np.asarray, whole_rows(tokens))
        self.batch = Batch(tokens, np.roll(tokens, -1, 1), weights, info)
        self.num_parameters = model.num_parameters
        with jax.set_mesh(mesh):
            self.state = init(jax.random.key(0))
            self.step = step.lower(self.state, self.batch).compile()
        self.temporary = self.step.memory_analysis().temp_size_in_bytes

    def seconds(self) -> tuple[float, float]:
        """Of one step, to the end of its update: on the clock, and of all cores together."""
        start = time.perf_counter(), time.process_time()
        self.state, _ = jax.block_until_ready(self.step(self.state, self.batch))
        return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(repeats: int, record: Path) -> dict[str, Any]:
    """The record of all cases, each with `repeats` times; goes on from what is on disk."""
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    wanted = [(name, length) for name in MODELS for length in LENGTHS]
    cases = {}
    for name, length in wanted:
        entry = found.setdefault(f"{name} {length}", {"seconds": [], "cpu_seconds": []})
        if len(entry["seconds"]) < repeats:
            case = cases[name, length] = Case(name, length)
            entry |= {"parameters": case.num_parameters, "temporary_bytes": case.temporary}
            case.seconds()  # the first step touches new memory
            print(f"{name} {length}: compiled", flush=True)
    for repeat in range(repeats):
        for (name, length), case in cases.items():
            entry = found[f"{name} {length}"]
            if len(entry["seconds"]) <= repeat:
                wall, cpu = case.seconds()
                entry["seconds"].append(wall)
                entry["cpu_seconds"].append(cpu)
                record.write_text(json.dumps(found, indent=1))
                print(f"{name} {length}: {wall:.2f} s, {cpu:.2f} s of the cores", flush=True)
    return found


def speeds(found: dict[str, Any], name: str, clock: str = "seconds") -> list[float]:
    """Tokens per second of the fastest step at each length."""
    return [TOKENS / min(found[f"{name} {length}"][clock]) for length in LENGTHS]


PAGE = """\
# Training speed against length

TransNormerLLM beside a transformer, {layers} layers of width {width} with {heads} heads, of
{lightning} and {transformer} parameters, in float32. A step is forward, backward and AdamW's update
of {tokens} tokens, cut into rows of the length given. The fastest of {repeats} steps counts; the
steps of all cases were taken in turn. Time of the cores (both added up) depends less than the clock
on what else a shared machine does.

![tokens per second against length](length_speed.png)

| tokens per second | {lengths} | slowest / fastest |
|---|{rule}---:|
{rows}
{core_rows}

| temporary memory, MiB | {lengths} |
|---|{rule}
{memory}

{law}

{provenance}
"""


def write_page(found: dict[str, Any], repeats: int, folder: Path) -> None:
    heads = " | ".join(f"{length // 1024}k" for length in LENGTHS)
    memory, ratios = [], {}
    rows: dict[str, list[str]] = {"seconds": [], "cpu_seconds": []}
    figure, axes = new_figure("tokens per row", "tokens per second")
    for name in MODELS:
        for clock, lines in rows.items():
            rates = speeds(found, name, clock)
            ratios[name, clock] = min(rates) / max(rates)
            label = name if clock == "seconds" else f"{name}, of the cores"
            cells = " | ".join(f"{rate:,.0f}" for rate in rates)
            lines.append(f"| {label} | {cells} | {ratios[name, clock]:.2f} |")
            style = "-" if clock == "seconds" else ":"
            axes.plot(LENGTHS, rates, marker="o", label=label, linestyle=style)
        sizes = (found[f"{name} {length}"]["temporary_bytes"] / 2**20 for length in LENGTHS)
        memory.append(f"| {name} | {' | '.join(f'{size:.0f}' for size in sizes)} |")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend()
    save_figure(figure, folder / "length_speed.png")
    last = speeds(found, "lightning")[-1] / speeds(found, "transformer")[-1]
    law = (
        f"Lightning's slowest length has {ratios['lightning', 'seconds']:.0%} of the speed of its "
        f"fastest by the clock and {ratios['lightning', 'cpu_seconds']:.0%} by the time of the "
        f"cores; the transformer's {ratios['transformer', 'seconds']:.0%} and "
        f"{ratios['transformer', 'cpu_seconds']:.0%}. At 16k Lightning trains {last:.1f} times as "
        "fast."
    )
    parameters = {name: f"{found[f'{name} {LENGTHS[0]}']['parameters']:,}" for name in MODELS}
    page = PAGE.format(
        layers=SIZES["num_layers"], width=SIZES["width"], heads=SIZES["num_heads"], **parameters,
        tokens=f"{TOKENS:,}", repeats=repeats, lengths=heads, rule="---:|" * len(LENGTHS),
        rows="\n".join(rows["seconds"]), core_rows="\n".join(rows["cpu_seconds"]),
        memory="\n".join(memory), law=law,
        provenance=provenance("python scripts/length_speed.py"),
    )  # fmt: skip
    (folder / "length_speed.md").write_text(page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/length_speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", default="docs/results")
    arguments = parser.parse_args()
    work, results = Path(arguments.workdir), Path(arguments.results)
    for folder in (work, results):
        folder.mkdir(parents=True, exist_ok=True)
    found = measure(arguments.repeats, work / "times.json")
    write_page(found, arguments.repeats, results)


if __name__ == "__main__":
    main()
