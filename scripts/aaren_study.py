"""Aaren beside a causal transformer on two tasks: to name a digit, and to go on with a recording.

    python scripts/aaren_study.py

Writes docs/results/aaren.md and .png. Runs that are finished are not run again, so an interrupted
study goes on. Both models are one stack of pre-norm blocks over the same inputs, and differ in the
mixer alone. Source of the comparison: Feng et al. 2024 (arXiv 2405.13956).
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from effattn.batch import whole_rows
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.layers import MLP, LayerNorm
from effattn.nn.mixer import state_bytes
from effattn.nn.mixers.aaren import AarenConfig
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.param import Dense, normal
from effattn.plots import new_figure, save_figure
from effattn.versions import provenance

LAYERS, WIDTH, HEADS = 3, 64, 4
MIXERS = {
    "aaren": AarenConfig(num_heads=HEADS),
    # Without rotary positions: both read the same sinusoids, added to the inputs.
    "attention": AttentionConfig(num_heads=HEADS, rotary_dim=0),
}
LENGTHS = (64, 1024, 16384)  # of the table of memory


@dataclasses.dataclass(frozen=True)
class Task:
    """inputs: float32 [examples, seq_len, channels]; answers: classes [examples], or values
    [examples, outputs] that are to be met in the mean square. The last rows are held out."""

    inputs: np.ndarray
    answers: np.ndarray
    held_out: int
    outputs: int
    classes: bool
    steps: int
    # What a forecast without a model gets: the last value, again and again.
    naive: float | None = None


def digits() -> Task:
    """scikit-learn's 1,797 digits, pixel by pixel: 64 tokens of one intensity; 400 held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = (found.data[order] / 8 - 1).astype(np.float32)[..., None]
    return Task(pixels, found.target[order].astype(np.int32), 400, 10, True, steps=400)


def membrane(past: int = 96, future: int = 16) -> Task:
    """The potential of a cell's membrane, 12,000 values that matplotlib ships as a sample.

    From `past` values to the `future` next ones, all relative to the last one seen and in units of
    the standard deviation. The last fifth of the recording is held out.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "membrane.dat"
    recording = np.fromfile(path, np.float32)
    recording = (recording - recording.mean()) / recording.std()
    cut = len(recording) * 4 // 5

    def windows(values: np.ndarray, stride: int) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(values, past + future)[::stride]

    held_out = windows(recording[cut:], 4)
    rows = np.concatenate([windows(recording[:cut], 1), held_out])
    rows = rows - rows[:, past - 1 : past]
    naive = float(np.mean(rows[-len(held_out) :, past:] ** 2))
    inputs = rows[:, :past, None]
    return Task(inputs, rows[:, past:], len(held_out), future, False, steps=200, naive=naive)


TASKS = {"digits": digits, "membrane": membrane}


class Reader(nnx.Module):
    """Inputs and sinusoids, a stack of blocks, and an answer from the last token."""

    def __init__(self, mixer: Any, channels: int, outputs: int, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}

        def norm(rngs: nnx.Rngs) -> LayerNorm:
            return LayerNorm(WIDTH, eps=1e-5, dtype=jnp.float32, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mlp = MLP(
                WIDTH, 4 * WIDTH, activation=jax.nn.relu, use_bias=True,
                init_std=WIDTH**-0.5, out_init_std=0.02, dtype=jnp.float32, rngs=rngs,
            )  # fmt: skip
            built = dataclasses.replace(mixer, init_std=WIDTH**-0.5, out_init_std=0.02)
            return Block(built.build(WIDTH, rngs=rngs), mlp, norm(rngs), norm(rngs))

        wide = normal(WIDTH**-0.5)
        self.embed = Dense(
            channels, WIDTH, ("embed", None), init=normal(1), use_bias=True, **options
        )
        self.stack = Stack(("block",) * LAYERS, block, rngs=rngs)
        self.norm = norm(rngs)
        self.head = Dense(WIDTH, outputs, ("embed", None), init=wide, use_bias=True, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[batch, seq_len, channels] -> [batch, outputs]."""
        seq_len = inputs.shape[1]
        x = self.embed(inputs) + sinusoids(seq_len)
        x, _ = self.stack(x, whole_rows(inputs))
        return self.head(self.norm(x[:, -1]))


def sinusoids(seq_len: int) -> jax.Array:
    """[seq_len, WIDTH], the position embedding of Vaswani et al. 2017."""
    rates = 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    angles = np.arange(seq_len)[:, None] * rates
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


def build(name: str, task: Task, seed: int) -> Reader:
    with nnx.use_eager_sharding(False):
        return Reader(MIXERS[name], task.inputs.shape[2], task.outputs, nnx.Rngs(seed))


def batches(task: Task, seed: int, size: int) -> Iterator[np.ndarray]:
    """Row numbers of training batches, in a new order in every epoch."""
    rng, rows = np.random.default_rng(seed), len(task.inputs) - task.held_out
    while True:
        order = rng.permutation(rows)
        yield from order[: rows - rows % size].reshape(-1, size)


def fit(name: str, task: Task, seed: int, batch_size: int = 32) -> dict[str, Any]:
    """Trains and scores the held-out rows: accuracy of classes, mean square error of values."""
    graphdef, params = nnx.split(build(name, task, seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 50, task.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def objective(params: Any, inputs: jax.Array, answers: jax.Array) -> jax.Array:
        out = nnx.merge(graphdef, params)(inputs)
        if task.classes:
            return optax.softmax_cross_entropy_with_integer_labels(out, answers).mean()
        return jnp.mean((out - answers) ** 2)

    @jax.jit
    def step(params: Any, state: Any, inputs: jax.Array, answers: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(objective)(params, inputs, answers)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, started = optimizer.init(params), time.time()
    for _, rows in zip(range(task.steps), batches(task, seed, batch_size), strict=False):
        params, state, loss = step(params, state, task.inputs[rows], task.answers[rows])
    out = jax.jit(lambda params, inputs: nnx.merge(graphdef, params)(inputs))(
        params, task.inputs[-task.held_out :]
    )
    answers = task.answers[-task.held_out :]
    score = np.mean(np.argmax(out, -1) == answers if task.classes else (out - answers) ** 2)
    return {"score": float(score), "loss": float(loss), "seconds": time.time() - started}


def study(seeds: list[int], record: Path) -> dict[str, Any]:
    """Every task, mixer and seed; goes on from what is on disk."""
    found: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    tasks = {name: make() for name, make in TASKS.items()}
    for seed in seeds:
        for task in TASKS:
            for mixer in MIXERS:
                run = f"{task} {mixer} {seed}"
                if run not in found:
                    found[run] = fit(mixer, tasks[task], seed)
                    record.write_text(json.dumps(found, indent=1))
                    print(run, found[run], flush=True)
    return found


PAGE = """\
# Aaren beside a transformer

{layers} pre-norm layers of width {width}, {heads} heads, MLPs 4 times as wide, sinusoidal positions
added to the inputs, an answer from the last token; the mixer is Aaren ({aaren:,} parameters) or
causal softmax attention ({attention:,}). AdamW, learning rate 2e-3 with a cosine, batches of 32.

- digits: scikit-learn's images of 8 x 8 pixel by pixel, 64 tokens; accuracy on 400 held-out images
  after {digits_steps} steps.
- membrane: the recording of a cell's potential that matplotlib ships (12,000 values, the last fifth
  held out), 96 values to the next 16; mean square error in units of the recording's variance after
  {membrane_steps} steps. Repeating the last value gives {naive:.4f}.

Mean and every seed ({seeds}):

| task | aaren | attention |
|---|---|---|
{scores}

![scores and memory](aaren.png)

Memory of one sequence in decoding, all layers, float32:

| tokens | aaren | attention | attention / aaren |
|---|---:|---:|---:|
{memory}

{provenance}
"""


def write_page(found: dict[str, Any], seeds: list[int], folder: Path) -> None:
    tasks = {name: make() for name, make in TASKS.items()}
    scores = []
    for task in TASKS:
        cells = []
        for mixer in MIXERS:
            own = [found[f"{task} {mixer} {seed}"]["score"] for seed in seeds]
            cells.append(f"{mean(own):.4f} ({', '.join(f'{score:.4f}' for score in own)})")
        unit = "accuracy" if tasks[task].classes else "error"
        scores.append(f"| {task}, {unit} | {' | '.join(cells)} |")
    models = {mixer: build(mixer, tasks["digits"], 0) for mixer in MIXERS}
    count = {
        mixer: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        for mixer, model in models.items()
    }
    figure, axes = new_figure("tokens read", "bytes of one sequence's state")
    memory = []
    for length in LENGTHS:
        sizes = [state_bytes(m.stack, 1, length, jnp.float32) for m in models.values()]
        cells = " | ".join(f"{size:,}" for size in sizes)
        memory.append(f"| {length:,} | {cells} | {sizes[1] / sizes[0]:,.0f} |")
    lengths = [2**power for power in range(4, 15)]
    for mixer, model in models.items():
        sizes = [state_bytes(model.stack, 1, length, jnp.float32) for length in lengths]
        digit, error = (
            mean(found[f"{task} {mixer} {seed}"]["score"] for seed in seeds) for task in TASKS
        )
        label = f"{mixer}: digits {digit:.1%} right, membrane error {error:.4f}"
        axes.plot(lengths, sizes, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend()
    save_figure(figure, folder / "aaren.png")
    page = PAGE.format(
        layers=LAYERS, width=WIDTH, heads=HEADS, **count, digits_steps=tasks["digits"].steps,
        membrane_steps=tasks["membrane"].steps, naive=tasks["membrane"].naive,
        seeds=", ".join(map(str, seeds)), scores="\n".join(scores), memory="\n".join(memory),
        provenance=provenance("python scripts/aaren_study.py"),
    )  # fmt: skip
    (folder / "aaren.md").write_text(page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/aaren_study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--results", default="docs/results")
    arguments = parser.parse_args()
    work, results = Path(arguments.workdir), Path(arguments.results)
    for folder in (work, results):
        folder.mkdir(parents=True, exist_ok=True)
    found = study(arguments.seeds, work / "scores.json")
    write_page(found, arguments.seeds, results)


if __name__ == "__main__":
    main()
