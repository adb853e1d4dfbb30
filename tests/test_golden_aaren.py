"""Aaren against an explicit softmax over every prefix: outputs, states and gradients.

Each kind of file is a function below; `golden_vectors.py` finds the files and compares.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, Kind, check_file, golden_cases

from effattn.pallas_kernels.prefix_scan import (
    init_softmax_state,
    softmax_scan,
    softmax_scan_step,
)


def op(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    np.testing.assert_allclose(meta["scale_value"], meta["head_dim"] ** -0.5)
    # Scores are the exponents: of 300, bfloat16 would leave a whole number.
    wide = jnp.promote_types(dtype, jnp.float32)
    scores = jnp.einsum("hd,bnhd->bnh", x["q"], x["k"], preferred_element_type=wide)
    scores = scores * meta["scale_value"]
    mid = meta["mid"]
    first, at_mid = softmax_scan(scores[:, :mid], x["v"][:, :mid])
    second, end = softmax_scan(scores[:, mid:], x["v"][:, mid:], state=at_mid)
    outputs = {"o": jnp.concatenate([first, second], axis=1), "scores": scores}
    for name, state in (("mid", at_mid), ("final", end)):
        outputs |= {f"{name}_{k}": x for k, x in zip("muw", state, strict=True)}
    return outputs


KINDS: dict[str, Kind] = {"op": op}


def test_golden_aaren_has_files():
    assert list(FOLDER.glob("aaren_*.npz")), f"no aaren_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize(("path", "dtype"), golden_cases("aaren"))
def test_golden_aaren(path: Path, dtype: str):
    check_file(path, dtype, KINDS)


@pytest.mark.parametrize(("path", "dtype"), golden_cases("aaren"))
def test_golden_aaren_token_by_token(path: Path, dtype: str):
    def steps(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
        outputs = op(meta, x, w, dtype)

        def token(state: Any, at: Any) -> tuple[Any, Any]:
            out, state = softmax_scan_step(*at, state)
            return state, out

        batch, length, heads, value_dim = x["v"].shape
        state = init_softmax_state(batch, heads, value_dim, dtype)
        tokens = (outputs["scores"].swapaxes(0, 1), x["v"].swapaxes(0, 1))
        state, out = jax.lax.scan(token, state, tokens)
        final = {f"final_{k}": x for k, x in zip("muw", state, strict=True)}
        return {**outputs, "o": out.swapaxes(0, 1), **final}

    check_file(path, dtype, {"op": steps})
