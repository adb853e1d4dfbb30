"""What a training step of H-Net costs where its chunks have their own, smaller buffers.

    python scripts/hnet_step_time.py

Times whole training steps on the CPU with the inner stage at full length ("exact") and in buckets,
at a compression of exactly 4, and writes docs/results/hnet_step_time.md. The boundaries are
planted: two opposite embeddings in runs of four bytes, and learning rates of zero keep them.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from result_page import markdown_table, write_page

from effattn.batch import Batch, whole_rows
from effattn.experiment import Experiment, OptimizerConfig
from effattn.models.hnet import HNetConfig
from effattn.nn.compact import CapacityConfig
from effattn.parallel.mesh import MeshConfig
from effattn.train.adaptive_flops import hnet_stage_flops
from effattn.train.optimizer import make_optimizer
from effattn.train.state import abstract_model, build_state, shardings_of
from effattn.train.step import make_train_step
from effattn.versions import provenance

ROWS, LENGTH, RUN, VOCAB_SIZE = 8, 512, 4, 256
MODEL = HNetConfig(
    layout='["t1", ["T6"], "t1"]', width=256, inner_widths=(384,), targets=(float(RUN),)
)
CAPACITIES = {
    "exact": CapacityConfig(mode="exact"),
    "bucket": CapacityConfig(mode="bucket", rungs=(0.25, 0.5, 1.0)),
    "bucket, pooled": CapacityConfig(mode="bucket", rungs=(0.25, 0.5, 1.0), pooled=True),
}

PAGE = """\
# H-Net: a step with buffers for the chunks alone

{layout} at widths {width}, {rows} rows of {length} bytes, a chunk every {run} bytes. The inner
stage is {share:.0%} of the FLOPs at full length, and {cheap:.0%} of its own cost at this
compression.

{table}

Median of {repeats} steps, forward, backward and update, float32, all cores.

{made}
"""


class Case:
    def __init__(self, capacity: CapacityConfig) -> None:
        model_config = dataclasses.replace(MODEL, capacity=capacity)
        experiment = Experiment(model=model_config, optimizer=OptimizerConfig(weight_decay=0.0))
        mesh = MeshConfig().build()
        model = abstract_model(experiment, VOCAB_SIZE)
        optimizer = make_optimizer(experiment.optimizer, model.axes, lambda _: jnp.zeros(()))
        init, abstract, _ = build_state(model, optimizer, mesh)
        step = make_train_step(
            model.graphdef, optimizer, lambda _: jnp.zeros(()), shardings=shardings_of(abstract)
        )
        signs = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) // RUN % 2
        tokens = signs.astype(np.int32)
        weights = np.ones(tokens.shape, np.float32)
        info = jax.tree.map(np.asarray, whole_rows(tokens))
        self.batch = Batch(tokens, np.roll(tokens, -1, 1), weights, info)
        with jax.set_mesh(mesh):
            self.state = init(jax.random.key(0))
            table = self.state.params["embedding"]["table"]
            self.state.params["embedding"]["table"] = table.at[1].set(-table[0])
            self.step = step.lower(self.state, self.batch).compile()
        self.seconds: list[float] = []

    def run(self) -> dict[str, float]:
        start = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.step(self.state, self.batch))
        self.seconds.append(time.perf_counter() - start)
        return {name: float(value) for name, value in metrics.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--page", type=Path, default=Path("docs/results/hnet_step_time.md"))
    arguments = parser.parse_args()
    cases = {name: Case(capacity) for name, capacity in CAPACITIES.items()}
    # In turn, because a shared machine's speed drifts; the first round warms up.
    for _ in range(arguments.repeats + 1):
        metrics = {name: case.run() for name, case in cases.items()}
    for name, values in metrics.items():
        if values["compression_0"] != RUN:
            raise SystemExit(f"{name}: a chunk every {values['compression_0']} bytes, not {RUN}")
    medians = {name: statistics.median(case.seconds[1:]) for name, case in cases.items()}
    rows = [
        [
            name,
            f"{metrics[name]['chunks_0_capacity']:,.0f}",
            f"{1e3 * seconds:,.0f}",
            f"{seconds / medians['exact']:.2f}",
        ]
        for name, seconds in medians.items()
    ]
    full = hnet_stage_flops(MODEL, seq_len=LENGTH, compressions=[1.0])
    cheap = hnet_stage_flops(MODEL, seq_len=LENGTH, compressions=[float(RUN)])
    head = 2 * MODEL.width * VOCAB_SIZE
    table = markdown_table(["capacity", "rows of the inner stage", "ms", "of exact"], rows)
    write_page(
        arguments.page,
        PAGE.format(
            layout=f"`{MODEL.layout}`",
            width=" and ".join(map(str, MODEL.widths())),
            rows=ROWS,
            length=LENGTH,
            run=RUN,
            share=full[1] / (sum(full) + head),
            cheap=cheap[1] / full[1],
            table=table,
            repeats=arguments.repeats,
            made=provenance("python scripts/hnet_step_time.py"),
        ),
    )
    print(arguments.page.read_text())


if __name__ == "__main__":
    main()
