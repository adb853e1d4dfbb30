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

from effattn.nn.adaptive_mlp import ACM
from effattn.nn.pattention import Pattention

Arrays = golden_vectors.Arrays


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


# ---- the comparison

# family: (function, dtype of the computation, tolerances of outputs by name; others take "any")
FAMILIES: dict[str, tuple[Callable[[dict, Arrays], Arrays], str]] = {
    "tokenformer_pattention": (pattention, "float64"),
    "acm_mlp": (acm_mlp, "float64"),
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
        np.testing.assert_allclose(outputs[name], arrays[name], rtol=0, atol=atol, err_msg=name)
    rtol, atol = meta["tolerance"].get("grad_rtol", 0), meta["tolerance"].get("grad_atol")
    atol = tolerance_of(meta, "") if atol is None else atol
    for objective, of in zip(meta["objectives"], gradients, strict=True):
        for name, at in objective["grads"].items():
            np.testing.assert_allclose(of[at], arrays[name], rtol=rtol, atol=atol, err_msg=name)


def test_every_family_has_files():
    for family in FAMILIES:
        assert list(golden_vectors.FOLDER.glob(f"{family}*.npz")), f"no {family}*.npz"
