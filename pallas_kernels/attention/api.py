"""The attention op: its arguments, the choice of a backend, and its one VJP.

Backends (`xla.py`, `reference.py`) know one mask for all heads and no extra keys: a call with a
mask per head is split by mask here, and extra keys are a second, small attention that `merge`
joins to the first.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effattn.blocks import BlockSelection, BlockSizes
from effattn.checks import Dims, check_in, check_same_length, check_shape
from effattn.masks import Causal, Full, Mask
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.attention.call import (
    AttentionCall,
    Tokens,
    check_arrays,
    check_tokens,
    describe,
)
from effattn.pallas_kernels.attention.merge import merge

# "auto" never gets past "xla", which takes everything: what stands after it only its name reaches.
BACKENDS = {
    "tpu": "effattn.pallas_kernels.attention.tpu:BACKEND",
    "cudnn": "effattn.pallas_kernels.attention.cudnn:BACKEND",
    "xla": "effattn.pallas_kernels.attention.xla:BACKEND",
    "reference": "effattn.pallas_kernels.attention.reference:BACKEND",
    "tpu_interpret": "effattn.pallas_kernels.attention.tpu:INTERPRETED",
    "tokamax": "effattn.pallas_kernels.attention.tokamax:BACKEND",
}

CAUSAL = Causal()


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask | Sequence[Mask] = CAUSAL,
    q_positions: Any = None,
    kv_positions: Any = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    extra_key: jax.Array | None = None,
    extra_value: jax.Array | None = None,
    blocks: BlockSelection | None = None,
    scale: float | None = None,
    logit_soft_cap: float | None = None,
    implementation: str = "auto",
    return_lse: bool = False,
    block_sizes: BlockSizes | None = None,
) -> Any:
    """Softmax attention: out[t] = sum_s softmax_s(scale query[t] key[s]) value[s] over allowed s.

    query: [batch, q_len, num_heads, head_dim]; key: [batch, kv_len, num_kv_heads, head_dim];
    value: [batch, kv_len, num_kv_heads, value_dim]; num_kv_heads divides num_heads.
    mask: which positions may attend which, or a sequence of masks, one per query head.
    q_positions, kv_positions: int [batch, length], [1, length] or [length]. The query side
        defaults to arange, the key side to the query side (to its own arange if both are absent).
        numpy positions are known at trace time: what the mask forbids is then never visited.
    q_segment_ids, kv_segment_ids: int, same shapes; only equal non-zero ids attend, 0 is padding.
    extra_key, extra_value: [batch, num_extra, num_kv_heads, ...], seen by every query whatever the
        mask and the segment (but for queries in segment 0, which attend nothing).
    blocks: visit these blocks only; the mask still applies inside them.
    scale: default head_dim ** -0.5. logit_soft_cap: cap * tanh(logits / cap), before the mask.
    implementation: "auto" or a backend's name, "tpu", "cudnn", "xla", "reference", "tokamax"; see
        `explain`.
    block_sizes: for tuning and tests; the backend's own choice when None.

    Returns out [batch, q_len, num_heads, value_dim] in the dtype of query; with return_lse also
    the log-sum-exp of the logits [batch, q_len, num_heads], float32 or wider. Both are
    differentiable. A query that may attend nothing gets out 0, lse -inf and zero gradients.
    Raises ValueError for arguments that do not fit, and if the named implementation refuses.
    """
    dims = check_arrays(query, key, value)
    tokens = check_tokens(dims, q_positions, kv_positions, q_segment_ids, kv_segment_ids, blocks)
    masks = _mask_per_head(mask, dims)
    _check_extra(extra_key, extra_value, dims)
    if logit_soft_cap is not None and not logit_soft_cap > 0:
        raise ValueError(f"logit_soft_cap: got {logit_soft_cap}, expected None or more than 0")
    if block_sizes is not None and blocks is not None:
        raise ValueError("block_sizes: blocks already sets them, expected one of the two")

    def attend(
        query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array]:
        call, traced = describe(
            query,
            key,
            value,
            mask,
            tokens,
            scale=scale,
            logit_soft_cap=logit_soft_cap,
            block_sizes=block_sizes,
            returns_lse=return_lse or extra_key is not None,
        )
        backend = dispatch.choose("attention", BACKENDS, call, implementation)
        return _attend(backend, call, query, key, value, traced)

    if len(set(masks)) == 1:
        out, lse = attend(query, key, value, masks[0], tokens)
    else:
        groups = heads_by_mask(masks, dims["k"][0])
        parts = [
            attend(
                query[:, :, heads],
                key[:, :, kv_heads],
                value[:, :, kv_heads],
                group_mask,
                tokens._replace(blocks=_blocks_of(blocks, heads, kv_heads, dims)),
            )
            for group_mask, heads, kv_heads in groups
        ]
        back = np.argsort(np.concatenate([heads for _, heads, _ in groups]))
        out, lse = (jnp.concatenate(x, axis=2)[:, :, back] for x in zip(*parts, strict=True))
    if extra_key is not None and extra_value is not None:
        extra = attend(query, extra_key, extra_value, Full(), _extra_tokens(tokens, extra_key))
        out, lse = merge(out, lse, *extra)
    return (out, lse) if return_lse else out


def explain(query: Any, key: Any, value: Any, **arguments: Any) -> str:
    """Which backend `attention` would take for the same arguments, and why the others not.

    Arrays may be `jax.ShapeDtypeStruct`. One line per backend, in order of preference; for a
    sequence of masks, such a list for each distinct mask.
    """
    for name in arguments:
        check_in("explain", name, inspect.signature(attention).parameters)
    dims = check_arrays(query, key, value)
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "blocks")
    tokens = check_tokens(dims, *(arguments.get(name) for name in names))
    masks = dict.fromkeys(_mask_per_head(arguments.get("mask", CAUSAL), dims))
    options = ("scale", "logit_soft_cap", "block_sizes")
    returns_lse = bool(arguments.get("return_lse")) or arguments.get("extra_key") is not None
    parts = []
    for mask in masks:
        settings = {name: arguments.get(name) for name in options}
        call, _ = describe(query, key, value, mask, tokens, **settings, returns_lse=returns_lse)
        lines = dispatch.explain(BACKENDS, call)
        parts.append(lines if len(masks) == 1 else f"{mask}:\n{lines}")
    return "\n".join(parts)


def _mask_per_head(mask: Mask | Sequence[Mask], dims: Dims) -> list[Mask]:
    masks = [mask] * dims["n"][0] if isinstance(mask, Mask) else list(mask)
    for one in masks:
        if not isinstance(one, Mask):
            raise ValueError(f"mask: got {one!r}, expected a Mask or one Mask per query head")
    check_same_length("mask", masks, dims["n"][0], "query head")
    return masks


def heads_by_mask(
    masks: list[Mask], num_kv_heads: int
) -> list[tuple[Mask, np.ndarray, np.ndarray]]:
    """(mask, query heads, kv heads) such that the query heads of each kv head stand together.

    kv heads of which a mask takes unequal numbers of query heads go to different entries.
    """
    group = len(masks) // num_kv_heads
    found: dict[tuple[Mask, int], list[tuple[list[int], int]]] = {}
    for mask in dict.fromkeys(masks):
        for kv_head in range(num_kv_heads):
            heads = range(kv_head * group, (kv_head + 1) * group)
            mine = [head for head in heads if masks[head] == mask]
            if mine:
                found.setdefault((mask, len(mine)), []).append((mine, kv_head))
    return [
        (mask, np.concatenate([heads for heads, _ in part]), np.array([kv for _, kv in part]))
        for (mask, _), part in found.items()
    ]


def _blocks_of(
    blocks: BlockSelection | None, heads: np.ndarray, kv_heads: np.ndarray, dims: Dims
) -> BlockSelection | None:
    if blocks is None or blocks.kv_blocks.shape[1] == 1:
        return blocks
    taken = heads if blocks.kv_blocks.shape[1] == dims["n"][0] else kv_heads
    return replace(
        blocks,
        kv_blocks=blocks.kv_blocks[:, taken],
        kinds=blocks.kinds[:, taken],
        counts=blocks.counts[:, taken],
    )


def _check_extra(extra_key: Any, extra_value: Any, dims: Dims) -> None:
    for name, this, other in (
        ("extra_key", extra_key, extra_value),
        ("extra_value", extra_value, extra_key),
    ):
        if this is None and other is not None:
            raise ValueError(f"{name}: got None, expected both extra_key and extra_value")
    if extra_key is not None:
        dims = dict(dims)
        check_shape("extra_key", extra_key, "b x k h", dims)
        check_shape("extra_value", extra_value, "b x k e", dims)


def _extra_tokens(tokens: Tokens, extra_key: jax.Array) -> Tokens:
    """One segment for all of the extra keys and all queries but padding."""
    length = extra_key.shape[1]
    positions = np.zeros((1, length), np.int32)
    if tokens.q_segment_ids is None:
        return Tokens(tokens.q_positions, positions, None, None, None)
    real = (tokens.q_segment_ids != 0).astype(jnp.int32)
    ones = jnp.ones((1, length), jnp.int32)
    return Tokens(tokens.q_positions, positions, real, ones, None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_rule(
    backend: dispatch.Backend,
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
) -> tuple[jax.Array, jax.Array]:
    return backend.forward(call, query, key, value, call.with_positions(tokens))


def _attend_forward(
    backend: dispatch.Backend,
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
) -> Any:
    out, lse = backend.forward(call, query, key, value, call.with_positions(tokens))
    # Named, so that a remat policy can keep them and spare a second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    # Under a name, a policy of `jax.checkpoint` can keep them: the kernel then runs once.
    out, lse = checkpoint_name(out, "mixer"), checkpoint_name(lse, "mixer")
    return (out, lse), (query, key, value, tokens, out, lse)


def _attend_backward(
    backend: dispatch.Backend, call: AttentionCall, residuals: Any, cotangents: Any
) -> Any:
    query, key, value, tokens, out, lse = residuals
    tokens = call.with_positions(tokens)
    gradients = backend.backward(call, query, key, value, tokens, out, lse, *cotangents)
    return *gradients, None


_attend_rule.defvjp(_attend_forward, _attend_backward)
# Compiled once per call description when used eagerly; inside another jit it is inlined.
_attend = jax.jit(_attend_rule, static_argnums=(0, 1), inline=True)
