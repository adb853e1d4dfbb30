"""BASED against vectors made by its authors' code: outputs, decoding states and gradients.

Every `based_*.npz` in the folder that EFFATTN_GOLDEN names (default `tests/golden`) is one case;
its `meta` says the kind, every shape and hyperparameter, and the tolerance. Each kind below is a
function from the file's inputs and weights, under the reference's names, to its outputs.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models.based import BasedModelConfig
from effattn.nn.decoder import Group
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.based import BasedConfig, BasedState
from effattn.nn.mixers.short_conv import ShortConvConfig
from effattn.pallas_kernels.linear_attention import linear_attention
from effattn.pallas_kernels.linear_attention.features import (
    taylor_features,
    taylor_features_full,
    unpack_taylor_state,
)

FOLDER = Path(os.environ.get("EFFATTN_GOLDEN", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("based_*.npz"))
DTYPES = ("float64", "float32", "bfloat16")
# The files' bfloat16 tolerance is one of a layer; the roundings of a whole model compound (3%).
WHOLE_MODELS = ("lm_tiny",)

Arrays = dict[str, jax.Array]


# ---- our modules from the reference's parameters


def build(config: Any, params: dict, **kwargs: Any) -> nnx.Module:
    """The module of `config` with these parameters; shapes must be exactly ours."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: config.build(**kwargs, rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(abstract))
    return nnx.merge(graphdef, params)


def kernel(weight: jax.Array) -> dict:
    """torch's [out, in] as our [in, out]."""
    return {"kernel": weight.T}


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
KINDS = {"baseconv": "conv", "linear_attention": "linear", "sliding_attention": "window"}


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
    blocks, first = {}, 0
    for pattern, repeats in plan:
        last = first + len(pattern) * repeats
        for place in range(len(pattern)):
            same = layers[first + place : last : len(pattern)]
            blocks[len(blocks)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
        first = last
    table = w["transformer.embeddings.word_embeddings.weight"]
    return {
        "embedding": {"table": jnp.pad(table, ((0, -len(table) % VOCAB_MULTIPLE), (0, 0)))},
        "stack": {"blocks": blocks},
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
    steps, state = decode(mixer, x["x"][:, : meta["step_len"]], info, None)
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

    def full(state: BasedState) -> tuple[jax.Array, jax.Array]:
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
    kinds = [KINDS[kind] for kind in meta["mixer_types"]]
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


KIND_TESTS: dict[str, Callable[[dict, Arrays, Arrays, Any], Arrays]] = {
    "op_naive": op_naive,
    "taylor": taylor,
    "baseconv_layer": baseconv_layer,
    "linear_attention_layer": linear_attention_layer,
    "sliding_attention_layer": sliding_attention_layer,
    "lm_tiny": lm_tiny,
}


def decode(mixer: Any, x: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
    """All of x token by token, from `state` or from an empty one."""
    if state is None:
        state = mixer.init_state(x.shape[0], x.shape[1], x.dtype)

    def body(state: Any, token: Any) -> tuple[Any, jax.Array]:
        y, state = mixer.step(*token, state)
        return state, y

    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, info))
    state, y = jax.lax.scan(body, state, by_time)
    return jnp.swapaxes(y, 0, 1), state


# ---- the harness


def error(got: Any, wanted: np.ndarray) -> float:
    """max|got - wanted| / max(1, max|wanted|), the metric of the files."""
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, f"shape {got.shape}, expected {wanted.shape}"
    return float(np.max(np.abs(got - wanted)) / max(1.0, np.max(np.abs(wanted))))


def check_part(meta: dict, arrays: dict[str, np.ndarray], prefix: str, dtype: str) -> None:
    """One set of inputs: outputs, and the gradients of the objectives that belong to it.

    prefix: "" or, in files of several cases, the case's own ("c0.").
    """
    run = KIND_TESTS[meta["kind"]]
    inputs = {n: a for n, a in arrays.items() if n.startswith((f"{prefix}in.", f"{prefix}w."))}
    objectives = [
        o for o in meta["objectives"] if all(n.startswith(prefix) for n in o["grads"].values())
    ]

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, None if array.dtype.kind in "iu" else dtype)

    def outputs_of(values: Arrays) -> Arrays:
        part = {
            kind: {n.removeprefix(k): v for n, v in values.items() if n.startswith(k)}
            for kind, k in (("in", f"{prefix}in."), ("w", f"{prefix}w."))
        }
        return run(meta, part["in"], part["w"], jnp.dtype(dtype))

    def objective(values: Arrays, terms: list[dict]) -> jax.Array:
        outputs, total = outputs_of(values), 0.0
        for term in terms:
            name = term.get("loss", term.get("output"))
            value = outputs[name.removeprefix(f"{prefix}out64.")]
            if "cotangent" in term:
                value = jnp.sum(value * cast(arrays[term["cotangent"]]))
            total += term["weight"] * value
        return total

    @jax.jit
    def everything(values: Arrays) -> tuple[Arrays, list[Arrays]]:
        grads = []
        if dtype != "bfloat16":
            for o in objectives:
                at = {name: values[name] for name in set(o["grads"].values()) | norms}
                rest = {name: v for name, v in values.items() if name not in at}
                value = lambda at, o=o, rest=rest: objective({**rest, **at}, o["terms"])  # noqa: E731
                grads.append(jax.grad(value)(at))
        return outputs_of(values), grads

    norms = {n.replace("gradnorm64.", "w.") for n in arrays if n.startswith("gradnorm64.")}
    outputs, grads = everything({name: cast(array) for name, array in inputs.items()})
    tolerance = meta["tolerance"]
    stored = {n for n in arrays if n.startswith((f"{prefix}out64.", f"{prefix}out32."))}
    assert stored, "the file has no outputs"
    for name in stored:
        got = outputs[name.split(".")[-1]]
        wanted = arrays[name]
        if name.endswith("step_state"):
            wanted = wanted[..., wanted.shape[-1] - got.shape[-1] :]
        if "out32." in name and dtype == "float64":
            continue
        assert error(got, wanted) <= tolerance[dtype], f"{name}: {error(got, wanted)}"
    for o, gradients in zip(objectives, grads, strict=False):
        for name, of in o["grads"].items():
            off = error(gradients[of], arrays[name])
            assert off <= tolerance[f"grad_{dtype}"], f"{name}: {off}"
        for of in norms:
            wanted = arrays[of.replace("w.", "gradnorm64.", 1)]
            off = error(jnp.linalg.norm(gradients[of].reshape(-1)), wanted)
            assert off <= tolerance[f"grad_{dtype}"], f"norm of the gradient of {of}: {off}"


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) of a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return json.loads(str(file["meta"])), arrays


def test_golden_based_has_files():
    assert len(FILES) > 0, f"no based_*.npz in {FOLDER}: the family is unchecked"


CASES = [
    pytest.param(path, dtype, id=f"golden-{path.stem}-{dtype}")
    for path in FILES
    for dtype in DTYPES
    if not (dtype == "bfloat16" and load(path)[0]["kind"] in WHOLE_MODELS)
]


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_based(path: Path, dtype: str):
    meta, arrays = load(path)
    known = ", ".join(KIND_TESTS)
    assert meta["kind"] in KIND_TESTS, f"{path.name}: no test for kind {meta['kind']!r} ({known})"
    assert set(arrays) == {n for names in meta["arrays"].values() for n in names}
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        for case in meta.get("cases", [None]):
            check_part(meta, arrays, "" if case is None else f"{case}.", dtype)
