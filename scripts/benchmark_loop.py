"""How much of the bare training step's speed is left through the loop, with data and logging on.

  python scripts/benchmark_loop.py --config=quickstart --steps=10 --pairs=12

Runs `train` itself (data, placing the batch, metrics, metrics.jsonl, the progress line; no
evaluation and no checkpoint), stops its clock after every `steps` steps and times as many of the
jitted step alone on one batch. A machine that others use too changes its speed from minute to
minute: the two halves of a pair meet the same speed, and the median over the pairs is the ratio.
Prints one JSON line; `cpu_ratio` is the same quotient in processor seconds of this process.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time

import jax
import numpy as np

from effattn.config import load_config
from effattn.data.pipeline import open_dataset
from effattn.experiment import Experiment
from effattn.parallel.mesh import batch_sharding
from effattn.train.loop import train
from effattn.train.loss import tile_length
from effattn.train.optimizer import make_optimizer
from effattn.train.report import versions
from effattn.train.schedule import make_schedule
from effattn.train.state import abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step

# Untimed before each half of a pair: the other half's steps in flight come to their end.
WARM_UP = 3


class Bare:
    """The jitted step of an experiment, again and again on one batch."""

    def __init__(self, experiment: Experiment):
        dataset = open_dataset(experiment.data)
        sizes = {"batch_size": experiment.data.batch_size, "seq_len": experiment.data.seq_len}
        self.mesh = experiment.mesh.build()
        model = abstract_model(experiment, dataset.vocab_size)
        schedule = make_schedule(experiment.optimizer, steps=experiment.train.steps, **sizes)
        optimizer = make_optimizer(experiment.optimizer, model.axes, schedule)
        init, abstract, _ = build_state(model, optimizer, self.mesh)
        self.step = make_train_step(
            model.graphdef,
            optimizer,
            schedule,
            shardings=shardings_of(abstract),
            rows=batch_sharding(self.mesh),
            tile=tile_length(
                batch=sizes["batch_size"],
                seq_len=sizes["seq_len"],
                vocab_size=dataset.vocab_size,
                shards=self.mesh.size,
            ),
        )
        batches = dataset.train_iterator(experiment.train.seed)
        with jax.set_mesh(self.mesh):
            self.batch = jax.device_put(next(batches), batch_sharding(self.mesh))
            self.state = init(jax.random.key(0))
        batches.close()

    def seconds(self, steps: int) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            started = now()
            for _ in range(steps):
                self.state, _ = self.step(self.state, self.batch)
            jax.block_until_ready(self.state)
            return now() - started


def now() -> np.ndarray:
    """Seconds on the wall's clock and on the processor's."""
    return np.array([time.perf_counter(), time.process_time()])


class PairedClock:
    """`train` calls `stop` once after every step: here it is the clock, and runs the bare steps.

    pairs: [(bare, loop)] of `now()` differences over `steps` steps each.
    """

    def __init__(self, bare: Bare, steps: int, num_pairs: int):
        self.bare, self.steps, self.num_pairs = bare, steps, num_pairs
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._step = 0

    def __call__(self) -> bool:
        self._step += 1
        if self._step == WARM_UP:
            self._started = now()
        elif self._step == WARM_UP + self.steps:
            loop = now() - self._started
            self.bare.seconds(WARM_UP)
            self.pairs.append((self.bare.seconds(self.steps), loop))
            self._step = 0
        return len(self.pairs) == self.num_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=10, help="of each kind per pair")
    parser.add_argument("--pairs", type=int, default=12)
    arguments, overrides = parser.parse_known_args()
    experiment = load_config(arguments.config, overrides)
    steps_of_pair = arguments.steps + WARM_UP
    experiment.train.steps = max(experiment.train.steps, (arguments.pairs + 1) * steps_of_pair)
    experiment.train.eval_every = experiment.train.checkpoint_every = None
    # The first pair is thrown away: it holds the compilation.
    clock = PairedClock(Bare(experiment), arguments.steps, arguments.pairs + 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(experiment, folder, stop=clock)
    pairs = np.array(clock.pairs[1:])  # [pair, bare or loop, wall or processor]
    wall, cpu = np.median(pairs[:, 0] / pairs[:, 1], axis=0)
    bare, loop = arguments.steps / np.median(pairs[..., 0], axis=0)
    result = {
        "config": arguments.config,
        "overrides": overrides,
        "bare_steps_per_second": round(bare, 3),
        "loop_steps_per_second": round(loop, 3),
        "ratio": round(wall, 4),
        "cpu_ratio": round(cpu, 4),
        "ratios_of_pairs": np.round(pairs[:, 0, 0] / pairs[:, 1, 0], 3).tolist(),
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
