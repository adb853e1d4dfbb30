"""RAT against vectors made by its authors' code: outputs, caches, decoding and gradients.

Each kind of file is a function below; `golden_vectors.py` finds the files and compares.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, Kind, build, check_file, decode, golden_cases, kernel

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.layers import statistics_dtype
from effattn.nn.mixers.rat import RATConfig


def layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    """The reference's layer holds the pre-norm and the residual, which are our block's."""
    assert meta["includes_residual_and_prenorm"] and not meta["bias"]
    assert not meta["rope_interleaved"]
    np.testing.assert_allclose(meta["scale_value"], meta["head_dim"] ** -0.5)
    config = RATConfig(
        num_heads=meta["heads"],
        head_dim=meta["head_dim"],
        num_groups=meta["ngroups"],
        chunk_size=meta["chunk_size"],
        rotary_base=meta["rope_base"],
    )
    width, group = meta["d_model"], meta["ngroups"] * meta["head_dim"]
    parts = jnp.split(w["in_proj.weight"], np.cumsum([width, width, width, group]))
    names = ("z", "value", "gate", "query", "key")
    params = {name: kernel(part) for name, part in zip(names, parts, strict=True)}
    params |= {"gate_bias": w["gate_bias"], "out": kernel(w["out_proj.weight"])}
    mixer = build(config, params, width=width, dtype=dtype)

    wide = x["x"].astype(statistics_dtype(dtype))
    norm = wide * (jnp.mean(wide**2, axis=-1, keepdims=True) + meta["rms_eps"]) ** -0.5
    inputs, info = (norm * w["input_norm.weight"]).astype(dtype), whole_rows(x["x"])
    n, end = meta["prefill_len"], meta["prefill_len"] + meta["decode_len"]
    head = TokenInfo(*(field[:, :n] for field in info))
    tail = TokenInfo(*(field[:, n:end] for field in info))
    empty = mixer.init_state(len(inputs), inputs.shape[1], dtype)
    _, state = mixer.prefill(inputs[:, :n], head, empty)
    steps, _ = decode(mixer, inputs[:, n:end], tail, state)
    chunks = n // meta["chunk_size"]
    return {
        "y": x["x"] + mixer(inputs, info)[0],
        "decode_y": x["x"][:, n:end] + steps,
        "prefill_k_chunks": jnp.swapaxes(state.cache.key[:, :chunks], 1, 2),
        "prefill_v_chunks": jnp.swapaxes(state.cache.value[:, :chunks], 1, 2),
    }


KINDS: dict[str, Kind] = {"layer": layer}


def test_golden_rat_has_files():
    assert list(FOLDER.glob("rat_*.npz")), f"no rat_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize(("path", "dtype"), golden_cases("rat"))
def test_golden_rat(path: Path, dtype: str):
    check_file(path, dtype, KINDS)
