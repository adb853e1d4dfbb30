"""TokenFormer, MrT5, ACM and the Routing Transformer against vectors made by their authors' code.

Each family is one function below: from the arrays of a file, under the reference's names, to its
outputs. What is compared, differentiated and tolerated stands in the files' `meta`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_vectors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import whole_rows
from effattn.models.mrt5 import MrT5Config
from effattn.nn import clusters
from effattn.nn.adaptive_mlp import ACM
from effattn.nn.compact import compact
from effattn.nn.delete_gate import deletion_loss
from effattn.nn.layers import VOCAB_MULTIPLE
from effattn.nn.pattention import Pattention

Arrays = golden_vectors.Arrays
# What the reference leaves behind a row's last kept token means nothing: ours is NaN there.
PADDED = {"enc_hard"}


# ---- one function per kind: (meta, arrays) -> outputs by the reference's names


def pattention(meta: dict, x: Arrays) -> Arrays:
    assert meta["gelu"] == "erf" and meta["score_scale"] == 1.0 and not meta["bias"]

    def layer(mode: str, slots: int) -> jax.Array:
        rows = ((0, slots - meta["slots"]), (0, 0))
        made = nnx.eval_shape(
            lambda: Pattention(
                meta["d_in"],
                meta["d_out"],
                slots,
                normalisation=mode,
                tau="sqrt_slots",
                dtype=x["x"].dtype,
                rngs=nnx.Rngs(0),
            )
        )
        params = {"slot_keys": jnp.pad(x["key"], rows), "slot_values": jnp.pad(x["value"], rows)}
        return nnx.merge(nnx.graphdef(made), params)(x["x"])

    outputs = {}
    for mode in meta["modes"]:
        outputs[f"{mode}/y"] = layer(mode, meta["slots"])
        outputs[f"{mode}/grown_y"] = layer(mode, meta["grown_slots"])
    return outputs


def acm_mlp(meta: dict, x: Arrays) -> Arrays:
    assert meta["activation"] == "gelu (erf)" and meta["num_choices"] == meta["num_blocks"] + 1
    learners, width = meta["num_blocks"], meta["d_model"]

    def make() -> ACM:
        options = {"gate": "linear", "dtype": x["x"].dtype, "rngs": nnx.Rngs(0)}
        return ACM(width, learners=learners, learner_width=meta["block_dim"], **options)

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    # The file says which choice each token makes: its gate is left out.
    gate = jax.tree.map(
        lambda a: jnp.zeros(a.shape, x["x"].dtype), nnx.to_pure_dict(abstract)["gate"]
    )
    params = {"up": x["w1"], "up_bias": x["b1"], "down": x["w2"], "gate": gate}
    acm = nnx.merge(graphdef, {**params, "bias": x["b2"].reshape(learners + 1, width)})

    def chosen(gates: jax.Array) -> jax.Array:
        return acm.apply(x["x"], jax.nn.one_hot(gates, learners + 1, dtype=x["x"].dtype))

    return {
        "y_all": acm.prefix_sums(x["x"]),
        "y_selected": chosen(x["gates"]),
        # The reference's own gated path never runs the last learner.
        "y_reference_gated": chosen(jnp.minimum(x["gates"], learners - 1)),
    }


def mrt5_params(meta: dict, w: Arrays) -> dict:
    def dense(name: str) -> dict:
        return golden_vectors.kernel(w[f"param/{name}.weight"])

    def norm(name: str) -> dict:
        return {"scale": w[f"param/{name}.weight"]}

    def attention(prefix: str) -> dict:
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return {ours: dense(f"{prefix}.{theirs}") for ours, theirs in names.items()}

    def block(prefix: str, decoder: bool) -> dict:
        last = f"{prefix}.layer.{1 + decoder}"
        names = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        made = {
            "self_norm": norm(f"{prefix}.layer.0.layer_norm"),
            "self_attention": attention(f"{prefix}.layer.0.SelfAttention"),
            "mlp_norm": norm(f"{last}.layer_norm"),
            "mlp": {o: dense(f"{last}.DenseReluDense.{their}") for o, their in names.items()},
        }
        if decoder:
            made["cross_norm"] = norm(f"{prefix}.layer.1.layer_norm")
            made["cross_attention"] = attention(f"{prefix}.layer.1.EncDecAttention")
        return made

    def side(name: str, layers: int) -> dict:
        first = f"param/{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            name: {i: block(f"{name}.block.{i}", name == "decoder") for i in range(layers)},
            f"{name}_bias": {"table": w[first]},
            f"{name}_norm": norm(f"{name}.final_layer_norm"),
        }

    gate = f"encoder.block.{meta['gate_layer']}.delete_gate"
    bias = w[f"param/{gate}.feed_forward.bias"]
    rows = -meta["vocab_size"] % VOCAB_MULTIPLE
    params = {
        **side("encoder", meta["num_encoder_layers"]),
        **side("decoder", meta["num_decoder_layers"]),
        "gate": {
            "norm": norm(f"{gate}.layer_norm"),
            "project": {**dense(f"{gate}.feed_forward"), "bias": bias},
        },
        "embedding": {"table": jnp.pad(w[meta["shared_embedding"]], ((0, rows), (0, 0)))},
    }
    if not meta["tie_embeddings"]:
        head = dense("lm_head")["kernel"]
        params["head"] = {"kernel": jnp.pad(head, ((0, 0), (0, rows)))}
    return params


def mrt5(meta: dict, x: Arrays) -> Arrays:
    assert meta["deletion_type"] == "scaled_sigmoid" and meta["attention_scale"] == 1.0
    assert meta["deletion_threshold"] == meta["sigmoid_mask_scale"] / 2 and meta["gate_layer_norm"]
    config = MrT5Config(
        num_layers=meta["num_encoder_layers"],
        num_decoder_layers=meta["num_decoder_layers"],
        width=meta["d_model"],
        num_heads=meta["num_heads"],
        head_dim=meta["d_kv"],
        mlp_width=meta["d_ff"],
        gate_layer=meta["gate_layer"],
        gate_scale=meta["sigmoid_mask_scale"],
        softmax1=meta["softmax1"],
        gumbel=meta["gumbel_noise"],
        num_buckets=meta["relative_attention_num_buckets"],
        max_distance=meta["relative_attention_max_distance"],
        norm_eps=meta["rms_norm_eps"],
        tied=meta["tie_embeddings"],
    )
    dtype = x["param/shared.weight"].dtype
    options = {"vocab_size": meta["vocab_size"], "dtype": dtype}
    model = golden_vectors.build(config, mrt5_params(meta, x), **options)
    ids, labels = x["ids"], x["labels"]
    assert meta["pad_token_id"] == 0 and meta["mode"].startswith("padded")
    source = whole_rows(ids)._replace(valid=ids != meta["pad_token_id"])
    start = jnp.full_like(labels[:, :1], meta["decoder_start_token_id"])
    target = jnp.concatenate([start, jnp.maximum(labels[:, :-1], meta["pad_token_id"])], axis=1)
    outputs = {}
    for name, hard in (("soft", False), ("hard", True)):
        out = model.seq2seq(ids, source, target, whole_rows(target), hard=hard)
        logits = model.logits(out.hidden)
        log_probs = jax.nn.log_softmax(logits)
        each = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        counted = labels != meta["label_ignore_index"]
        loss = -jnp.sum(jnp.where(counted, each, 0)) / jnp.sum(counted)
        outputs |= {f"logits_{name}": logits, f"loss_{name}": loss, f"enc_{name}": out.encoded}
    total, weight = deletion_loss(out.gate, source.valid)
    kept, _, count = compact(out.encoded, out.gate.kept, meta["enc_hard_len"])
    there = jnp.arange(kept.shape[1]) < count[:, None]
    return outputs | {
        "gate": out.gate.mask,
        "gate_logits": out.gate.logits,
        "gate_loss": total / weight,
        "enc_hard": jnp.where(there[..., None], kept, jnp.nan),
    }


def kmeans_attention(meta: dict, x: Arrays) -> Arrays:
    assert meta["causal"] and meta["layout"] == "b h t d" and not meta["shared_qk"]
    assert meta["scale"] == "head_dim**-0.5"
    q, k, v = (jnp.swapaxes(x[name], 1, 2) for name in "qkv")
    info = whole_rows(q)
    out = clusters.top_attention(
        (q, k, v),
        (clusters.similarities(q, x["means"]), clusters.similarities(k, x["means"])),
        (x["mem_key"], x["mem_value"]),
        info,
        window=meta["window"],
        scatter_eps=meta["scatter_eps"],
    )
    both = jnp.concatenate([q, k], axis=1)
    valid = jnp.concatenate([info.valid, info.valid], axis=1)
    (total, weight), members = clusters.commit(both, x["means"], valid)
    return {
        "out": jnp.swapaxes(out, 1, 2),
        "commitment_loss": meta["commitment"] * total / weight,
        "means_after_update": clusters.moved_means(x["means"], members, meta["ema_decay"]),
    }


# ---- the comparison

# family and kind: (function, dtype of the computation)
FAMILIES: dict[str, tuple[Callable[[dict, Arrays], Arrays], str]] = {
    "tokenformer_pattention": (pattention, "float64"),
    "acm_mlp": (acm_mlp, "float64"),
    "mrt5_tiny": (mrt5, "float64"),
    "routing_kmeans_attention": (kmeans_attention, "float32"),
}


def files() -> list[Any]:
    families = {kind.split("_")[0] for kind in FAMILIES}
    paths = [p for family in sorted(families) for p in golden_vectors.FOLDER.glob(f"{family}_*")]
    return [pytest.param(path, id=path.stem) for path in sorted(paths)]


def tolerance_of(meta: dict, name: str) -> float:
    """Of an output: the file's for its dtype, or for what the output is."""
    tolerance = meta["tolerance"]
    if "logits" in tolerance:
        return tolerance["gate" if name.startswith("gate") else "logits"]
    return tolerance[meta["dtype"]]


@pytest.mark.parametrize("path", files())
def test_golden_relatives(path: Path):
    meta, arrays = golden_vectors.load(path)
    run, dtype = FAMILIES[f"{meta['family']}_{meta['kind']}"]
    roles = meta["arrays"]
    assert set(arrays) == {name for names in roles.values() for name in names}
    given = {n: arrays[n] for role in ("inputs", "weights") for n in roles.get(role, [])}
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        values = {
            n: jnp.asarray(a, None if a.dtype.kind in "iub" else dtype) for n, a in given.items()
        }

        def total(at: Arrays, objective: dict) -> jax.Array:
            outputs = run(meta, {**values, **at})
            terms = [
                t["weight"] * jnp.sum(outputs[t["output"]] * arrays[t["cotangent"]])
                if "cotangent" in t
                else t["weight"] * outputs[t["loss"]]
                for t in objective["terms"]
            ]
            return sum(terms[1:], terms[0])

        @jax.jit
        def everything(values: Arrays) -> tuple[Arrays, list[Arrays]]:
            gradients = [
                jax.grad(total)({n: values[n] for n in o["grads"].values()}, o)
                for o in meta["objectives"]
            ]
            return run(meta, values), gradients

        outputs, gradients = everything(values)
    for name in roles["outputs"]:
        atol = tolerance_of(meta, name)
        assert outputs[name].shape == arrays[name].shape, name
        got = np.asarray(outputs[name])
        if name in PADDED:
            got = np.where(np.isnan(got), arrays[name], got)
        np.testing.assert_allclose(got, arrays[name], rtol=0, atol=atol, err_msg=name)
    rtol, atol = meta["tolerance"].get("grad_rtol", 0), meta["tolerance"].get("grad_atol")
    atol = tolerance_of(meta, "") if atol is None else atol
    for objective, of in zip(meta["objectives"], gradients, strict=True):
        for name, at in objective["grads"].items():
            np.testing.assert_allclose(of[at], arrays[name], rtol=rtol, atol=atol, err_msg=name)


def test_every_family_has_files():
    for family in FAMILIES:
        assert list(golden_vectors.FOLDER.glob(f"{family}*.npz")), f"no {family}*.npz"
