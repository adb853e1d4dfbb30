"""Attention by tokamax, to compare with: a backend that only its name reaches, never "auto".

Which of tokamax's kernels runs is tokamax's choice for the machine. Its public op gives no
log-sum-exp, so calls that ask for one are refused, and the lse of the others, which nobody reads,
is zeros. Nor does it take residuals back: the backward pass runs its forward pass once more.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.attention.band import OPEN, Band, band_of_call
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.dispatch import Backend


def refuses(call: AttentionCall) -> str | None:
    if importlib.util.find_spec("tokamax") is None:
        return "not installed: pip install 'effattn[peers]'"
    if call.dtype is None or call.accumulator != jnp.float32:
        return f"query, key and value must share a dtype of at most 32 bits, got {call.dtype}"
    if call.returns_lse:
        return "it gives no log-sum-exp, which return_lse and extra keys need"
    if call.has_segments:
        return "it has no segment ids"
    if call.has_blocks:
        return "it has no block lists"
    if call.block_sizes is not None:
        return "it chooses its own block sizes"
    band = band_of_call(call)
    return band if isinstance(band, str) else None


def forward(
    call: AttentionCall, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    lse = jnp.zeros(query.shape[:3], call.accumulator)
    return _out(call, query, key, value), lse


def backward(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jax.vjp(lambda *arrays: _out(call, *arrays), query, key, value)[1](dout)


def _out(call: AttentionCall, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    import tokamax

    band = band_of_call(call)
    assert isinstance(band, Band)  # refuses
    options: dict[str, Any] = {}
    if band == Band(None, 0):
        options["is_causal"] = True
    elif band != OPEN:
        # It wants both sides; an open one reaches past the matrix.
        left = call.q_len if band.left is None else band.left
        options["local_window_size"] = left, call.kv_len if band.right is None else band.right
    return tokamax.dot_product_attention(
        query, key, value, scale=call.scale, logits_soft_cap=call.logit_soft_cap, **options
    )


BACKEND = Backend("tokamax", refuses, forward, backward)
