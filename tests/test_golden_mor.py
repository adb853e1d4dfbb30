"""Mixture-of-Recursions against vectors made by its authors' code: whole models, built from `meta`.

Selected tokens must be the reference's exactly. Tied parameters are stored once, and their
gradients are sums over the recursions.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import FOLDER, Arrays, build, kernel, load, stacked

from effattn.batch import whole_rows
from effattn.models.mor import MoR, MoRConfig
from effattn.nn.decoder import plan_groups
from effattn.nn.depth_choice import Level, assembled
from effattn.nn.layers import VOCAB_MULTIPLE

FILES = sorted(FOLDER.glob("mor_*.npz"))


def config_of(meta: dict) -> MoRConfig:
    assert meta["rope_position"] == "original positions" and meta["ln_share"]
    assert not meta["rand_router"] and meta["capacity_warmup_steps"] == 0
    expert = meta["type"] == "expert"
    names = {"loss": "loss", "loss_free": "loss_free", None: "none"}
    return MoRConfig(
        num_layers=meta["num_layers_unrolled"],
        width=meta["hidden_size"],
        num_heads=meta["num_heads"],
        num_kv_heads=meta["num_kv_heads"],
        head_dim=meta["head_dim"],
        mlp_width=meta["intermediate_size"],
        rotary_base=meta["rope_base"],
        norm_eps=meta["rms_norm_eps"],
        tied=meta["tie_embeddings"],
        num_recursions=meta["num_recursion"],
        sharing=meta["sharing"],
        routing=meta["type"],
        router=meta["router_type"],
        score=meta["router_func"] or "identity",
        alpha=meta["alpha"],
        temperature=meta["temperature"],
        gating=meta["gating"],
        capacities=tuple(meta["capacity"]) if expert else None,
        sampling=meta["sampling"] if expert else "aux_loss",
        sampling_coeff=meta["sampling_coeff"] or 0.0,
        z_coeff=meta["z_coeff"] if meta["z_loss"] else 0.0,
        balance=names[meta["balancing"]],
        balance_coeff=meta["balancing_coeff"] or 0.0,
        kv="shared" if meta["kv_sharing"]["enable"] else "recursion",
        update_cache=bool(meta["kv_sharing"]["update_cache"]),
    )


# ---- our parameters from the reference's


def layer_params(w: Arrays, prefix: str) -> dict:
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    mixer = {ours: kernel(w[f"{prefix}self_attn.{t}_proj.weight"]) for ours, t in attention.items()}
    mlp = {name: kernel(w[f"{prefix}mlp.{name}_proj.weight"]) for name in ("gate", "up", "down")}
    norms = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    scales = {ours: {"scale": w[f"{prefix}{theirs}.weight"]} for ours, theirs in norms.items()}
    return {"mixer": mixer, "mlp": mlp, **scales}


def router_params(w: Arrays, prefix: str) -> dict:
    if f"{prefix}.router.weight" in w:
        return kernel(w[f"{prefix}.router.weight"])
    return {"hidden": w[f"{prefix}.router.0.weight"].T, **kernel(w[f"{prefix}.router.2.weight"])}


def model_params(meta: dict, w: Arrays, plan: Any) -> dict:
    """w: the parameters without `param/`."""
    layers, table = meta["layers"], w[meta["layers"]["embed"]]
    stack = stacked([layer_params(w, prefix) for prefix in layers["shared"]], plan)
    heads = [router_params(w, prefix) for prefix in layers["routers"]]
    recursions: dict[str, Any] = {"stack": stack}
    if meta["type"] == "expert":
        recursions["routers"] = dict(enumerate(heads))
        if layers["aux_routers"]:
            aux = [router_params(w, prefix) for prefix in layers["aux_routers"]]
            recursions["aux_routers"] = dict(enumerate(aux))
    else:
        recursions["router"] = heads[0]
        if meta["selection_bias"]:
            recursions["bias"] = w[meta["selection_bias"].removeprefix(meta["param_prefix"])]
    return {
        "embedding": {"table": jnp.pad(table, ((0, -len(table) % VOCAB_MULTIPLE), (0, 0)))},
        "first": layer_params(w, layers["first"]),
        "recursions": recursions,
        "last": layer_params(w, layers["last"]),
        "final_norm": {"scale": w[layers["norm"]]},
    }


def model_of(meta: dict, w: Arrays, dtype: Any) -> MoR:
    config, sizes = config_of(meta), {"vocab_size": meta["vocab_size"], "dtype": dtype}
    plan = plan_groups(("shared",) * meta["base_depth"])
    return build(config, model_params(meta, w, plan), **sizes)


# ---- the reference's outputs from ours


def outputs_of(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    """By the reference's names, as far as it stores them."""
    model, ids = model_of(meta, w, dtype), x["ids"]
    info = whole_rows(ids)
    hidden = model(ids, info, key=jax.random.key(0)).hidden
    logits = model.logits(hidden)
    first = model.first(model._embed(ids), info)[0]
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    nats = -jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)
    outputs = {"logits": logits, "first_layer_out": first}
    outputs["lm_loss"] = jnp.sum(nats) / meta["lm_loss"]["divisor"]
    extra = expert_outputs if meta["type"] == "expert" else token_outputs
    outputs |= extra(meta, model, first, info)
    # The reference's evaluation takes the top of a row too, so it is what our training mode is.
    outputs["eval_logits"] = logits
    return outputs


def losses_of(model: MoR, first: jax.Array, info: Any) -> tuple[Any, dict[str, jax.Array]]:
    out = model.recursions(first, info, training=True, extra=None)
    return out, {name: total / weight for name, (total, weight) in out.losses.items()}


def summed(losses: dict[str, jax.Array], name: str, coeff: float) -> jax.Array:
    return sum(value for key, value in losses.items() if name in key) / coeff


def expert_outputs(meta: dict, model: MoR, first: jax.Array, info: Any) -> Arrays:
    _, losses = losses_of(model, first, info)
    levels = model.recursions.levels(first, info, model.recursions.shares)
    outputs, agreement = {}, []
    for r, (name, level) in enumerate(
        zip(meta["layers"]["recursion_outputs"], levels, strict=True)
    ):
        outputs[f"{name}_router_logits"] = level.logits
        outputs[f"{name}_out/hidden"] = assembled(levels[: r + 1])[0]
        taken = level.after.shape[1]
        assert taken == meta["tokens_per_recursion"][r]
        outputs[f"{name}_out/selected"] = positions_taken(level)
        # Of raw logits without a function the reference asks for 0.5, which is no probability.
        least = 0.5 if meta["router_func"] is None and meta["sampling"] == "aux_loss" else 0.0
        agreement.append(jnp.mean((level.decisive[..., 0] >= least) == level.chosen))
    outputs["sampling_loss"] = summed(losses, "sampling", meta["sampling_coeff"])
    outputs["router_z_loss"] = summed(losses, "_z", meta["z_coeff"])
    outputs["sampling_acc"] = jnp.mean(jnp.stack(agreement))
    return outputs


def positions_taken(level: Level) -> jax.Array:
    positions = level.alive.positions
    if level.source is None:
        return positions
    return jnp.take_along_axis(positions, level.source, axis=1)


def token_outputs(meta: dict, model: MoR, first: jax.Array, info: Any) -> Arrays:
    out, losses = losses_of(model, first, info)
    (name,) = meta["layers"]["recursion_outputs"]
    outputs = {f"{name}_router_logits": model.recursions.router(first), f"{name}_out/hidden": out.x}
    outputs["router_z_loss"] = summed(losses, "router_z", meta["z_coeff"])
    outputs["balancing_ratio"] = out.loads / jnp.sum(out.loads)
    if meta["balancing"] == "loss":
        outputs["balancing_loss"] = losses["balance"] / meta["balancing_coeff"]
    return outputs


# ---- the comparison

# Of what the file stores: a zero for every loss that its variant has not, and the share of the
# auxiliary router's top tokens that are the router's, which nothing of ours depends on.
NOT_OURS = {"sampling_topk_acc"}


def absent(meta: dict) -> set[str]:
    names = set(NOT_OURS)
    if meta["type"] == "expert":
        names |= {"balancing_loss", "balancing_ratio"}
    else:
        names |= {"sampling_loss", "sampling_acc"}
        names |= set() if meta["balancing"] == "loss" else {"balancing_loss"}
    return names | (set() if meta["z_loss"] else {"router_z_loss"})


def test_golden_mor_has_files():
    assert FILES, f"no mor_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden_mor(path: Path):
    meta, arrays = load(path)
    prefix, tolerance = meta["param_prefix"], meta["tolerance"]
    ids = {"ids": jnp.asarray(arrays["ids"])}
    weights = {n.removeprefix(prefix): jnp.asarray(arrays[n]) for n in meta["arrays"]["weights"]}
    (objective,) = meta["objectives"]

    def total(w: Arrays) -> tuple[jax.Array, Arrays]:
        outputs = outputs_of(meta, ids, w, jnp.float32)
        value = sum(term["weight"] * outputs[term["loss"]] for term in objective["terms"])
        return value, outputs | {objective["value"]: value}

    with jax.default_matmul_precision("highest"):
        (_, outputs), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(weights)
    stored = set(meta["arrays"]["outputs"]) - absent(meta)
    assert stored == set(outputs)
    for name in sorted(stored):
        wanted, got = arrays[name], np.asarray(outputs[name])
        assert got.shape == wanted.shape, name
        if wanted.dtype.kind in "ib":
            np.testing.assert_array_equal(got, wanted, err_msg=name)
        elif wanted.ndim == 0:
            np.testing.assert_allclose(got, wanted, rtol=tolerance["loss_rtol"], err_msg=name)
        else:
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance["logits"], err_msg=name)
    for name, of in objective["grads"].items():
        np.testing.assert_allclose(
            np.asarray(grads[of.removeprefix(prefix)]),
            arrays[name],
            rtol=tolerance["grad_rtol"],
            atol=tolerance["grad_atol"],
            err_msg=name,
        )
