"""How much of the bare training step's speed is left through the loop, with data and logging on.

  python scripts/benchmark_loop.py --config=quickstart --steps=60 --rounds=3

Times the jitted step on one batch, and `train` itself between its fourth step and its last: data,
placing the batch, metrics, metrics.jsonl, the progress line; no evaluation and no checkpoint. Both
take turns; the fastest round of each counts. Prints one JSON line. On a CPU that others use too,
read `cpu_ratio`: the same quotient in processor seconds of this process.
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
from effattn.parallel.mesh import batch_sharding, put_batch
from effattn.train.loop import train
from effattn.train.loss import tile_length
from effattn.train.optimizer import make_optimizer
from effattn.train.report import versions
from effattn.train.schedule import make_schedule
from effattn.train.state import abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step

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
            self.batch = put_batch(next(batches), batch_sharding(self.mesh))
            self.state = init(jax.random.key(0))
        batches.close()
        self.seconds(WARM_UP)

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


def loop_seconds(experiment: Experiment, steps: int) -> np.ndarray:
    """`train` calls `stop` once per step: it serves as the clock."""
    times: list[np.ndarray] = []

    def clock() -> bool:
        times.append(now())
        return len(times) > WARM_UP + steps

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(experiment, folder, stop=clock)
    return times[WARM_UP + steps] - times[WARM_UP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=60, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    experiment = load_config(arguments.config, overrides)
    experiment.train.steps = max(experiment.train.steps, arguments.steps + WARM_UP + 2)
    experiment.train.eval_every = experiment.train.checkpoint_every = None
    bare = Bare(experiment)
    rounds = [
        (bare.seconds(arguments.steps), loop_seconds(experiment, arguments.steps))
        for _ in range(arguments.rounds)
    ]
    (bare_wall, bare_cpu), (loop_wall, loop_cpu) = np.min(rounds, axis=0)
    result = {
        "config": arguments.config,
        "overrides": overrides,
        "bare_steps_per_second": round(arguments.steps / bare_wall, 3),
        "loop_steps_per_second": round(arguments.steps / loop_wall, 3),
        "ratio": round(bare_wall / loop_wall, 4),
        "cpu_ratio": round(bare_cpu / loop_cpu, 4),
        "seconds_of_rounds": np.round(rounds, 3).tolist(),
        "versions": versions(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
