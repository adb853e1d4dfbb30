"""What a decoding step costs by the number of streams, at batch 1: time, weights, cache. A page.

    python scripts/parscale_decode.py

Streams are rows of one batch, so a step reads every shared weight once, whatever P. Writes
docs/results/parscale_decode.md. The models take turns in short rounds, so that other work on the
machine slows all of them alike; weights are drawn, not trained, which changes no time.
"""

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from result_page import markdown_table, write_page

from effattn.batch import TokenInfo, whole_rows
from effattn.models.parscale import ParScaleConfig
from effattn.models.transformer import TransformerConfig
from effattn.versions import provenance

BASE = TransformerConfig(
    num_layers=8, width=512, num_heads=8, num_kv_heads=2, mlp_width=1408, qkv_bias=True
)
VOCAB_SIZE, PREFIX = 257, 48
STEPS = 8  # per round

PAGE = """\
# ParScale: a decoding step by the number of streams

One row of text, float32, {context} tokens in the cache; a decoder of {layers} layers of width
{width}, {heads} heads of {head_dim} over {kv_heads} kv heads, {base:,} parameters. P = 1 is that
decoder and nothing else. The others have P streams of it, {prefix} learned keys and values per
layer and stream, and the perceptron that joins the streams: their rows go through every matrix
product together, so a step reads the shared weights once.

{table}

Time: median of {rounds} rounds of {steps} steps, the models in turn. Weights: bytes that every
step reads, the decoder's and what the streams add, learned keys and values among it. Cache: bytes
of keys and values that one more token takes, in all layers and streams; positions and segments, 8
bytes per layer and stream, are not in it. At {long:,} tokens the cache of P = 4 is {share} of the
weights.

{made} Load of the machine before and after: {load}.
"""


class Decoder:
    """A model with drawn weights after `context` tokens, one row; `round` takes STEPS steps."""

    def __init__(self, streams: int, *, base: Any, context: int, rounds: int):
        prefix = 0 if streams == 1 else PREFIX
        config = ParScaleConfig(base=base, streams=streams, prefix_length=prefix)
        model = config.build(vocab_size=VOCAB_SIZE, rngs=nnx.Rngs(0))
        graphdef, self.params = nnx.split(model)
        self.streams, self.place = streams, context
        self.seconds: list[float] = []

        def step(params: Any, state: Any, token: jax.Array, place: Any) -> tuple[Any, jax.Array]:
            position = jnp.full((1,), place, jnp.int32)
            info = TokenInfo(position, jnp.ones((1,), jnp.int32), jnp.ones((1,), bool))
            logits, state = nnx.merge(graphdef, params).step(token, info, state)
            return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        self.step = jax.jit(step, donate_argnums=1)
        draw = np.random.default_rng(0).integers(0, 256, (1, context), dtype=np.int32)
        state = model.init_state(1, context + STEPS * (rounds + 1))
        # Nobody times the prefill: let it compile quickly.
        prefill = jax.jit(
            lambda m, *rest: m.prefill(*rest)[1],
            donate_argnums=3,
            compiler_options={"xla_backend_optimization_level": 0},
        )
        self.state = prefill(model, draw, whole_rows(draw), state)
        self.token = jnp.zeros((1,), jnp.int32)
        self.round()  # compiles
        self.seconds.clear()

    def round(self) -> None:
        began = time.perf_counter()
        for _ in range(STEPS):
            self.state, self.token = self.step(self.params, self.state, self.token, self.place)
            self.place += 1
        jax.block_until_ready(self.token)
        self.seconds.append((time.perf_counter() - began) / STEPS)


def sizes(streams: int, *, base: Any) -> dict[str, int]:
    """Bytes, from shapes alone: `shared` and `added` weights, `cache` per token of one row."""
    prefix = 0 if streams == 1 else PREFIX
    config = ParScaleConfig(base=base, streams=streams, prefix_length=prefix)
    model = nnx.eval_shape(lambda: config.build(vocab_size=VOCAB_SIZE, rngs=nnx.Rngs(0)))

    def held(length: int) -> int:
        state = jax.eval_shape(lambda: model.init_state(1, length, jnp.float32))
        floats = [s for s in jax.tree.leaves(state) if jnp.issubdtype(s.dtype, jnp.inexact)]
        return sum(s.size * s.dtype.itemsize for s in floats)

    shared, whole = (
        sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(nnx.state(part)))
        for part in (model.base, model)
    )
    return {"shared": shared, "added": whole - shared, "cache": held(2) - held(1)}


def write(
    found: list[dict[str, Any]], page: Path, made: str, load: str, *, base: Any, context: int
) -> None:
    """found: per model `streams`, the three `sizes` and the `seconds` of its rounds."""
    first = median(found[0]["seconds"])
    header = ["P", "step, ms", "times P = 1", "fastest round, ms", "shared weights, MB"]
    header += ["added weights, MB", "cache per token, bytes"]
    rows = [
        [
            str(point["streams"]),
            f"{1e3 * median(point['seconds']):.1f}",
            f"{median(point['seconds']) / first:.2f}",
            f"{1e3 * min(point['seconds']):.1f}",
            f"{point['shared'] / 1e6:.2f}",
            f"{point['added'] / 1e6:.2f}",
            f"{point['cache']:,}",
        ]
        for point in found
    ]
    four = sizes(4, base=base)
    share = 4096 * four["cache"] / (four["shared"] + four["added"])
    write_page(
        page,
        PAGE.format(
            context=context,
            layers=base.num_layers,
            width=base.width,
            heads=base.num_heads,
            head_dim=base.width // base.num_heads,
            kv_heads=base.num_kv_heads,
            base=four["shared"] // 4,
            prefix=PREFIX,
            table=markdown_table(header, rows),
            rounds=len(found[0]["seconds"]),
            steps=STEPS,
            long=4096,
            share=f"{share:.0%}",
            made=made,
            load=load,
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", default="docs/results/parscale_decode.md")
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    if arguments.streams[0] != 1:
        raise SystemExit("--streams: the first must be 1, which the others are measured against")

    load = [os.getloadavg()[0]]
    options = {"base": BASE, "context": arguments.context, "rounds": arguments.rounds}
    models = []
    for streams in arguments.streams:
        models.append(Decoder(streams, **options))
        print(f"P = {streams} compiled", flush=True)
    for _ in range(arguments.rounds):
        for model in models:
            model.round()
    load.append(os.getloadavg()[0])
    found = [
        {"streams": m.streams, "seconds": m.seconds, **sizes(m.streams, base=BASE)} for m in models
    ]
    page = Path(arguments.page)
    made = provenance("python scripts/parscale_decode.py")
    loads = " and ".join(f"{value:.1f}" for value in load)
    write(found, page, made, loads, base=BASE, context=arguments.context)
    print(page.read_text())


if __name__ == "__main__":
    main()
