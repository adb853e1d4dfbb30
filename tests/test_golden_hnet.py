"""H-Net against vectors made by its authors' code.

Each kind of file is a function below: from its arrays, under the reference's names, to its outputs.
What is differentiated and tolerated stands in the files' `meta`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, build, decode, kernel, load, stacked

from effattn.batch import TokenInfo, whole_rows
from effattn.models.hnet import HNetConfig
from effattn.nn.chunking import Router, dechunk, ratio_loss
from effattn.nn.compact import CapacityConfig, compact, sources, with_capacity
from effattn.nn.decoder import plan_groups
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.layout import parse_layout


class RouterConfig:
    """What `build` wants of a config."""

    def __init__(self, width: int):
        self.width = width

    def build(self, rngs: Any) -> Router:
        return Router(self.width, rngs=rngs)


def packed_info(cu_seqlens: np.ndarray) -> TokenInfo:
    """One row that holds every document of the packed arrays."""
    lengths = np.diff(cu_seqlens)
    segments = jnp.asarray(np.repeat(np.arange(1, len(lengths) + 1), lengths)[None])
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths])[None])
    return TokenInfo(positions, segments, segments > 0)


def one_by_one(step: Any, state: Any, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    """step(slices [batch, 1, ...] and their info, state) over axis 1: (outputs joined, state)."""
    outputs = []
    for t in range(arrays[0].shape[1]):
        parts = [a[:, t : t + 1] for a in arrays]
        y, state = step(*parts, whole_rows(parts[0], start=t), state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


# ---- one function per kind: (meta, arrays) -> outputs by the reference's names; without
# `everything` at least those that are differentiated


def routing(meta: dict, x: Arrays, everything: bool = True) -> Arrays:
    assert meta["threshold"] == 0.5 and meta["clip"] == [0.0, 1.0] and meta["norm_eps"] == 1e-12
    hidden, n = x["hidden"], meta["prefill_len"]
    router = build(RouterConfig(meta["d_model"]), {"query": x["w_q"].T, "key": x["w_k"].T})
    everywhere = whole_rows(hidden)  # the reference routes padding like any token
    found, _ = router(hidden, everywhere)
    packed, _ = router(x["packed_hidden"][None], packed_info(np.asarray(meta["packed_cu_seqlens"])))
    eye = jnp.eye(meta["d_model"], dtype=hidden.dtype)
    identity, _ = build(RouterConfig(meta["d_model"]), {"query": eye, "key": eye})(
        hidden, everywhere
    )

    def step(x: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        found, state = router(x, info, state)
        return found.probability, state

    empty = router.init_state(len(hidden), meta["d_model"], hidden.dtype)
    steps, _ = one_by_one(step, empty, hidden)
    _, after = router(hidden[:, :n], whole_rows(hidden[:, :n]), empty)
    later, _ = one_by_one(step, after, hidden[:, n:])
    outputs = {
        "boundary_prob": found.probability,
        "boundary_mask": found.begins & x["mask"],
        "selected_prob": found.confidence,
        "packed_boundary_prob": packed.probability[0],
        "packed_boundary_mask": packed.begins[0],
        "identity_boundary_prob": identity.probability,
        "identity_boundary_mask": identity.begins,
        "step_boundary_prob": steps,
        "postprefill_step_prob": later,
    }
    masked, _ = router(hidden, whole_rows(hidden, jnp.asarray(meta["lens"])))
    outputs["masked"] = jnp.where(x["mask"], masked.probability, found.probability)
    for entry in meta["ratio_arrays"]:
        begins = found.begins & x["mask"]
        loss = ratio_loss(begins, found.probability, jnp.asarray(begins.size), entry["N"])
        outputs[entry["loss"]] = loss
    return outputs


def chunk_dechunk(meta: dict, x: Arrays, everything: bool = True) -> Arrays:
    assert (
        meta["ema_clip"] == [1e-4, 1 - 1e-4] and meta["inner"]["formula"] == "tanh(scale*x + shift)"
    )
    scale, shift = meta["inner"]["scale"], meta["inner"]["shift"]

    def inner(rows: jax.Array, info: TokenInfo | None = None) -> tuple[jax.Array, None]:
        return jnp.tanh(scale * rows + shift), None

    def through(hidden: Any, p: Any, keep: Any, info: TokenInfo, pooled: bool) -> jax.Array:
        capacity = CapacityConfig(mode="bucket", rungs=(0.2, 0.7, 1.0), pooled=pooled).build()
        chunks, _, _ = with_capacity(inner, hidden, info, keep, capacity)
        return dechunk(chunks, p, keep, info)[0]

    hidden, p, keep = x["hidden"], x["boundary_prob"], x["boundary_mask"]
    info = whole_rows(hidden, jnp.asarray(meta["lens"]))
    rows, source, _ = compact(hidden, keep, meta["max_chunks"])

    def step(z: Any, p: Any, keep: Any, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        return dechunk(z, p, keep, info, state)

    empty = jax.tree.map(jnp.zeros_like, dechunk(hidden, p, keep, info)[1])
    steps, _ = one_by_one(step, empty, inner(hidden)[0], p, keep)
    packed = packed_info(np.asarray(meta["packed_cu_seqlens"]))
    packed_keep, packed_p = x["packed_boundary_mask"][None], x["packed_boundary_prob"][None]
    documents = range(1, len(meta["packed_cu_seqlens"]))
    counts = jnp.stack([jnp.sum(packed_keep & (packed.segment_ids == d)) for d in documents])
    total = int(meta["arrays_shape"]["packed_chunked_hidden"][0])
    packed_rows, _, _ = compact(x["packed_hidden"][None], packed_keep, total)
    valid = source < hidden.shape[1]
    return {
        "chunked_hidden": rows,
        "chunked_mask": valid,
        "inner_out": inner(rows)[0],
        "dechunk_out": through(hidden, p, keep, info, pooled=True),
        "dechunk_out_bf16ema": through(hidden, p, keep, info, pooled=False),
        "step_out": steps,
        "packed_chunked_hidden": packed_rows[0],
        "packed_next_cu_seqlens": jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(counts)]),
        "packed_next_max_seqlen": jnp.max(counts),
        "packed_inner_out": inner(packed_rows)[0][0],
        "packed_dechunk_out": through(
            x["packed_hidden"][None], packed_p, packed_keep, packed, pooled=False
        )[0],
    }


def tiny(meta: dict, x: Arrays, everything: bool = True) -> Arrays:
    config = tiny_config(meta)
    model = build(config, tiny_params(meta, x), vocab_size=meta["vocab_size"], dtype=jnp.float32)
    ids, mask = x["ids"], x["mask"]
    info = whole_rows(ids, jnp.asarray(meta["lens"]))
    out = model(ids, info)
    logits = model.logits(out.hidden)
    weights = x["loss_mask"].astype(logits.dtype)
    picked = jnp.take_along_axis(logits, jnp.roll(ids, -1, axis=1)[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    outputs = {"logits": logits, "ce": jnp.sum(nats * weights) / jnp.sum(weights)}
    total = outputs["ce"]
    # The reference's losses are means over padding too, which its stages process as tokens.
    for stage, found in enumerate(padded_stages(model, meta, ids, mask)):
        for name, value in found.items():
            outputs[f"stage{stage}_{name}"] = value
        total += meta["ratio_loss_weight"] * found["ratio_loss"]
    outputs["total_loss"] = total
    if not everything:
        return outputs
    found = model.boundaries(ids, info)
    outputs["stage0_boundary_prob"] = found[0].probability
    outputs["stage0_boundary_mask"] = found[0].begins

    if meta["packed"] is not None:
        packed = packed_info(np.asarray(meta["packed"]["cu_seqlens"]))
        row = ids.reshape(1, -1)
        outputs["packed_logits"] = model.logits(model(row, packed).hidden).reshape(logits.shape)
        for stage, found in enumerate(model.boundaries(row, packed)):
            name = f"packed_stage{stage}_boundary_prob"
            p = found.probability
            if stage:  # at the chunks of the stage before
                count = int(meta["arrays_shape"][name][0])
                p = compact(p, model.boundaries(row, packed)[stage - 1].begins, count)[0]
            outputs[name] = p[0]

    n, at = meta["decode"]["prefill_len"], meta["decode"]["row"]
    row = ids[at : at + 1]
    info = whole_rows(row)
    head = TokenInfo(*(field[:, :n] for field in info))
    tail = TokenInfo(*(field[:, n:] for field in info))
    state = model.init_state(1, row.shape[1], jnp.float32)
    outputs["prefill_logits"], state = model.prefill(row[:, :n], head, state)
    outputs["step_logits"], _ = decode(model, row[:, n:], tail, state)
    reached, steps = jnp.ones(row.shape, bool), []
    for found in model.boundaries(row, info):
        steps.append(jnp.where(reached, found.probability, meta["decode"]["not_reached"])[0, n:])
        reached = found.begins
    outputs["step_boundary_prob"] = jnp.stack(steps, axis=-1)
    return outputs


def padded_stages(model: Any, meta: dict, ids: jax.Array, mask: jax.Array) -> list[dict]:
    """Probabilities, boundaries and ratio loss of every stage as the reference pads them.

    A row's chunks are followed by the tokens that begin none, up to the longest row's chunks.
    """
    stage, x, results = model.stack, model._embed(ids), []
    for s, target in enumerate(meta["ratio_N"]):
        info = whole_rows(x)
        encoded, _, _ = stage.encoder(x, info, capacity=CapacityConfig().build())
        found, _ = stage.router(encoded, info)
        begins = found.begins & mask
        loss = ratio_loss(begins, found.probability, jnp.asarray(begins.size), target)
        results.append(
            {"boundary_prob": found.probability, "boundary_mask": begins, "ratio_loss": loss}
        )
        if s + 1 < len(meta["ratio_N"]):
            longest = int(meta["arrays_shape"][f"stage{s + 1}_boundary_prob"][1])
            order = jnp.argsort(~begins, axis=1, stable=True)[:, :longest]
            x = stage._widen(jnp.take_along_axis(encoded, order[..., None], axis=1))
            mask = sources(begins, longest)[0] < begins.shape[1]
            stage = stage.inner
    return results


def tiny_config(meta: dict) -> HNetConfig:
    assert meta["rope_interleaved"] is False and meta["ratio_loss_weight"] == 0.03
    ssm = meta["ssm"]
    return HNetConfig(
        layout=json.dumps(meta["arch_layout"]),
        width=meta["d_model"][0],
        inner_widths=tuple(meta["d_model"][1:]),
        mlp_widths=tuple(meta["mlp_width"]),
        num_heads=tuple(meta["num_heads"]),
        rotary_dims=tuple(meta["rotary_emb_dim"]),
        windows=tuple(None if w < 0 else w for w in meta["window_size"]),
        rotary_base=meta["rope_base"],
        state_dim=ssm["d_state"],
        ssm_head_dim=ssm["headdim"],
        expand=ssm["expand"],
        conv_kernel=ssm["d_conv"],
        num_groups=ssm["ngroups"],
        targets=tuple(meta["ratio_N"]),
        norm_eps=meta["norm_eps"],
        tied=meta["tie_embeddings"],
    )


def tiny_params(meta: dict, x: Arrays) -> dict:
    w = {n.removeprefix(meta["param_prefix"]): a for n, a in x.items() if n.startswith("param/")}
    rows = ((0, -meta["vocab_size"] % VOCAB_MULTIPLE), (0, 0))
    layout = parse_layout(json.dumps(meta["arch_layout"]))
    params = {
        "embedding": {"table": jnp.pad(w["embeddings.weight"], rows)},
        "stack": stage_params(meta, w, layout, f"{meta['backbone']}."),
    }
    if not meta["tie_embeddings"]:
        params["head"] = {"kernel": jnp.pad(w["lm_head.weight"], rows).T}
    return params


def stage_params(meta: dict, w: Arrays, layout: Any, prefix: str) -> dict:
    if layout.inner is None:
        return stack_params(meta, w, layout.encoder, f"{prefix}main_network.")
    inner = f"{prefix}main_network."
    params = {
        "encoder": stack_params(meta, w, layout.encoder, f"{prefix}encoder."),
        "decoder": stack_params(meta, w, layout.decoder, f"{prefix}decoder."),
        "router": {
            "query": w[f"{prefix}routing_module.q_proj_layer.weight"].T,
            "key": w[f"{prefix}routing_module.k_proj_layer.weight"].T,
        },
        "residual": {
            "kernel": w[f"{prefix}residual_proj.weight"].T,
            "bias": w[f"{prefix}residual_proj.bias"],
        },
        "inner": stage_params(meta, w, layout.inner, inner),
    }
    if f"{inner}pad_dimension" in w:
        params["widening"] = w[f"{inner}pad_dimension"]
    return params


def stack_params(meta: dict, w: Arrays, layers: str, prefix: str) -> dict:
    made = [layer_params(meta, w, f"{prefix}layers.{i}.", c) for i, c in enumerate(layers)]
    params = {"norm": {"scale": w[f"{prefix}rmsnorm.weight"]}}
    return {**params, "stack": stacked(made, plan_groups(layers))}


def layer_params(meta: dict, w: Arrays, prefix: str, letter: str) -> dict:
    mixer = {
        n.removeprefix(f"{prefix}mixer."): a
        for n, a in w.items()
        if n.startswith(f"{prefix}mixer.")
    }
    params = {
        "mixer_norm": {"scale": w[f"{prefix}norm1.weight"]},
        "mixer": attention_params(mixer) if letter in "tT" else ssd_params(meta, mixer),
    }
    if letter.isupper():
        up, gate = jnp.split(w[f"{prefix}mlp.fc1.weight"], 2)
        params["mlp_norm"] = {"scale": w[f"{prefix}norm2.weight"]}
        params["mlp"] = {
            "up": kernel(up),
            "gate": kernel(gate),
            "down": kernel(w[f"{prefix}mlp.fc2.weight"]),
        }
    return params


def attention_params(w: Arrays) -> dict:
    query, key, value = map(kernel, jnp.split(w["Wqkv.weight"], 3))
    return {"query": query, "key": key, "value": value, "out": kernel(w["out_proj.weight"])}


def ssd_params(meta: dict, w: Arrays) -> dict:
    inner, groups = len(w["norm.weight"]), meta["ssm"]["ngroups"] * meta["ssm"]["d_state"]
    widths = np.cumsum([inner, inner, groups, groups])
    kernels = map(kernel, jnp.split(w["in_proj.weight"], widths))
    params = dict(zip(("gate", "value", "key", "query", "step_size"), kernels, strict=True))
    taps = jnp.split(w["conv1d.weight"][:, 0].T, widths[1:3] - inner, axis=1)
    biases = jnp.split(w["conv1d.bias"], widths[1:3] - inner)
    for name, tap, bias in zip(("value", "key", "query"), taps, biases, strict=True):
        params[f"{name}_conv"] = {"kernel": tap, "bias": bias}
    params["step_bias"], params["log_rate"], params["skip"] = w["dt_bias"], w["A_log"], w["D"]
    return {**params, "norm_scale": w["norm.weight"], "out": kernel(w["out_proj.weight"])}


KINDS = {"routing": routing, "chunk_dechunk": chunk_dechunk, "tiny": tiny}


# ---- the comparison


def tolerance_of(meta: dict, name: str) -> float:
    tolerance = meta["tolerance"]
    if name.endswith("bf16ema"):
        return tolerance["bf16ema"]
    if "ratio_loss_N" in name:
        return tolerance["ratio"]
    if "logits" in tolerance:
        return tolerance["probs" if "prob" in name else "logits"]
    return tolerance[meta["dtype"]]


# The model of two stages has every part of the model of one; Mamba's mixer has vectors of its own.
SLOW = ("hnet_tiny_model", "hnet_tiny_mamba")
FILES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted(FOLDER.glob("hnet_*.npz"))
]


def test_golden_hnet_has_files():
    assert FILES, f"no hnet_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize("path", FILES)
def test_golden_hnet(path: Path):
    meta, arrays = load(path)
    meta["arrays_shape"] = {name: array.shape for name, array in arrays.items()}
    roles, dtype = meta["arrays"], meta["dtype"]
    assert set(arrays) == {name for names in roles.values() for name in names}
    given = {n: arrays[n] for role in ("inputs", "weights") for n in roles.get(role, [])}
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        values = {
            n: jnp.asarray(a, None if a.dtype.kind in "iub" else dtype) for n, a in given.items()
        }

        def total(at: Arrays, objective: dict) -> jax.Array:
            outputs = KINDS[meta["kind"]](meta, {**values, **at}, everything=False)
            if "value" in objective:
                return outputs[objective["value"]]
            return sum(
                t["weight"] * jnp.sum(outputs[t["output"]] * arrays[t["cotangent"]])
                if "cotangent" in t
                else t["weight"] * outputs[t["loss"]]
                for t in objective["terms"]
            )

        @jax.jit
        def everything(values: Arrays) -> tuple[Arrays, list[Arrays]]:
            gradients = [
                jax.grad(total)({n: values[n] for n in o["grads"].values()}, o)
                for o in meta["objectives"]
            ]
            return KINDS[meta["kind"]](meta, values), gradients

        outputs, gradients = everything(values)
    if "masked" in outputs:  # padding told by the model's own mask changes nothing
        np.testing.assert_allclose(outputs["masked"], arrays["boundary_prob"], atol=1e-10)
    for name in roles["outputs"]:
        got, wanted = np.asarray(outputs[name]), arrays[name]
        assert got.shape == wanted.shape, name
        where = meta.get("compare_mask", {}).get(name)
        if where is not None:
            mask = arrays[where]
            got, wanted = got[mask], wanted[mask]
        if wanted.dtype.kind in "iub":
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        else:
            atol = tolerance_of(meta, name)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=name)
    for objective, of in zip(meta["objectives"], gradients, strict=True):
        ratio = (
            any("ratio" in str(t.get("loss")) for t in objective["terms"]) and dtype == "float64"
        )
        for name, at in objective["grads"].items():
            tolerance = meta["tolerance"]
            atol = tolerance.get("grad_atol", tolerance.get("grad_float32", tolerance.get(dtype)))
            atol, rtol = (tolerance["ratio"] if ratio else atol), tolerance.get("grad_rtol", 0)
            np.testing.assert_allclose(of[at], arrays[name], rtol=rtol, atol=atol, err_msg=name)
