"""Time attention forward and backward beside jax.nn.dot_product_attention, and its memory.

    python scripts/benchmark_attention.py [--seq-len 8192] [--repeats 5] [--json]

The three jobs run in turn and the fastest of each counts, so that a busy machine slows all alike.
Ratios are to `jax.nn.dot_product_attention(is_causal=True)`, also for the window.
"""

import argparse
import json
import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from effattn.masks import Causal, Mask, Window
from effattn.pallas_kernels.attention import attention


def forward_and_backward(f):
    def run(query, key, value, cotangent):
        out, pull = jax.vjp(f, query, key, value)
        return out, pull(cotangent)

    return jax.jit(run)


def peer(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def ours(mask: Mask, implementation: str):
    return lambda q, k, v: attention(q, k, v, mask=mask, implementation=implementation)


def fastest(jobs: dict, arrays: tuple, repeats: int) -> dict[str, float]:
    """Seconds per job, the least of `repeats` interleaved runs after one that compiles."""
    seconds = dict.fromkeys(jobs, float("inf"))
    for run in jobs.values():
        jax.block_until_ready(run(*arrays))
    for _ in range(repeats):
        for name, run in jobs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def temporary_mib(run, shape: tuple[int, ...], dtype) -> float:
    x = jax.ShapeDtypeStruct(shape, dtype)
    return run.lower(x, x, x, x).compile().memory_analysis().temp_size_in_bytes / 2**20


def chip() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return f"{len(names)} x {names[0]}"
    except (OSError, IndexError):
        return platform.machine()


def measure(options: argparse.Namespace) -> dict:
    dtype = jnp.dtype(options.dtype)
    shape = (options.batch, options.seq_len, options.num_heads, options.head_dim)
    window = Causal() & Window(left=options.window - 1)
    jobs = {
        "jax.nn, causal": forward_and_backward(peer),
        "causal": forward_and_backward(ours(Causal(), options.implementation)),
        f"window {options.window}": forward_and_backward(ours(window, options.implementation)),
    }
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))
    seconds = fastest(jobs, arrays, options.repeats)
    lengths = (options.seq_len // 2, options.seq_len)
    rows = []
    for name, run in jobs.items():
        memory = [temporary_mib(run, (shape[0], n, *shape[2:]), dtype) for n in lengths]
        ratio = seconds[name] / seconds["jax.nn, causal"]
        rows.append(
            {"job": name, "seconds": seconds[name], "ratio": ratio, "temporary_mib": memory}
        )
    return {
        "chip": chip(),
        "shape": shape,
        "dtype": dtype.name,
        "implementation": options.implementation,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "repeats": options.repeats,
        "lengths": lengths,
        "rows": rows,
    }


def markdown(result: dict) -> str:
    b, t, h, d = result["shape"]
    short, long = result["lengths"]
    lines = [
        f"{result['chip']}; batch {b}, seq_len {t}, heads {h}, head_dim {d}, {result['dtype']}; "
        f"implementation {result['implementation']}; jax {result['jax']}, "
        f"Python {result['python']}; forward + backward, least of {result['repeats']}",
        "",
        f"| job | seconds | ratio | temporary MiB at {short} | at {long} |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        memory = " | ".join(f"{x:.0f}" for x in row["temporary_mib"])
        lines.append(f"| {row['job']} | {row['seconds']:.3f} | {row['ratio']:.3f} | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--window", type=int, default=512, help="tokens seen, the query's own in")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args(arguments)
    result = measure(options)
    print(json.dumps(result) if options.json else markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
