"""Attention written as its definition: every logit at once, differentiated by jax itself."""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.blocks import selected
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.dispatch import Backend

MAX_LOGITS = 2**31


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    allowed: Any,
    *,
    scale: float,
    logit_soft_cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(softmax(scale query key^T + log allowed) value, log-sum-exp of the same logits).

    query: [b, t, num_heads, d]; key: [b, s, num_kv_heads, d]; value: [b, s, num_kv_heads, e];
    allowed: bool, broadcastable to [b, num_heads, t, s]. A query that is allowed nothing gets
    out 0 and lse -inf. Returns out [b, t, num_heads, e] and lse [b, t, num_heads].
    """
    accumulator = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.astype(accumulator) for x in (query, key, value))
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    logits = scale * jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
    if logit_soft_cap is not None:
        logits = logit_soft_cap * jnp.tanh(logits / logit_soft_cap)
    largest = jax.lax.stop_gradient(jnp.where(allowed, logits, -jnp.inf).max(-1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0, largest)
    # The inner where keeps what is masked out of exp, whose overflow would be 0 * inf in reverse.
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, logits - largest, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    out = jnp.einsum("bhts,bshe->bthe", weights / total, v, precision="highest")
    lse = jnp.where(seen, largest + jnp.log(total), -jnp.inf)[..., 0]
    return out.astype(query.dtype), lse.swapaxes(1, 2)


def allowed_pairs(call: AttentionCall, tokens: Tokens) -> jax.Array:
    """Bool [batch | 1, num_heads | 1, q_len, kv_len] from mask, segments and block selection."""
    q_pos, kv_pos = jnp.asarray(tokens.q_positions), jnp.asarray(tokens.kv_positions)
    allowed = call.mask.allowed(q_pos[:, None, :, None], kv_pos[:, None, None, :])
    if call.has_segments:
        q_ids = tokens.q_segment_ids[:, None, :, None]
        allowed &= (q_ids == tokens.kv_segment_ids[:, None, None, :]) & (q_ids != 0)
    blocks = tokens.blocks
    if blocks is not None:
        chosen = selected(blocks, -(-call.kv_len // blocks.kv_block))
        chosen = jnp.repeat(chosen, blocks.q_block, 2)[:, :, : call.q_len]
        chosen = jnp.repeat(chosen, blocks.kv_block, 3)[..., : call.kv_len]
        heads = chosen.shape[1]
        allowed &= chosen if heads == 1 else jnp.repeat(chosen, call.num_heads // heads, 1)
    return allowed


def refuses(call: AttentionCall) -> str | None:
    logits = call.batch * call.num_heads * call.q_len * call.kv_len
    if logits > MAX_LOGITS:
        return f"it would hold all {logits} logits at once, more than 2**31"
    return None


def forward(
    call: AttentionCall, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    return dense_attention(
        query,
        key,
        value,
        allowed_pairs(call, tokens),
        scale=call.scale,
        logit_soft_cap=call.logit_soft_cap,
    )


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
    _, pull = jax.vjp(lambda q, k, v: forward(call, q, k, v, tokens), query, key, value)
    return pull((dout, dlse))


BACKEND = Backend("reference", refuses, forward, backward)
