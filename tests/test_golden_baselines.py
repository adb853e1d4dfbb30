"""GLA, simple GLA, retention and Mamba-2 against vectors made by other authors' code.

Each kind of file is a function below; `golden_vectors.py` finds the files and compares.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, Kind, build, check_file, golden_cases, kernel

from effattn.batch import whole_rows
from effattn.nn.mixers.gla import retention_log_decay
from effattn.nn.mixers.ssd import SSDConfig
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention


def wide(state: jax.Array) -> jax.Array:
    """A state is float32 at least, whatever the activations are."""
    return state.astype(jnp.promote_types(state.dtype, jnp.float32))


def retention(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["layout"] == "b h t d"
    log_decay = retention_log_decay(meta["heads"])
    np.testing.assert_allclose(log_decay, meta["log_decay_per_head"], rtol=1e-6)
    heads_last = (jnp.swapaxes(x[name], 1, 2) for name in "qkv")
    out, _ = linear_attention(
        *heads_last, log_decay=jnp.asarray(log_decay), scale=meta["scale_value"]
    )
    return {"o": jnp.swapaxes(out, 1, 2)}


def gated(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    """A decay per head (simple GLA) or per channel (GLA)."""
    assert meta["axes"] == "b t h d" and meta["state_layout"] == "b h K V"
    out, state = linear_attention(
        x["q"],
        x["k"],
        x["v"],
        log_decay=x[meta["log_decay"].removeprefix("in.")],
        state=LinearState(wide(x["h0"])),
        scale=meta["scale_value"],
    )
    return {"o": out, "final_state": state.kv}


def ssd_op(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    state = LinearState(
        wide(jnp.swapaxes(x["h0"][:, 0], -1, -2))
    )  # [b, 1, h, p, n] -> [b, h, n, p]
    out, state = linear_attention(
        x["C"], x["B"], x["X"], log_decay=x["A"], state=state, chunk_size=meta["block_len"]
    )
    return {"Y": out, "final_state": jnp.swapaxes(state.kv, -1, -2)}


def mamba2_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["conv_bias"] and not meta["proj_bias"] and meta["conv_split"] == "x, B, C"
    sizes = meta["cfg"]
    inner, groups = meta["d_inner"], sizes["groups"] * sizes["state"]
    assert meta["norm_group"] == inner // sizes["groups"]
    assert meta["time_step_limit"] == [0.0, np.inf]
    config = SSDConfig(
        expand=sizes["expand"],
        head_dim=sizes["head_dim"],
        state_dim=sizes["state"],
        num_groups=sizes["groups"],
        kernel_size=sizes["conv"],
        eps=meta["norm_eps"],
        chunk_size=sizes["chunk"],
    )
    widths = np.cumsum([inner, inner, groups, groups])
    kernels = map(kernel, jnp.split(w["in_proj.weight"], widths))
    params = dict(zip(("gate", "value", "key", "query", "step_size"), kernels, strict=True))
    taps = jnp.split(w["conv1d.weight"][:, 0].T, widths[1:3] - inner, axis=1)
    biases = jnp.split(w["conv1d.bias"], widths[1:3] - inner)
    for name, tap, bias in zip(("value", "key", "query"), taps, biases, strict=True):
        params[f"{name}_conv"] = {"kernel": tap, "bias": bias}
    params["step_bias"], params["log_rate"], params["skip"] = w["dt_bias"], w["A_log"], w["D"]
    params["norm_scale"], params["out"] = w["norm.weight"], kernel(w["out_proj.weight"])
    mixer = build(config, params, width=sizes["d_model"], dtype=dtype)
    return {"y": mixer(x["x"], whole_rows(x["x"]))[0]}


KINDS: dict[str, Kind] = {
    "retention": retention,
    "simple_gla": gated,
    "gla": gated,
    "ssd_op": ssd_op,
    "mamba2_layer": mamba2_layer,
}
CASES = golden_cases("baseline", elsewhere=["delta_rule", "gated_delta_rule"])


def test_golden_baselines_has_files():
    assert CASES, f"no baseline_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_baselines(path: Path, dtype: str):
    check_file(path, dtype, KINDS)
