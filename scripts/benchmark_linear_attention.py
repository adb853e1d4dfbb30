"""Times linear attention against a plain scan over tokens, forward and backward.

Usage: python scripts/benchmark_linear_attention.py [--seq-len 8192] [--repeats 3] [--json]

Prints one Markdown table (or one JSON object) with the machine, shapes and versions. The two
sides of a ratio run in turn and the fastest run of each counts, so that a busy machine hurts both.
The scan keeps a state per token for its backward: 4.5 GB at seq_len 8192, 8 heads of 128 x 128.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.linear_attention import linear_attention
from effattn.pallas_kernels.linear_attention.features import taylor_features

CASES = {
    "no decay": dict(num_heads=8, key_dim=128, value_dim=128),
    "decay per head": dict(num_heads=8, key_dim=128, value_dim=128, decay=True),
    "BASED": dict(num_heads=8, key_dim=16, value_dim=64, feature_map="taylor", normalize=True),
}


def plain_scan(query, key, value, log_decay, feature_map, normalize):
    """The recurrence as one would write it first: a state, one token at a time."""
    if feature_map == "taylor":
        query, key = taylor_features(query), taylor_features(key)
    num_heads = value.shape[2]
    decay = jnp.ones(num_heads) if log_decay is None else jnp.exp(log_decay)

    def token(state, x):
        kv, normalizer = state
        q, k, v = x
        kv = decay[:, None, None] * kv + k[..., :, None] * v[..., None, :]
        out = jnp.einsum("bhd,bhde->bhe", q, kv)
        if normalize:
            normalizer = decay[:, None] * normalizer + k
            out = out / (jnp.einsum("bhd,bhd->bh", q, normalizer) + 1e-12)[..., None]
        return (kv, normalizer), out

    kv = jnp.zeros((query.shape[0], num_heads, query.shape[3], value.shape[3]), value.dtype)
    by_token = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    _, out = jax.lax.scan(token, (kv, kv[..., 0]), by_token)
    return jnp.moveaxis(out, 0, 1)


def fastest(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` runs of each, taken in turn after one to warm up."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def measure(
    seq_len: int, repeats: int, *, num_heads: int, key_dim: int, value_dim: int,
    decay: bool = False, feature_map: str = "identity", normalize: bool = False,
) -> dict[str, Any]:  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, seq_len, num_heads)
    query, key = (jax.random.normal(k, (*shape, key_dim)) for k in keys[:2])
    value, cotangent = (jax.random.normal(k, (*shape, value_dim)) for k in keys[2:])
    log_decay = -(2.0 ** -jnp.arange(1, num_heads + 1)) if decay else None
    options = dict(feature_map=feature_map, normalize=normalize)

    def ours(q, k, v):
        return linear_attention(q, k, v, log_decay=log_decay, **options)[0]

    def scan(q, k, v):
        return plain_scan(q, k, v, log_decay, **options)

    calls, memory = {}, {}
    for name, function in {"ours": ours, "scan": scan}.items():

        def forward_and_backward(q, k, v, function=function):
            out, vjp = jax.vjp(function, q, k, v)
            return out, vjp(cotangent)

        compiled = jax.jit(forward_and_backward).lower(query, key, value).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        calls[name] = lambda compiled=compiled: compiled(query, key, value)
    seconds = fastest(calls, repeats)
    return {
        "seq_len": seq_len, "num_heads": num_heads, "key_dim": key_dim, "value_dim": value_dim,
        "ours_ms": 1e3 * seconds["ours"], "scan_ms": 1e3 * seconds["scan"],
        "speedup": seconds["scan"] / seconds["ours"],
        "ours_temp_mb": memory["ours"] / 1e6, "scan_temp_mb": memory["scan"] / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    rows = {
        name: measure(arguments.seq_len, arguments.repeats, **case) for name, case in CASES.items()
    }
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind, "platform": device.platform, "cpu": platform.machine(),
        "cpu_count": os.cpu_count(), "jax": jax.__version__, "python": platform.python_version(),
        "dtype": "float32", "batch": 1, "repeats": arguments.repeats,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps({"machine": machine, "cases": rows}))
        return
    print(", ".join(f"{k} {v}" for k, v in machine.items()) + "; forward and backward\n")
    columns = list(next(iter(rows.values())))
    print("| case | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in rows.items():
        cells = (f"{x:.1f}" if isinstance(x, float) else str(x) for x in row.values())
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
