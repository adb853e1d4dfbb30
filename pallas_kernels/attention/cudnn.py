"""Attention by cuDNN on NVIDIA GPUs: the entry behind `jax.nn.dot_product_attention`.

The public entry rounds the log-sum-exp to the dtype of the query and drops its cotangent, so the
module beneath it is called, which has the same signature in every jax that this package supports,
and its backward rule with the residuals that we kept. What this module may not take is refused:
cuDNN answers some of it wrongly without a word, like a window without `is_causal`.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.attention.band import Band, band_of_call
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.target import NvidiaTarget, not_an_nvidia_gpu, nvidia_target

AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


def refuses(call: AttentionCall) -> str | None:
    reason = not_an_nvidia_gpu()
    if reason is not None:
        return reason
    target = nvidia_target()
    assert target is not None  # not_an_nvidia_gpu
    return _cannot_run(target) or _cannot_shape(call, target) or _cannot_mask(call)


def _cannot_run(target: NvidiaTarget) -> str | None:
    if target.capability is not None and target.capability < AMPERE:
        return f"{target.kind} is too old: it needs compute capability 8.0"
    fused = _fused()
    if fused is None:
        return f"jax {jax.__version__} does not have the cuDNN entries that it is written for"
    try:
        fused.check_cudnn_version()
    except RuntimeError as error:
        return f"jax says: {error}"
    return None


def _cannot_shape(call: AttentionCall, target: NvidiaTarget) -> str | None:
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query, key and value must all be bfloat16 or all float16, got {call.dtype}"
    # Backward, where Blackwell is narrower than Hopper. jax takes an unknown GPU for the least one.
    hopper = target.capability is not None and HOPPER <= target.capability < BLACKWELL
    widest = 256 if hopper else 128
    if call.head_dim % 8 or call.head_dim > widest:
        return f"head_dim must be a multiple of 8 up to {widest}, got {call.head_dim}"
    if call.value_dim != call.head_dim:
        return f"value_dim must equal head_dim={call.head_dim}, got {call.value_dim}"
    for name in ("q_len", "kv_len"):
        if getattr(call, name) % 2:
            return f"{name} must be even, as training wants it, got {getattr(call, name)}"
    return None


def _cannot_mask(call: AttentionCall) -> str | None:
    if call.logit_soft_cap is not None:
        return "it has no logit_soft_cap"
    if call.has_segments:
        return "it has no segment ids"
    if call.has_blocks:
        return "it has no block lists"
    if call.block_sizes is not None:
        return "it chooses its own block sizes"
    band = band_of_call(call)
    if isinstance(band, str):
        return band
    if band.right not in (None, 0) or (band.left is not None and band.right is None):
        return f"of windows it has only the causal one, got {call.mask}"
    if band.left is not None and call.q_len > call.kv_len:
        return f"a window wants no more queries than keys, got {call.q_len} and {call.kv_len}"
    return None


def forward(
    call: AttentionCall, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    fused = _fused()
    options = _options(call, fused)
    out, lse = fused.dot_product_attention(query, key, value, **options, return_residual=True)
    return out, lse.swapaxes(1, 2)  # float32 [b, h, t] -> [b, t, h]


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
    dq, dk, dv = _gradients(call, query, key, value, out, lse, dout)
    if not call.returns_lse:
        return dq, dk, dv
    # cuDNN computes dlogits = weights * (dout @ value^T - sum(dout * out)) and takes `out` at its
    # word. With value 0 and a sum of -dlse this is weights * dlse, what dlse adds to dlogits.
    ones, parts = jnp.zeros_like(out), jnp.zeros_like(out)
    for column in range(3):  # as many numbers of the narrow dtype hold all bits of dlse
        part = dlse.astype(out.dtype)
        dlse = dlse - part.astype(dlse.dtype)
        ones, parts = ones.at[..., column].set(1), parts.at[..., column].set(-part)
    dq2, dk2, _ = _gradients(call, query, key, jnp.zeros_like(value), parts, lse, ones)
    return _sum(dq, dq2), _sum(dk, dk2), dv


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype(jnp.float32) + b).astype(a.dtype)


def _gradients(
    call: AttentionCall, query: Any, key: Any, value: Any, out: Any, lse: Any, dout: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) by cuDNN's backward kernel."""
    fused = _fused()
    rule = fused._dot_product_attention_bwd_rule
    unused = jnp.zeros(0, query.dtype)
    arrays = [query, key, value, *[unused] * 7]  # bias, lengths, offsets and page tables
    settings = {
        **_options(call, fused),
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias and no gradient of one
        "layout": fused.AttentionLayout.BTNH.value,
        "score_mod": None,
        "cudnn_version": None,
        "is_training": True,
        "return_residual": False,
    }
    wanted = inspect.signature(rule).parameters
    if "score_mod" in wanted:
        arrays.append(())  # its arguments
    arrays += [lse.swapaxes(1, 2), out]
    settings = {name: value for name, value in settings.items() if name in wanted}
    del settings["scale"]
    return rule(scale=call.scale, **settings, res=tuple(arrays), grad_output=dout)[:3]


def _options(call: AttentionCall, fused: Any) -> dict[str, Any]:
    band = band_of_call(call)
    assert isinstance(band, Band)  # refuses
    causal = band.right == 0
    return {
        "scale": call.scale,
        "mask_type": fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK,
        # cuDNN counts the query's own token as one of the window's.
        "sliding_window_length": None if band.left is None else band.left + 1,
    }


def _fused() -> Any:
    """jax's module of cuDNN attention; None where it lacks what is called here."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused
    except ImportError:
        return None
    names = (
        "AttentionLayout",
        "MaskType",
        "check_cudnn_version",
        "dot_product_attention",
        "_dot_product_attention_bwd_rule",
    )
    return fused if all(hasattr(fused, name) for name in names) else None


BACKEND = Backend("cudnn", refuses, forward, backward)
