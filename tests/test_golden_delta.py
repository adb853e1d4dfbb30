"""The delta rule against vectors made by other authors' recurrences: outputs, states, gradients."""

from pathlib import Path
from typing import Any

import golden_vectors
import jax.numpy as jnp
import pytest

from effattn.pallas_kernels.delta_rule import delta_rule

Arrays = golden_vectors.Arrays
# Kinds of the family "baseline" that are linear attention.
LINEAR = ("gla", "simple_gla", "retention", "ssd_op", "mamba2_layer")
CASES = golden_vectors.golden_cases("baseline", elsewhere=LINEAR)


def rule(meta: dict, x: Arrays, w: Arrays, dtype: Any) -> Arrays:
    heads_first = meta["layout"].startswith("b h t")

    def tokens_first(name: str) -> Any:
        array = x.get(name)
        return jnp.swapaxes(array, 1, 2) if heads_first and array is not None else array

    state = x.get("h0")
    if state is not None:  # float32 also beside bfloat16
        state = state.astype(jnp.promote_types(dtype, jnp.float32))
    out, final = delta_rule(
        *(tokens_first(name) for name in ("q", "k", "v", "beta")),
        log_decay=tokens_first("g"),
        scale=meta["scale_value"],
        state=state,
        chunk_size=16,  # shorter than the rows
    )
    return {"o": jnp.swapaxes(out, 1, 2) if heads_first else out, "final_state": final}


@pytest.mark.parametrize(("path", "dtype"), CASES)
def test_golden_delta(path: Path, dtype: str):
    golden_vectors.check_file(path, dtype, {"delta_rule": rule, "gated_delta_rule": rule})


def test_golden_delta_has_files():
    assert CASES
