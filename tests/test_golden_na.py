"""Neighborhood attention against vectors of NATTEN's definition: outputs, log-sum-exps, gradients.

Every `na_*.npz` in the folder that EFFATTN_GOLDEN names (default `tests/golden`) is one case; its
`meta` says the shape, the window and the tolerance.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.masks import Neighborhood
from effattn.pallas_kernels.attention import neighborhood_attention

FOLDER = Path(os.environ.get("EFFATTN_GOLDEN", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("na_*.npz"))
# Tiles of a few tokens, so that every case has several, some of them ragged; the bfloat16 run takes
# the default, which is one tile for grids of this size.
TILES = {1: (8,), 2: (4, 3), 3: (2, 3, 2)}
# The files' values are float64 sums stored as float32.
FLOAT64_TOLERANCE = 5e-6
NAMES = {"q": "dq", "k": "dk", "v": "dv", "add_k": "dadd_k", "add_v": "dadd_v"}


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(meta, arrays) of a file."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
        return json.loads(str(file["meta"])), arrays


def attend(meta: dict, x: dict[str, jax.Array], **options: Any) -> tuple[jax.Array, jax.Array]:
    return neighborhood_attention(
        x["q"],
        x["k"],
        x["v"],
        window=meta["window"],
        stride=meta["stride"],
        dilation=meta["dilation"],
        causal=meta["causal"],
        extra_key=x.get("add_k"),
        extra_value=x.get("add_v"),
        scale=meta["scale"],
        return_lse=True,
        **options,
    )


def assert_near(got: Any, wanted: np.ndarray, tolerance: float, name: str) -> None:
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
    off = float(np.max(np.abs(got - wanted)))
    assert off <= tolerance, f"{name}: {off} from the stored values"


def test_golden_na_has_files():
    assert len(FILES) > 0, f"no na_*.npz in {FOLDER}: the family is unchecked"


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_golden_na_mask_is_the_stored_one(path: Path):
    meta, arrays = load(path)
    np.testing.assert_array_equal(np.packbits(mask_of(meta)), arrays["mask_bits"])


def few(path: Path, name: str, *more: Any) -> Any:
    """A case that `make test` leaves out but for one file per number of axes."""
    marks = [] if path.stem.endswith("_odd") else [pytest.mark.slow]
    return pytest.param(path, *more, id=name, marks=marks)


def mask_of(meta: dict) -> np.ndarray:
    """[num_tokens, num_tokens]"""
    fields = (tuple(meta[name]) for name in ("shape", "window", "stride", "dilation", "causal"))
    position = np.arange(meta["num_tokens"], dtype=np.int32)
    return Neighborhood(*fields).allowed(position[:, None], position)


def by_definition(meta: dict, x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64 numpy: every score at once."""
    tokens = {
        name: array.reshape(meta["batch"], -1, *array.shape[-2:]) for name, array in x.items()
    }
    allowed = np.concatenate([mask_of(meta), np.ones((meta["num_tokens"], meta["extra"]))], 1)
    k, v = (
        np.concatenate([tokens[n], *(tokens[e] for e in (f"add_{n}",) if e in tokens)], 1)
        for n in "kv"
    )
    group = meta["heads"] // meta["heads_kv"]
    scores = np.einsum("bthd,bshd->bths", tokens["q"], k.repeat(group, 2)) * meta["scale"]
    weights = np.exp(np.where(allowed[:, None], scores, -np.inf))
    total = weights.sum(-1)
    out = np.einsum("bths,bshe->bthe", weights / total[..., None], v.repeat(group, 2))
    grid = (meta["batch"], *meta["shape"], meta["heads"])
    return out.reshape(*grid, -1), np.log(total).reshape(grid)


@pytest.mark.parametrize("path", [few(path, path.stem) for path in FILES])
def test_golden_na_in_bfloat16(path: Path):
    meta, arrays = load(path)
    x = {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in NAMES if name in arrays}
    out, lse = jax.jit(lambda x: attend(meta, x))(x)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # The definition on the rounded inputs: rounding them is not the op's doing.
    wanted = by_definition(meta, {name: np.asarray(a, np.float64) for name, a in x.items()})
    for name, got, reference in zip(("out", "lse"), (out, lse), wanted, strict=True):
        assert_near(got, reference, meta["tolerance"]["bfloat16"], name)


CASES = [pytest.param(path, "float32", id=f"{path.stem}-float32") for path in FILES]
CASES += [few(path, f"{path.stem}-float64", "float64") for path in FILES]


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_na(path: Path, dtype: str):
    meta, arrays = load(path)
    tile = TILES[meta["rank"]]

    @jax.jit
    def everything(x: dict[str, jax.Array], dout: jax.Array, dlse: jax.Array) -> Any:
        outputs, pull = jax.vjp(lambda x: attend(meta, x, tile=tile), x)
        return outputs, pull((dout, dlse))[0]

    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        x = {name: jnp.asarray(arrays[name], dtype) for name in NAMES if name in arrays}
        dout, dlse = (jnp.asarray(arrays[name], dtype) for name in ("do", "dlse"))
        outputs, through_lse = everything(x, dout, dlse)
        _, plain = everything(x, dout, jnp.zeros_like(dlse))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((outputs, plain)))
    wide = dtype == "float64"
    tolerance = FLOAT64_TOLERANCE if wide else meta["tolerance"][dtype]
    for name, value in zip(("out", "lse"), outputs, strict=True):
        assert_near(value, arrays[name], tolerance, name)
    tolerance = FLOAT64_TOLERANCE if wide else meta["tolerance"][f"grad_{dtype}"]
    checked = set()
    for gradients, suffix in ((plain, ""), (through_lse, "_lse")):
        for name in x:
            # A log-sum-exp does not hang on values: their gradient is stored once.
            stored = NAMES[name] + suffix
            stored = stored if stored in arrays else NAMES[name]
            assert_near(gradients[name], arrays[stored], tolerance, stored)
            checked.add(stored)
    assert checked == set(meta["arrays"]["grads"])
