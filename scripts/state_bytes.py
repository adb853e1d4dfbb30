"""Bytes that one sequence keeps while decoding, by context length: recurrent models and attention.

    python scripts/state_bytes.py

Writes docs/results/state_bytes.md. Every model has its published size; only shapes are computed, so
a million tokens of a model of 7 B parameters take neither memory nor time.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.config import load_config
from effattn.models.aaren import AarenModelConfig
from effattn.nn.mixer import state_bytes
from effattn.versions import versions

CONTEXTS = tuple(4**power * 1024 for power in range(6))  # 1k .. 1M
BASELINE = "transformer_1b3"
# Row -> config (None: the sizes of Aaren's paper, which come without a recipe).
MODELS = {
    "transformer_360m": "transformer_360m",
    "transformer_1b3": "transformer_1b3",
    "based_360m": "based_360m",
    "based_1b3": "based_1b3",
    "lightning_385m": "lightning_385m",
    "lightning_7b": "lightning_7b",
    "mamba2_1b3": "mamba2_1b3",
    "rat_1b3": "rat_1b3",
    "rat_1b3:hybrid": "rat_1b3:hybrid",
    "Aaren, D 512, 8 heads": None,
}
VOCAB_SIZE = 256  # no state hangs on it


def model_config(name: str) -> Any:
    config = MODELS[name]
    if config is None:
        return AarenModelConfig(width=512, num_heads=8)
    return load_config(config).model


def abstract(config: Any, dtype: Any = jnp.bfloat16) -> Any:
    """The model of a config with shapes in place of parameters."""

    def split() -> Any:
        with nnx.use_eager_sharding(False):
            return nnx.split(config.build(vocab_size=VOCAB_SIZE, dtype=dtype, rngs=nnx.Rngs(0)))

    return nnx.merge(*jax.eval_shape(split))


def parts(config: Any, max_len: int, dtype: Any = jnp.bfloat16) -> tuple[int, int]:
    """(bytes of sums and activations, bytes of positions and segments) of one sequence."""
    model = abstract(config, dtype)
    state = jax.eval_shape(lambda: model.init_state(1, max_len, dtype))
    numbers = sum(
        leaf.size * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    )
    return state_bytes(model, 1, max_len, dtype) - numbers, numbers


def readable(count: int) -> str:
    """Bytes in a binary unit, three digits: 5.69 MiB."""
    power = 1
    while count / 1024**power >= 1000 and power < 3:
        power += 1
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def table() -> str:
    """The page: bytes per model and context, then each one's share of the baseline's."""
    total = {}
    for name in MODELS:
        model = abstract(model_config(name))
        total[name] = [state_bytes(model, 1, length, jnp.bfloat16) for length in CONTEXTS]
    heads = " | ".join(f"{length // 1024}k" if length < 2**20 else "1M" for length in CONTEXTS)
    rule = "|---|" + "---:|" * len(CONTEXTS)
    lines = [f"| model | {heads} |", rule]
    lines += [f"| {name} | {' | '.join(map(readable, row))} |" for name, row in total.items()]
    lines += ["", f"Times smaller than the cache of {BASELINE}:", "", f"| model | {heads} |", rule]
    for name, row in total.items():
        shares = (base / own for base, own in zip(total[BASELINE], row, strict=True))
        cells = (f"{share:,.0f}" if share >= 100 else f"{share:.3g}" for share in shares)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAGE = """\
# Decoding state by context length

Bytes that one sequence keeps between two decoding steps, at the published sizes. Cached activations
are bfloat16, running sums float32, and positions and segment numbers (int32) are counted too.

{table}

BASED grows until its windows of 128 are full, which is before the first column. RAT keeps one key
and one value per 16 tokens; its hybrid has windows of 1024 in every other layer. Aaren's six layers
hold two numbers and one average per head.

Command: `python scripts/state_bytes.py`; shapes only (`jax.eval_shape`), so no machine matters.
Versions: jax {jax}, flax {flax}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", default="docs/results/state_bytes.md")
    arguments = parser.parse_args()
    found = versions()
    page = PAGE.format(table=table(), jax=found["jax"], flax=found["flax"])
    Path(arguments.page).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.page).write_text(page)
    print(page)


if __name__ == "__main__":
    main()
