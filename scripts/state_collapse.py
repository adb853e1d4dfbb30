"""State collapse: a small Mamba-2 on rows up to 16 times as long as those it was trained on.

    python scripts/state_collapse.py

Trains on short rows of the standard library's bytes, then scores long rows position by position, as
the model is and with two remedies that need no training. Writes docs/results/state_collapse.md and
.png. The training run goes on where it stopped; evaluations are kept in the workdir.
Source: Chen et al. 2024, Stuffed Mamba (arXiv 2410.07145).
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn.batch import Batch
from effattn.config import load_config
from effattn.data.pipeline import open_dataset
from effattn.experiment import Experiment
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.parallel.sequence import Local
from effattn.plots import new_figure, save_figure
from effattn.train.checkpoint import load_run
from effattn.train.loop import train
from effattn.versions import provenance

TIMES = 16  # the longest rows are so many times those of training
ROWS, BATCH = 256, 16
FADES = (2.0, 4.0)
# (a_min, a_max) of exp(A) at first. The release's heads forget from the start, in 0.6 to 1000
# tokens; those of the other, a hundred times as slow, remember all of a training row.
STARTS = {"usual": (1.0, 16.0), "slow": (0.01, 0.16)}


def experiment(start: str, steps: int, seq_len: int, state_dim: int) -> Experiment:
    config = load_config("mamba2_stdlib")
    config.model.a_min, config.model.a_max = STARTS[start]
    config.model.num_layers, config.model.state_dim = 2, state_dim
    config.data.seq_len, config.data.batch_size = seq_len, 2048 // seq_len
    config.train.steps = steps
    config.train.eval_batches = 64
    return config


@dataclasses.dataclass(frozen=True)
class SlidingSums(Local):
    """Sums over the last `window` tokens alone, as the difference of two states.

    H_t - exp(G_t - G_{t-w}) H_{t-w} with G the running sum of log decays: what came before the
    window is exactly what the state of w tokens ago has faded to. H_{t-w} is the same recurrence
    over the tokens moved by w. For whole rows from an empty state.
    """

    window: int = 0

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        log_decay, segments = options.pop("log_decay"), options.pop("segment_ids", None)
        del segments  # every row is one document
        whole, state = linear_attention(query, key, value, log_decay=log_decay, **options)

        def moved(x: jax.Array) -> jax.Array:
            widths = [(0, 0), (self.window, 0), *[(0, 0)] * (x.ndim - 2)]
            return jnp.pad(x, widths)[:, : x.shape[1]]

        total = jnp.cumsum(log_decay, axis=1)
        fade = jnp.exp(total - moved(total))  # [batch, seq_len, heads]
        before, _ = linear_attention(
            query, moved(key), moved(value), log_decay=moved(log_decay), **options
        )
        return whole - (fade[..., None] * before).astype(whole.dtype), state


def long_rows(config: Experiment, seq_len: int) -> Iterator[Batch]:
    data = dataclasses.replace(config.data, seq_len=seq_len, batch_size=BATCH)
    batches = open_dataset(data).evaluation_batches("validation")
    for batch, _ in zip(batches, range(ROWS // BATCH), strict=False):
        yield batch


@partial(jax.jit, static_argnums=0)
def _nats(graphdef: nnx.GraphDef, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums over the rows of (nats, weights), [seq_len]."""
    model = nnx.merge(graphdef, params)
    logits = model.logits(model(batch.tokens, batch.info).hidden)
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(nats * batch.loss_weights, 0), jnp.sum(batch.loss_weights, 0)


def by_position(config: Experiment, params: Any, seq_len: int, **changes: Any) -> list[float]:
    """Mean nats per byte at each position. changes: of the built model's config or its sequence."""
    sequence = changes.pop("sequence", Local())
    model = dataclasses.replace(config.model, **changes)
    vocab_size = open_dataset(config.data).vocab_size

    def graph() -> Any:
        with nnx.use_eager_sharding(False):
            built = model.build(vocab_size=vocab_size, sequence=sequence, rngs=nnx.Rngs(0))
            return nnx.split(built)

    graphdef, _ = jax.eval_shape(graph)
    total = [np.zeros(seq_len), np.zeros(seq_len)]
    for batch in long_rows(config, seq_len):
        sums = jax.device_get(_nats(graphdef, params, batch))
        total = [a + b for a, b in zip(total, sums, strict=True)]
    return (total[0] / total[1]).tolist()


def variants(seq_len: int) -> dict[str, dict[str, Any]]:
    return {
        "as trained": {},
        **{f"forgets {fade:g} times as fast": {"decay_scale": fade} for fade in FADES},
        **{
            f"sums of the last {window} tokens": {"sequence": SlidingSums(window=window)}
            for window in (seq_len, seq_len // 2)
        },
    }


def evaluated(config: Experiment, run: Path) -> dict[str, list[float]]:
    """Nats by position for every variant; trains first and goes on from what is on disk."""
    record = run / "positions.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    seq_len = config.data.seq_len
    missing = {name: how for name, how in variants(seq_len).items() if name not in found}
    if missing and train(config, run)["status"] != "finished":
        raise SystemExit("stopped; the same command goes on")
    for name, changes in missing.items():
        found[name] = by_position(config, load_run(run).params, TIMES * seq_len, **changes)
        record.write_text(json.dumps(found))
        print(f"{run.name}, {name}: {np.mean(found[name]):.4f} nats per byte", flush=True)
    return found


def at(nats: list[float], times: int, seq_len: int) -> float:
    """Mean over the half training length that ends at `times` training lengths."""
    return float(np.mean(nats[times * seq_len - seq_len // 2 : times * seq_len]))


PAGE = """\
# State collapse beyond the training length

A Mamba-2 of {layers} layers of width {width} with {state_dim} state channels per head ({parameters}
parameters), trained for {steps} steps of {batch} rows of {seq_len} bytes of the standard library,
then scored on {rows} rows of {longest} bytes of the held-out files. Chen et al. 2024
(arXiv 2410.07145) saw recurrent models whose states are large for their training length get worse
beyond it, because they never had to learn to forget.

Two starts: "usual" draws the rates exp(A) from 1 to 16 as the release does, "slow" from 0.01 to
0.16, so that a whole training row is remembered unless training teaches otherwise.

![nats per byte by position](state_collapse.png)

Nats per byte, mean over the last {half} positions of so many training lengths. What stands where
differs in difficulty; all models read the same rows, so columns compare and rows do not.

| start, model | {heads} |
|---|{rule}
{table}

{verdict}

- "forgets n times as fast" is `decay_scale=n` of `SSDConfig` and `Mamba2Config`, with the same
  parameters and the same state in decoding.
- "sums of the last n tokens" is the paper's sliding window by state difference,
  H_t - exp(G_t - G_(t-n)) H_(t-n) with G the running sum of log decays: `SlidingSums` of the
  script.

{provenance}
"""


def verdict(found: dict[str, dict[str, list[float]]], seq_len: int) -> str:
    """What happened at the longest length, against the best remedy at the same positions."""
    lines = []
    for start, by_name in found.items():
        end = {name: at(nats, TIMES, seq_len) for name, nats in by_name.items()}
        best = min((name for name in end if name != "as trained"), key=lambda name: end[name])
        inside = at(by_name["as trained"], 1, seq_len) - at(by_name[best], 1, seq_len)
        beyond = end["as trained"] - end[best]
        happened = "collapses" if beyond > inside + 0.02 else "does not collapse"
        lines.append(
            f"- {start}: {happened}. As trained it is {inside:+.3f} nats from the best remedy "
            f'("{best}") at 1x and {beyond:+.3f} at {TIMES}x ({end["as trained"]:.3f} and '
            f"{end[best]:.3f})."
        )
    return "\n".join(lines)


def write_page(
    config: Experiment, run: Path, found: dict[str, dict[str, list[float]]], folder: Path
) -> None:
    seq_len = config.data.seq_len
    places = [2**power for power in range(TIMES.bit_length())]
    figure, axes = new_figure(
        f"position (training length {seq_len})", "nats per byte above the usual start as trained"
    )
    lines, width = [], seq_len // 2
    reference = np.reshape(found["usual"]["as trained"], (-1, width)).mean(1)
    for start, by_name in found.items():
        for name, nats in by_name.items():
            cells = " | ".join(f"{at(nats, times, seq_len):.3f}" for times in places)
            lines.append(f"| {start}, {name} | {cells} |")
            above = np.reshape(nats, (-1, width)).mean(1) - reference
            style = "--" if start == "usual" else "-"
            label = f"{start}, {name}"
            axes.plot((np.arange(len(above)) + 0.5) * width, above, style, label=label, linewidth=1)
    axes.axvline(seq_len, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="x-small")
    save_figure(figure, folder / "state_collapse.png")

    result = json.loads((run / "result.json").read_text())
    page = PAGE.format(
        layers=config.model.num_layers, width=config.model.width,
        state_dim=config.model.state_dim, parameters=f"{result['parameters']:,}",
        steps=config.train.steps, batch=config.data.batch_size, seq_len=seq_len, rows=ROWS,
        longest=TIMES * seq_len, half=width, heads=" | ".join(f"{times}x" for times in places),
        rule="---:|" * len(places), table="\n".join(lines), verdict=verdict(found, seq_len),
        provenance=provenance("python scripts/state_collapse.py"),
    )  # fmt: skip
    (folder / "state_collapse.md").write_text(page)
    print(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/state_collapse")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seq_len", type=int, default=64)
    parser.add_argument("--state_dim", type=int, default=64)
    parser.add_argument("--results", default="docs/results")
    arguments = parser.parse_args()
    results = Path(arguments.results)
    results.mkdir(parents=True, exist_ok=True)
    found = {}
    for start in STARTS:
        config = experiment(start, arguments.steps, arguments.seq_len, arguments.state_dim)
        run = Path(arguments.workdir) / start
        found[start] = evaluated(config, run)
    write_page(config, run, found, results)


if __name__ == "__main__":
    main()
