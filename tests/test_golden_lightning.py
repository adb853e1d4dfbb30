"""Lightning attention and TransNormerLLM against vectors made by their authors' code.

Each kind of file is a function below; `golden_vectors.py` finds the files and compares.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_vectors import (
    FOLDER,
    Arrays,
    Kind,
    build,
    check_file,
    decode,
    golden_cases,
    kernel,
    stacked,
)

from effattn.batch import TokenInfo, whole_rows
from effattn.models.lightning import LightningModelConfig
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.mixers.lightning import LightningConfig, slope_scale, slopes
from effattn.pallas_kernels.linear_attention import linear_attention

# ---- our parameters from the reference's


def lightning_params(w: Arrays, prefix: str) -> dict:
    query, key, value, gate = map(kernel, jnp.split(w[f"{prefix}qkvu_proj.weight"], 4))
    params = {"query": query, "key": key, "value": value, "gate": gate}
    params["out"] = kernel(w[f"{prefix}out_proj.weight"])
    if f"{prefix}lrpe.theta" in w:
        params["lrpe"] = {"theta": w[f"{prefix}lrpe.theta"].reshape(-1)}
    return params


def low_rank_params(w: Arrays) -> dict:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    params = {ours: kernel(w[f"{theirs}.weight"]) for ours, theirs in names.items()}
    down, up = (kernel(w[f"output_gate.{i}.weight"]) for i in range(2))
    norm = {"scale": w["norm.weight"], "bias": w["norm.bias"]}
    return {**params, "gate": {"down": down, "up": up}, "norm": norm}


def layer_params(w: Arrays, layer: int) -> dict:
    prefix = f"model.layers.{layer}."
    names = {"gate": "l1", "up": "l2", "down": "l3"}
    mlp = {o: kernel(w[f"{prefix}channel_mixer.{their}.weight"]) for o, their in names.items()}
    return {"mixer": lightning_params(w, f"{prefix}token_mixer."), "mlp": mlp}


# ---- one function per kind: (meta, inputs, weights, dtype) -> outputs by the reference's names


def op(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["layout"] == "b h n d"
    heads_last = [jnp.swapaxes(x[name], 1, 2) for name in "qkv"]
    outputs = {}
    for name, log_decay in (("o", -x["slopes"]), ("o_no_decay", None)):
        out, _ = linear_attention(*heads_last, log_decay=log_decay, scale=meta["scale_value"])
        outputs[name] = jnp.swapaxes(out, 1, 2)
    return outputs


def slope_tables(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    tables = {f"slopes_h{h}": jnp.asarray(slopes(h)) for h in meta["head_counts"]}
    for count in meta["layer_counts"]:
        scales = [slope_scale(layer, count) for layer in range(count)]
        tables[f"layer_scale_L{count}"] = jnp.asarray(scales)
    return tables


def scale_of_given_slopes(meta: dict, given: jax.Array, dtype: Any) -> jax.Array:
    """What turns our slopes into the file's, which are rounded to float32: a number per head."""
    scale = slope_scale(meta["layer"], meta["num_layers"])
    np.testing.assert_allclose(scale, meta["layer_scale_value"])
    return given.astype(jnp.promote_types(dtype, jnp.float32)) / jnp.asarray(slopes(meta["heads"]))


def tnl_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["qkvu_order"] == "q,k,v,u" and meta["scale_value"] == 1.0 and not meta["bias"]
    config = LightningConfig(
        num_heads=meta["heads"],
        head_dim=meta["head_dim"],
        layer=meta["layer"],
        num_layers=meta["num_layers"],
        lrpe=meta["lrpe"],
        eps=meta["norm_eps"],
        chunk_size=meta["block"],
    )
    mixer = build(config, lightning_params(w, ""), width=meta["d_model"], dtype=dtype)
    given = {"slope_scale": scale_of_given_slopes(meta, x["slopes"], dtype)}
    x, info = x["x"], whole_rows(x["x"])
    n, end = meta["prefill_len"], meta["prefill_len"] + meta["decode_len"]
    head = TokenInfo(*(field[:, :n] for field in info))
    tail = TokenInfo(*(field[:, n:end] for field in info))
    empty = mixer.init_state(x.shape[0], x.shape[1], dtype)
    prefill_y, state = mixer.prefill(x[:, :n], head, empty, **given)
    decode_y, final = decode(mixer, x[:, n:end], tail, state, **given)
    return {
        "y": mixer(x, info, **given)[0],
        "prefill_y": prefill_y,
        "prefill_kv": state.linear.kv,
        "decode_y": decode_y,
        "final_kv": final.linear.kv,
    }


def tnl_v2_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["gate_rank"] == meta["head_dim"] and not meta["lrpe"] and not meta["bias"]
    config = LightningConfig(
        version=2,
        num_heads=meta["heads"],
        head_dim=meta["head_dim"],
        layer=meta["layer"],
        num_layers=meta["num_layers"],
        eps=meta["norm_eps"],
    )
    mixer = build(config, low_rank_params(w), width=meta["d_model"], dtype=dtype)
    given = scale_of_given_slopes(meta, x["slopes"], dtype)
    return {"y": mixer(x["x"], whole_rows(x["x"]), slope_scale=given)[0]}


def tnl_lm_tiny(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    sizes = meta["cfg"]
    assert sizes["tied"] and sizes["embed_scale"] == "sqrt(d)" and not meta["padding_in_data"]
    config = LightningModelConfig(
        num_layers=sizes["layers"],
        width=sizes["d"],
        num_heads=sizes["heads"],
        head_dim=meta["head_dim"],
        mlp_width=sizes["glu_dim"],
        lrpe_layers=tuple(np.flatnonzero(sizes["lrpe_list"]).tolist()),
        norm_eps=meta["norm_eps"],
    )
    scales = [slope_scale(layer, sizes["layers"]) for layer in range(sizes["layers"])]
    np.testing.assert_allclose(scales, meta["layer_scale_values"])
    args = {"vocab_size": sizes["vocab"], "dtype": dtype}
    plan = nnx.eval_shape(lambda: config.build(**args, rngs=nnx.Rngs(0))).stack.plan
    table = w["model.embed_tokens.weight"]
    params = {
        "embedding": {"table": jnp.pad(table, ((0, -len(table) % VOCAB_MULTIPLE), (0, 0)))},
        "stack": stacked([layer_params(w, i) for i in range(sizes["layers"])], plan),
    }
    model, ids = build(config, params, **args), x["ids"]
    hidden = model(ids, whole_rows(ids)).hidden
    logits = model.logits(hidden)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))
    return {"logits": logits, "hidden": hidden, "next_token_loss": loss}


KINDS: dict[str, Kind] = {
    "op": op,
    "slopes": slope_tables,
    "tnl_layer": tnl_layer,
    "tnl_v2_layer": tnl_v2_layer,
    "tnl_lm_tiny": tnl_lm_tiny,
}
CASES = golden_cases("lightning", whole_models=["tnl_lm_tiny"])


def test_golden_lightning_has_files():
    assert CASES, f"no lightning_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_lightning(path: Path, dtype: str):
    check_file(path, dtype, KINDS)
