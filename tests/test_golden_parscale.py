"""ParScale on a Qwen2 decoder against vectors made by its authors' code.

Every size comes from a file's `meta`; the arrays are the reference's, in its names and layouts.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, build, decode, kernel, load, stacked

from effattn.batch import TokenInfo, whole_rows
from effattn.models.parscale import ParScaleConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.decoder import Group
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.streams import fold, unfold

FILES = sorted(FOLDER.glob("parscale_*.npz"))


def dense(w: Arrays, name: str) -> dict:
    bias = {"bias": w[f"{name}.bias"]} if f"{name}.bias" in w else {}
    return {**kernel(w[f"{name}.weight"]), **bias}


def layer_params(w: Arrays, layer: int) -> dict:
    prefix = f"model.layers.{layer}."
    mixer = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    return {
        "mixer": {ours: dense(w, f"{prefix}self_attn.{their}") for ours, their in mixer.items()},
        "mlp": {ours: dense(w, f"{prefix}mlp.{their}") for ours, their in mlp.items()},
        "mixer_norm": {"scale": w[f"{prefix}input_layernorm.weight"]},
        "mlp_norm": {"scale": w[f"{prefix}post_attention_layernorm.weight"]},
    }


def prefixes(w: Arrays, layers: int) -> dict:
    """[streams, kv heads, length, head_dim] of every layer as [layers, streams, length, ...]."""
    return {
        ours: jnp.stack(
            [
                jnp.swapaxes(w[f"model.layers.{layer}.self_attn.{their}"], 1, 2)
                for layer in range(layers)
            ]
        )
        for ours, their in (("key", "prefix_k"), ("value", "prefix_v"))
    }


def padded(table: jax.Array) -> jax.Array:
    """Rows of zeros up to the multiple in which ours come."""
    return jnp.pad(table, ((0, -len(table) % VOCAB_MULTIPLE), (0, 0)))


def parscale(meta: dict, w: Arrays) -> Any:
    assert meta["backbone"] == "qwen2" and meta["hidden_act"] == "silu"
    assert not meta["o_bias"] and not meta["mlp_bias"] and not meta["rope_interleaved"]
    assert meta["aggregation"]["bias"] and meta["aggregation"]["hidden"] == meta["hidden_size"]
    layers = meta["num_layers"]
    config = ParScaleConfig(
        base=TransformerConfig(
            num_layers=layers,
            width=meta["hidden_size"],
            num_heads=meta["num_heads"],
            num_kv_heads=meta["num_kv_heads"],
            head_dim=meta["head_dim"],
            mlp_width=meta["intermediate_size"],
            rotary_base=meta["rope_base"],
            qkv_bias=meta["qkv_bias"],
            norm_eps=meta["rms_norm_eps"],
            tied=meta["tie_embeddings"],
        ),
        streams=meta["P"],
        prefix_length=meta["prefix_len"],
        smoothing=meta["smoothing"],
    )
    base = {
        "embedding": {"table": padded(w["model.embed_tokens.weight"])},
        "stack": stacked([layer_params(w, i) for i in range(layers)], (Group(("layer",), layers),)),
        "final_norm": {"scale": w["model.norm.weight"]},
    }
    if not meta["tie_embeddings"]:
        base["head"] = {"kernel": padded(w[meta["head"]]).T}
    params = {
        "base": base,
        "starts": {0: prefixes(w, layers)},
        "aggregation": {
            "inner": dense(w, "model.aggregate_layer.0"),
            "out": dense(w, "model.aggregate_layer.2"),
        },
    }
    return build(config, params, vocab_size=meta["vocab_size"], dtype=jnp.float32)


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))


def inside(model: Any, ids: jax.Array) -> Arrays:
    """What the reference shows of the way from tokens to the joined hidden state."""
    base, streams = model.base, model.streams
    rows = fold(whole_rows(ids), streams)
    x = fold(base.embedding(ids), streams)
    block, start = jax.tree.map(lambda leaf: leaf[0], (base.stack.blocks[0], model._arguments()[0]))
    first, _ = block(x, rows, **start)
    x, _ = base.stack(x, rows, arguments=model._arguments())
    hidden = unfold(base.final_norm(x), streams)
    return {
        "stream_hidden_layer1": first,
        "agg_mlp_in": model.aggregation.interleaved(hidden),
        "agg_mlp_out": model.aggregation.scores(hidden),
        "agg_hidden": model.aggregation(hidden)[0],
    }


def incremental(meta: dict, model: Any, ids: jax.Array) -> Arrays:
    """Logits of a prefill and single steps, and the first layer's cache behind its prefix."""
    info, first = whole_rows(ids), meta["prefill_len"]
    head, tail = (
        TokenInfo(*(field[:, part] for field in info))
        for part in (slice(first), slice(first, None))
    )
    state = model.init_state(*ids.shape, jnp.float32)
    logits, state = model.prefill(ids[:, :first], head, state)
    steps, state = decode(model, ids[:, first:], tail, state)
    cache = jax.tree.map(lambda leaf: leaf[0], state[0])
    prefix = jnp.repeat(model.starts[0]["key"][0], len(ids), axis=0)
    keys = jnp.concatenate([prefix, cache.key], axis=1)
    assert cache.key.shape[0] == meta["cache"]["batch"]
    return {
        "incremental_logits": jnp.concatenate([logits, steps], axis=1),
        "cache_k_layer0": jnp.swapaxes(keys, 1, 2),
        "cache_len_after": meta["prefix_len"] + cache.length,
    }


def check(name: str, got: Any, wanted: np.ndarray, *, rtol: float = 0, atol: float) -> None:
    assert np.shape(got) == wanted.shape, f"{name}: {np.shape(got)}, expected {wanted.shape}"
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol, err_msg=name)


def test_golden_parscale_has_files():
    assert FILES, f"no parscale_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.stem}")
def test_golden_parscale(path: Path):
    meta, arrays = load(path)
    assert meta["kind"] == "tiny", f"{path.name}: no test for kind {meta['kind']!r}"
    tolerance, prefix = meta["tolerance"], meta["param_prefix"]
    weights = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    ids = arrays["ids"]

    def forward(weights: Arrays) -> tuple[jax.Array, jax.Array]:
        model = parscale(meta, weights)
        logits = model.logits(model(ids, whole_rows(ids)).hidden)
        return cross_entropy(logits, ids), logits

    def rest(weights: Arrays) -> Arrays:
        model = parscale(meta, weights)
        mask = arrays["pad_attention_mask"].astype(bool)
        info = TokenInfo(arrays["pad_position_ids"], mask.astype(np.int32), mask)
        return {
            **inside(model, ids),
            **incremental(meta, model, ids),
            "pad_logits": model.logits(model(ids, info).hidden),
        }

    with jax.default_matmul_precision("highest"):
        (ce, logits), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(weights)
        found = {"ce": ce, "logits": logits, **jax.jit(rest)(weights)}

    assert set(found.pop("cache_len_after").tolist()) == {meta["cache"]["len_after"]}
    real = arrays["pad_attention_mask"].astype(bool)
    for name in meta["arrays"]["outputs"]:
        got, wanted = found[name], arrays[name]
        if name == "pad_logits":
            got, wanted = got[real], wanted[real]
        check(name, got, wanted, atol=tolerance["logits"])
    (objective,) = meta["objectives"]
    assert objective["terms"] == [{"loss": "ce", "weight": 1.0}]
    for name, of in objective["grads"].items():
        rtol, atol = tolerance["grad_rtol"], tolerance["grad_atol"]
        check(name, grads[of.removeprefix(prefix)], arrays[name], rtol=rtol, atol=atol)
