"""PoNet against vectors made by its authors' code: outputs and gradients, plain and masked."""

from pathlib import Path
from typing import Any

import golden_vectors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.mixers import ponet
from effattn.nn.mixers.ponet import PoNetConfig

Arrays = golden_vectors.Arrays


def masked(x: jax.Array, mask: jax.Array | None) -> TokenInfo:
    info = whole_rows(x)
    return info if mask is None else info._replace(valid=mask != 0)


def core(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["mask_value"] == ponet.LOW and not meta["causal"]
    np.testing.assert_allclose(meta["scale_value"], meta["head_dim"] ** -0.5)
    query, key, gate = (jnp.swapaxes(x[name], 1, 2) for name in ("Q", "K", "O"))

    def mixed(mask: jax.Array | None) -> jax.Array:
        info = masked(x["local"], mask)
        index = ponet.segment_index(info, meta["segment_num"])
        y = ponet.global_mean(query, key, info).reshape(x["local"].shape)
        y = y + ponet.segment_max(x["segment"], index, info)
        return y * gate.reshape(y.shape) + ponet.local_max(x["local"], meta["window"], info)

    index = ponet.segment_index(whole_rows(x["local"]), meta["segment_num"])
    outputs = {"y": mixed(None), "segment_index": index[0]}
    return {**outputs, "masked_y": mixed(x["mask"])} if "mask" in x else outputs


def layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    ours = {"Q": "query", "K": "key", "O": "gate", "local": "local", "segment": "segment"}
    params = {
        name: {
            **golden_vectors.kernel(w[f"{meta['projections'][theirs]}.weight"]),
            "bias": w[f"{meta['projections'][theirs]}.bias"],
        }
        for theirs, name in {**ours, "out": "out"}.items()
    }
    config = PoNetConfig(
        num_heads=meta["heads"], head_dim=meta["head_dim"], num_segments=meta["segment_num"]
    )
    mixer = golden_vectors.build(config, params, width=meta["d_model"], dtype=dtype)
    info = masked(x["x"], x.get("mask"))
    return {"y": mixer(x["x"], info)[0]}


@pytest.mark.parametrize(("path", "dtype"), golden_vectors.golden_cases("ponet"))
def test_golden_ponet(path: Path, dtype: str):
    golden_vectors.check_file(path, dtype, {"core": core, "layer": layer})


def test_golden_ponet_has_files():
    assert golden_vectors.golden_cases("ponet")
