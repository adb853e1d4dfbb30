"""What attention over the devices of a row moves and keeps, compiled for TPUs that are not here.

  python scripts/sequence_static.py [--topology=v5e:2x4]

bfloat16, one row of 16,384 tokens over 8 chips, 16 query heads and 8 kv heads of 128: bytes that a
chip receives, beside the formulas; the share of them that compute runs beside; temporaries. Writes
benchmarks/sequence_static.md. Static: read off the compiled programs.
"""

import argparse
import datetime
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.masks import Causal, Mask, Window
from effattn.parallel.gather_keys import GatherKeys
from effattn.parallel.halo import Halo
from effattn.parallel.ring_strategy import Ring
from effattn.parallel.ring_ulysses import RingUlysses
from effattn.parallel.token_ring import TokenRing
from effattn.parallel.ulysses import Ulysses
from effattn.static.collectives import bytes_by_kind, collectives
from effattn.static.tpu import compile_for, describe_mesh
from effattn.versions import versions

PAGE = Path(__file__).resolve().parent.parent / "benchmarks" / "sequence_static.md"
CHIPS, PART, HEADS, KV_HEADS, DIM = 8, 2048, 16, 8, 128
# One chip's keys and values, and queries.
KV, QUERY = 2 * PART * KV_HEADS * DIM * 2, PART * HEADS * DIM * 2
OTHERS, WINDOW = CHIPS - 1, 512
RING = OTHERS * KV
# name: (strategy, mask, bytes forward, bytes of the gradient's pass and its forward pass, None
# where no formula is claimed)
ROWS: dict[str, tuple[Any, Mask, int, int | None]] = {
    "ring, zigzag": (
        Ring(zigzag=True, devices=CHIPS),
        Causal(),
        RING,
        2 * RING + 2 * CHIPS * KV,
    ),
    "ring, contiguous": (Ring(), Causal(), RING, 2 * RING + 2 * CHIPS * KV),
    "ring, zigzag, bfloat16 gradients": (
        Ring(zigzag=True, devices=CHIPS, gradient_dtype="bfloat16"),
        Causal(),
        RING,
        2 * RING + CHIPS * KV,
    ),
    "ring, both ways": (Ring(both_ways=True), Causal(), RING, 2 * RING + 2 * CHIPS * KV),
    "TokenRing": (TokenRing(), Causal(), OTHERS * (2 * QUERY + 4 * PART * HEADS), None),
    "Ulysses": (Ulysses(), Causal(), OTHERS * (2 * QUERY + KV) // CHIPS, None),
    "gathered keys": (GatherKeys(), Causal(), RING, None),
    "ring 4 x Ulysses 2": (
        RingUlysses(degree=2),
        Causal(),
        3 * KV + (2 * QUERY + KV) // 2,
        None,
    ),
    "halo, window 512": (
        Halo(),
        Causal() & Window(left=WINDOW),
        KV * WINDOW // PART,
        2 * KV * WINDOW // PART,
    ),
}


@functools.cache
def compiled(
    topology: str,
    strategy: Any,
    mask: Mask | None = None,
    *,
    gradient: bool = False,
    chips: int = CHIPS,
    layers: int = 1,
    scan: bool = False,
) -> Any:
    """layers: of attention whose output is the next one's query, unrolled or in a scan."""
    mesh = describe_mesh(topology, {"sequence": chips})
    split = NamedSharding(mesh, P(None, "sequence"))
    shapes = [(1, chips * PART, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def layer(q: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return strategy.attention(q, k, v, mask=Causal() if mask is None else mask), None

        return (
            jax.lax.scan(layer, q, length=layers, unroll=not scan)[0]
            if layers > 1
            else layer(q, None)[0]
        )

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(q, k, v).astype(jnp.float32)))

    fn = jax.grad(loss, (0, 1, 2)) if gradient else attend
    return compile_for(topology, fn, *arrays, mesh=mesh)


def share_overlapped(hlo: str) -> float:
    """Of the bytes of large collectives, those that compute runs beside."""
    large = [c for c in collectives(hlo) if c.bytes > 1e6]
    total = sum(c.bytes * c.times for c in large)
    return sum(c.bytes * c.times for c in large if c.overlapped) / total


def cells(topology: str, name: str) -> list[str]:
    strategy, mask, *formulas = ROWS[name]
    found = []
    for gradient, formula in zip((False, True), formulas, strict=True):
        done = compiled(topology, strategy, mask, gradient=gradient)
        hlo = done.as_text()
        moved = sum(size for size in bytes_by_kind(hlo).values() if size > 1e6)
        wanted = "" if formula is None else f" ({formula / 1e6:.3f})"
        temporaries = done.memory_analysis().temp_size_in_bytes / 2**20
        found += [f"{moved / 1e6:.3f}{wanted}", f"{share_overlapped(hlo):.0%}"]
        found.append(f"{temporaries:.0f}")
    return [name, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x4")
    topology = parser.parse_args().topology
    heads = ["strategy"]
    for what in ("forward", "with gradients"):
        heads += [f"{what}: MB (formula)", "overlapped", "temporaries MiB"]
    rows = [heads, ["---"] * len(heads), *(cells(topology, name) for name in ROWS)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    stack = ", ".join(f"{name} {version}" for name, version in versions().items())
    PAGE.write_text(
        f"""# Attention over the devices of a row, compiled for {topology}: static figures

{datetime.date.today()}; {stack}

    python scripts/sequence_static.py --topology={topology}

bfloat16, one row of {CHIPS * PART:,} tokens over {CHIPS} chips, {HEADS} query heads and {KV_HEADS}
kv heads of {DIM}. MB: what a chip receives through collectives of more than a megabyte; the formula
is that of the README. XLA may send the last hop of a gradient in bfloat16 where float32 was asked
for. An all-to-all and an all-gather are not overlapped by the compiler. Nothing was measured on a
device.

{table}
"""
    )
    print(table)


if __name__ == "__main__":
    main()
