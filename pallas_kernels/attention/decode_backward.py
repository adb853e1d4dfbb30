"""Gradients of decode attention: those of `attention` over the same slots."""

from functools import partial

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.attention.api import attention
from effattn.pallas_kernels.attention.decode_call import DecodeCall, Places


def backward(
    call: DecodeCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    places: Places,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every backend's: a cache is differentiated too seldom to deserve a kernel of its own."""
    _, pull = jax.vjp(partial(_through_attention, call, places), query, key, value)
    return pull((dout, dlse))


def _through_attention(
    call: DecodeCall, places: Places, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    held = jnp.arange(call.cache_len) < places.lengths[:, None]
    # Slots past the length are padding, which has weight 0: but 0 * nan is nan.
    key, value = (jnp.where(held[..., None, None], x, 0) for x in (key, value))
    return attention(
        query,
        key,
        value,
        mask=call.mask,
        q_positions=places.q_positions,
        kv_positions=places.of_slots(call.cache_len),
        q_segment_ids=jnp.ones_like(places.q_positions),
        kv_segment_ids=held.astype(jnp.int32),
        scale=call.scale,
        logit_soft_cap=call.logit_soft_cap,
        return_lse=True,
    )
