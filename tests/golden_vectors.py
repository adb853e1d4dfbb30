"""Golden vectors: files of arrays that other authors' code made, and how ours are held to them.

A file is `<family>_<kind>[_<variant>].npz`, in the folder that EFFATTN_GOLDEN names (default
`tests/golden`); its `meta` says the kind, every shape and hyperparameter, and the tolerance. A test
gives one function per kind, from the file's inputs and weights, under the reference's names, to its
outputs. `tests/golden/README.md` says what the names of the arrays mean.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.decoder import Group

FOLDER = Path(os.environ.get("EFFATTN_GOLDEN", Path(__file__).parent / "golden"))

Arrays = dict[str, jax.Array]
# (meta, inputs, weights, dtype) -> outputs
Kind = Callable[[dict, Arrays, Arrays, Any], Arrays]


# ---- which files, in which dtypes


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) of a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return json.loads(str(file["meta"])), arrays


def golden_cases(
    family: str, *, elsewhere: Collection[str] = (), whole_models: Collection[str] = ()
) -> list[Any]:
    """pytest parameters (path, dtype): every file of the family in every dtype it is good for.

    elsewhere: kinds that another test reads. whole_models: kinds without bfloat16: the files'
    tolerance for it is one of a layer, and the roundings of a whole model compound (3%). A file
    whose own reference ran in float32 has no float64 tolerance, and no float64 case.
    """
    cases = []
    for path in sorted(FOLDER.glob(f"{family}_*.npz")):
        meta, _ = load(path)
        if meta["kind"] in elsewhere:
            continue
        for dtype in ("float64", "float32", "bfloat16"):
            exact = meta["tolerance"][dtype] is not None
            if exact and not (dtype == "bfloat16" and meta["kind"] in whole_models):
                # Where float64 agrees, float32 has only its roundings left to show.
                slow = dtype == "float32" and meta["tolerance"]["float64"] is not None
                mark = pytest.mark.slow if slow else ()
                cases.append(
                    pytest.param(path, dtype, id=f"golden-{path.stem}-{dtype}", marks=mark)
                )
    return cases


# ---- our modules from the reference's parameters


def build(config: Any, params: dict, **kwargs: Any) -> Any:
    """The module of `config` with these parameters; shapes must be exactly ours."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: config.build(**kwargs, rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(abstract))
    return nnx.merge(graphdef, params)


def kernel(weight: jax.Array) -> dict:
    """torch's [out, in] as our [in, out]."""
    return {"kernel": weight.T}


def stacked(layers: list[dict], plan: tuple[Group, ...]) -> dict:
    """The parameters of a `Stack` with this plan from those of its layers, one dict per layer."""
    blocks: dict[int, dict] = {}
    first = 0
    for pattern, repeats in plan:
        last = first + len(pattern) * repeats
        for place in range(len(pattern)):
            same = layers[first + place : last : len(pattern)]
            blocks[len(blocks)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
        first = last
    return {"blocks": blocks}


def decode(
    mixer: Any, x: jax.Array, info: TokenInfo, state: Any = None, **arguments: Any
) -> tuple[jax.Array, Any]:
    """(y, state): all of x token by token, from `state` or from an empty one."""
    if state is None:
        state = mixer.init_state(x.shape[0], x.shape[1], x.dtype)

    def body(state: Any, token: Any) -> tuple[Any, jax.Array]:
        y, state = mixer.step(*token, state, **arguments)
        return state, y

    by_time = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, info))
    state, y = jax.lax.scan(body, state, by_time)
    return jnp.swapaxes(y, 0, 1), state


# ---- the comparison


def error(got: Any, wanted: np.ndarray) -> float:
    """max|got - wanted| / max(1, max|wanted|), the metric of the files."""
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, f"shape {got.shape}, expected {wanted.shape}"
    return float(np.max(np.abs(got - wanted)) / max(1.0, np.max(np.abs(wanted))))


def check_file(
    path: Path, dtype: str, kinds: Mapping[str, Kind], *, last_columns: Collection[str] = ()
) -> None:
    """Asserts outputs and gradients of a whole file within its tolerances.

    last_columns: outputs of which ours are the last columns; the reference stores more.
    """
    meta, arrays = load(path)
    known = ", ".join(kinds)
    assert meta["kind"] in kinds, f"{path.name}: no test for kind {meta['kind']!r} ({known})"
    assert set(arrays) == {n for names in meta["arrays"].values() for n in names}
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        for case in meta.get("cases", [None]):
            prefix = "" if case is None else f"{case}."
            _check_part(kinds[meta["kind"]], meta, arrays, prefix, dtype, last_columns)


def _check_part(
    run: Kind,
    meta: dict,
    arrays: dict[str, np.ndarray],
    prefix: str,
    dtype: str,
    last_columns: Collection[str],
) -> None:
    """One set of inputs: outputs, and the gradients of the objectives that belong to it.

    prefix: "" or, in files of several cases, the case's own ("c0.").
    """
    inputs = {n: a for n, a in arrays.items() if n.startswith((f"{prefix}in.", f"{prefix}w."))}
    objectives = [
        o for o in meta["objectives"] if all(n.startswith(prefix) for n in o["grads"].values())
    ]

    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, None if array.dtype.kind in "iu" else dtype)

    def output(name: str) -> str:
        """ "c0.out64.y" -> "y"."""
        return name.removeprefix(prefix).split(".", 1)[1]

    def outputs_of(values: Arrays) -> Arrays:
        part = {
            kind: {n.removeprefix(k): v for n, v in values.items() if n.startswith(k)}
            for kind, k in (("in", f"{prefix}in."), ("w", f"{prefix}w."))
        }
        return run(meta, part["in"], part["w"], jnp.dtype(dtype))

    def objective(values: Arrays, terms: list[dict]) -> jax.Array:
        outputs, total = outputs_of(values), jnp.zeros((), dtype)
        for term in terms:
            value = outputs[output(term.get("loss", term.get("output")))]
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
    stored = [n for n in meta["arrays"]["outputs"] if n.startswith(f"{prefix}out")]
    assert stored, "the file has no outputs"
    for name in stored:
        if "32." in name and dtype == "float64":
            continue
        got, wanted = outputs[output(name)], arrays[name]
        if output(name) in last_columns:
            wanted = wanted[..., wanted.shape[-1] - got.shape[-1] :]
        assert error(got, wanted) <= tolerance[dtype], f"{name}: {error(got, wanted)}"
    for o, gradients in zip(objectives, grads, strict=False):
        for name, of in o["grads"].items():
            off = error(gradients[of], arrays[name])
            assert off <= tolerance[f"grad_{dtype}"], f"{name}: {off}"
        for of in norms:
            wanted = arrays[of.replace("w.", "gradnorm64.", 1)]
            off = error(jnp.linalg.norm(gradients[of].reshape(-1)), wanted)
            assert off <= tolerance[f"grad_{dtype}"], f"norm of the gradient of {of}: {off}"
