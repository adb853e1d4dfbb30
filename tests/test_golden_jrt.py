"""JRT's layer against vectors made by its authors' code: outputs, decoding states and gradients."""

from pathlib import Path
from typing import Any

import golden_vectors
import jax.numpy as jnp
import pytest

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.mixers.jrt import JRTConfig
from effattn.pallas_kernels.linear_attention.features import unpack_taylor_state

Arrays = golden_vectors.Arrays

NAMES = {
    "query": "proj_q",
    "key": "proj_k",
    "value": "proj_v",
    "prefix_key": "proj_k_enc",
    "prefix_value": "proj_v_enc",
    "out": "out_proj",
}


def layer(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    assert meta["feature_map"] == "taylor_exp" and meta["feature_full"]
    assert not meta["rope"] and not meta["bias"]
    params = {ours: golden_vectors.kernel(w[f"{theirs}.weight"]) for ours, theirs in NAMES.items()}

    def build(**options: Any) -> Any:
        config = JRTConfig(
            num_heads=meta["heads"],
            head_dim=meta["head_dim"],
            feature_dim=meta["feature_dim"],
            enc_length=meta["enc_length"],
            eps=meta["eps"],
            **options,
        )
        return golden_vectors.build(config, params, width=meta["d_model"], dtype=dtype)

    mixer = build()
    x, mask = x["x"], x.get("mask")
    info = whole_rows(x)
    n = meta["prefill_len"]
    head = TokenInfo(*(field[:, :n] for field in info))
    tail = TokenInfo(*(field[:, n : n + meta["decode_len"]] for field in info))
    empty = mixer.init_state(x.shape[0], x.shape[1], dtype)
    prefill_y, state = mixer.prefill(x[:, :n], head, empty)
    decode_y, _ = golden_vectors.decode(mixer, x[:, n : n + meta["decode_len"]], tail, state)
    # kv [b, h, 1, e, phi] and k [b, h, 1, 1, phi], as the reference lays them out.
    kv = unpack_taylor_state(state.linear.kv, meta["feature_dim"], axis=-2)
    k = unpack_taylor_state(state.linear.normalizer, meta["feature_dim"], axis=-1)
    outputs = {
        "y": mixer(x, info)[0],
        "prefill_y": prefill_y,
        "prefill_kv_state": jnp.swapaxes(kv, -1, -2)[:, :, None],
        "prefill_k_state": k[:, :, None, None],
        "decode_y": decode_y,
    }
    if mask is not None:
        prompt = x[:, : meta["masked_prefill_len"]]
        theirs = build(padding_as_zero_keys=True)
        padded = whole_rows(prompt)._replace(valid=mask != 0)
        outputs["masked_prefill_y"] = theirs(prompt, padded)[0]
    return outputs


@pytest.mark.parametrize(("path", "dtype"), golden_vectors.golden_cases("jrt"))
def test_golden_jrt(path: Path, dtype: str):
    golden_vectors.check_file(path, dtype, {"prefix_linear_attention_layer": layer})


def test_golden_jrt_has_files():
    assert golden_vectors.golden_cases("jrt")
