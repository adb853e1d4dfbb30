"""BASED against vectors made by its authors' code: outputs, decoding states and gradients.

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
from effattn.models.based import BasedModelConfig
from effattn.nn.decoder import Group
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.linear_state import DocumentState
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.based import BasedConfig
from effattn.nn.mixers.short_conv import ShortConvConfig
from effattn.pallas_kernels.linear_attention import linear_attention
from effattn.pallas_kernels.linear_attention.features import (
    taylor_features,
    taylor_features_full,
    unpack_taylor_state,
)

# ---- our parameters from the reference's


def conv_params(w: Arrays, prefix: str) -> dict:
    inner, gate = jnp.split(w[f"{prefix}in_proj.weight"], 2)
    params = {
        "inner": kernel(inner),
        "gate": kernel(gate),
        "out": kernel(w[f"{prefix}out_proj.weight"]),
        "conv": {"kernel": w[f"{prefix}conv.conv.weight"][:, 0].T},
    }
    if f"{prefix}in_proj.bias" in w:
        params["inner"]["bias"], params["gate"]["bias"] = jnp.split(w[f"{prefix}in_proj.bias"], 2)
        params["out"]["bias"] = w[f"{prefix}out_proj.bias"]
    return params


def linear_params(w: Arrays, prefix: str) -> dict:
    names = {"query": "proj_q", "key": "proj_k", "value": "proj_v", "out": "out_proj"}
    return {ours: kernel(w[f"{prefix}{theirs}.weight"]) for ours, theirs in names.items()}


def window_params(w: Arrays, prefix: str) -> dict:
    query, key, value = map(kernel, jnp.split(w[f"{prefix}Wqkv.weight"], 3))
    out = kernel(w[f"{prefix}out_proj.weight"])
    return {"query": query, "key": key, "value": value, "out": out}


MIXER_PARAMS = {"conv": conv_params, "linear": linear_params, "window": window_params}
MIXER_TYPES = {"baseconv": "conv", "linear_attention": "linear", "sliding_attention": "window"}


def model_params(w: Arrays, kinds: list[str], plan: tuple[Group, ...]) -> dict:
    layers = []
    for i, kind in enumerate(kinds):
        prefix = f"transformer.layers.{i}."
        up, gate = jnp.split(w[f"{prefix}mlp.fc1.weight"], 2)
        down = kernel(w[f"{prefix}mlp.fc2.weight"])
        layers.append(
            {
                "mixer": MIXER_PARAMS[kind](w, f"{prefix}mixer."),
                "mixer_norm": {"scale": w[f"{prefix}norm1.weight"]},
                "mlp": {"up": kernel(up), "gate": kernel(gate), "down": down},
                "mlp_norm": {"scale": w[f"{prefix}norm2.weight"]},
            }
        )
    table = w["transformer.embeddings.word_embeddings.weight"]
    return {
        "embedding": {"table": jnp.pad(table, ((0, -len(table) % VOCAB_MULTIPLE), (0, 0)))},
        "stack": stacked(layers, plan),
        "final_norm": {"scale": w["transformer.ln_f.weight"]},
    }


# ---- one function per kind: (meta, inputs, weights, dtype) -> outputs by the reference's names


def op_naive(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    heads_last = {name: jnp.swapaxes(array, 1, 2) for name, array in x.items()}
    outputs = {}
    for name, normalize in meta["use_norm"].items():
        out, _ = linear_attention(
            heads_last["q"],
            heads_last["k"],
            heads_last["v"],
            feature_map="taylor",
            normalize=normalize,
            eps=meta["eps"],
            scale=meta["scale_value"],
            chunk_size=meta["chunk_size"],
        )
        outputs[name.removeprefix("out64.")] = jnp.swapaxes(out, 1, 2)
    return outputs


def taylor(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    dot = jnp.sum(taylor_features(x["x"]) * taylor_features(x["y"]), axis=-1)
    return {"phi": taylor_features_full(x["x"]), "dot": dot}


def baseconv_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert not meta["conv_bias"], "our short convolution has no bias of its own"
    config = ShortConvConfig(
        kernel_size=meta["kernel_size"], expand=meta["expand_proj"], use_bias=meta["proj_bias"]
    )
    mixer = build(config, conv_params(w, ""), width=meta["d_model"], dtype=dtype)
    info = whole_rows(x["x"])
    steps, state = decode(mixer, x["x"][:, : meta["step_len"]], info)
    return {
        "y": mixer(x["x"], info)[0],
        "step_y": steps,
        # The reference also keeps the oldest of its kernel_size inputs, which nothing reads again.
        "step_state": jnp.swapaxes(state.inputs, 1, 2),
    }


def linear_attention_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["feature_map"] == "taylor_exp" and meta["feature_full"]
    assert not meta["rope"] and not meta["bias"]
    config = BasedConfig(
        num_heads=meta["heads"],
        head_dim=meta["value_head_dim"],
        feature_dim=meta["feature_dim"],
        eps=meta["eps"],
    )
    mixer = build(config, linear_params(w, ""), width=meta["d_model"], dtype=dtype)
    x, info = x["x"], whole_rows(x["x"])
    n = meta["prefill_len"]
    head = TokenInfo(*(field[:, :n] for field in info))
    tail = TokenInfo(*(field[:, n : n + meta["decode_len"]] for field in info))
    empty = mixer.init_state(x.shape[0], x.shape[1], dtype)
    prefill_y, state = mixer.prefill(x[:, :n], head, empty)
    decode_y, final = decode(mixer, x[:, n : n + meta["decode_len"]], tail, state)

    def full(state: DocumentState) -> tuple[jax.Array, jax.Array]:
        """kv [b, h, 1, e, phi] and k [b, h, 1, 1, phi], as the reference lays them out."""
        kv = unpack_taylor_state(state.linear.kv, meta["feature_dim"], axis=-2)
        k = unpack_taylor_state(state.linear.normalizer, meta["feature_dim"], axis=-1)
        return jnp.swapaxes(kv, -1, -2)[:, :, None], k[:, :, None, None]

    outputs = {"y": mixer(x, info)[0], "prefill_y": prefill_y, "decode_y": decode_y}
    outputs["prefill_kv_state"], outputs["prefill_k_state"] = full(state)
    outputs["final_kv_state"], outputs["final_k_state"] = full(final)
    return outputs


def sliding_attention_layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["causal"] and not meta["bias"] and not meta["rope_interleaved"]
    config = AttentionConfig(
        num_heads=meta["heads"],
        head_dim=meta["head_dim"],
        window=meta["left_window_used"],
        rotary_dim=meta["rotary_dim"],
        rotary_base=meta["rope_base"],
    )
    np.testing.assert_allclose(meta["scale_value"], meta["head_dim"] ** -0.5)
    mixer = build(config, window_params(w, ""), width=meta["d_model"], dtype=dtype)
    return {"y": mixer(x["x"], whole_rows(x["x"]))[0]}


def lm_tiny(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    linear, window, conv = meta["linear_attention"], meta["sliding_attention"], meta["baseconv"]
    assert meta["position_embedding"] is None and meta["embedding_scale"] == 1.0
    assert meta["tie_embeddings"] and not meta["mlp"]["bias"]
    assert window["rotary_dim"] == meta["head_dim"]
    kinds = [MIXER_TYPES[kind] for kind in meta["mixer_types"]]
    config = BasedModelConfig(
        num_layers=meta["num_layers"],
        width=meta["d_model"],
        pattern=tuple(kinds),
        num_heads=meta["heads"],
        head_dim=meta["head_dim"],
        feature_dim=linear["feature_dim"],
        window=window["left_window_used"],
        conv_kernel=conv["kernel_size"],
        conv_expand=conv["expand_proj"],
        mlp_width=meta["mlp"]["width"],
        rotary_base=window["rope_base"],
        linear_eps=linear["eps"],
        norm_eps=meta["norm_eps"],
    )
    vocab_size = w["transformer.embeddings.word_embeddings.weight"].shape[0]
    build_args = {"vocab_size": vocab_size, "dtype": dtype}
    plan = nnx.eval_shape(lambda: config.build(**build_args, rngs=nnx.Rngs(0))).stack.plan
    model = build(config, model_params(w, kinds, plan), **build_args)
    ids = x["ids"]
    logits = model.logits(model(ids, whole_rows(ids)).hidden)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))
    return {"logits": logits, "next_token_loss": loss}


KINDS: dict[str, Kind] = {
    "op_naive": op_naive,
    "taylor": taylor,
    "baseconv_layer": baseconv_layer,
    "linear_attention_layer": linear_attention_layer,
    "sliding_attention_layer": sliding_attention_layer,
    "lm_tiny": lm_tiny,
}


CASES = golden_cases("based", whole_models=["lm_tiny"])


def test_golden_based_has_files():
    assert CASES, f"no based_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_based(path: Path, dtype: str):
    check_file(path, dtype, KINDS, last_columns=["step_state"])
