"""The definition: the recurrence of linear attention, one token at a time.

    S_t = exp(log_decay_t) S_{t-1} + phi(k_t) v_t^T        out_t = scale phi(q_t)^T S_t

and the same with v = 1 for the denominator.
"""

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands, Result
from effattn.pallas_kernels.linear_attention.features import apply_feature_map, query_scale
from effattn.pallas_kernels.linear_attention.state import LinearState, init_linear_state


def forward(call: LinearAttentionCall, operands: Operands) -> Result:
    query, key, value, log_decay, state, runs, valid = operands
    dtype = call.state_dtype
    shape = (call.batch, call.seq_len)
    repeats = call.num_heads // call.num_key_heads
    if state is None:
        state = init_linear_state(
            call.batch, call.num_heads, call.key_dim, call.value_dim,
            feature_map=call.feature_map, normalize=True, dtype=dtype,
        )  # fmt: skip
    elif state.normalizer is None:
        state = LinearState(state.kv, jnp.zeros_like(state.kv[..., 0]))
    runs = jnp.zeros(shape, jnp.int32) if runs is None else runs
    valid = jnp.ones(shape, bool) if valid is None else valid
    decay = jnp.ones((1, 1, 1, 1), dtype)
    if log_decay is not None:
        decay = jnp.exp(log_decay.astype(dtype))
        decay = decay[None, None] if decay.ndim == 1 else decay
        decay = decay[..., None] if decay.ndim == 3 else decay
    decay = jnp.broadcast_to(decay, (*shape, call.num_heads, decay.shape[-1]))

    q, k = (
        jnp.repeat(apply_feature_map(call.feature_map, x.astype(dtype), call.scale), repeats, 2)
        for x in (query, key)
    )
    q = q * query_scale(call.feature_map, call.scale)

    def token(carry, x):
        kv, normalizer, run = carry
        q_t, k_t, v_t, decay_t, run_t, valid_t = x
        decay_t = decay_t * (run_t == run)[:, None, None]
        k_t = k_t * valid_t[:, None, None]
        kv = decay_t[..., None] * kv + k_t[..., :, None] * v_t[..., None, :]
        normalizer = decay_t * normalizer + k_t
        out = jnp.einsum("bhf,bhfe->bhe", q_t, kv, precision="highest")
        denominator = jnp.einsum("bhf,bhf->bh", q_t, normalizer, precision="highest") + call.eps
        denominator = jnp.where(valid_t[:, None], denominator, 1)
        if call.normalize:
            out = out / denominator[..., None]
        out = jnp.where(valid_t[:, None, None], out, 0)
        return (kv, normalizer, run_t), (out, denominator)

    by_token = jax.tree.map(
        lambda x: x.swapaxes(0, 1), (q, k, value.astype(dtype), decay, runs, valid)
    )
    carry = (*state, jnp.zeros(call.batch, jnp.int32))
    (kv, normalizer, _), outputs = jax.lax.scan(token, carry, by_token)
    out, denominator = jax.tree.map(lambda x: x.swapaxes(0, 1), outputs)
    out = out.astype(call.dtype)
    if not call.normalize:
        return Result(out, None, LinearState(kv, None))
    return Result(out, denominator, LinearState(kv, normalizer))


def backward(call, operands, out, denominator, d_out, d_state) -> Operands:
    """Plain autodiff of `forward`."""
    del out, denominator

    def outputs(*arrays):
        result = forward(call, Operands(*arrays, operands.runs, operands.valid))
        return result.out, result.state

    (_, state), vjp = jax.vjp(outputs, *operands[:5])
    d_state = LinearState(
        *(
            jnp.zeros_like(x) if x is not None and dx is None else dx
            for x, dx in zip(state, d_state, strict=True)
        )
    )
    return Operands(*vjp((d_out, d_state)), None, None)


def _refuses(call: LinearAttentionCall) -> str | None:
    return None


BACKEND = Backend("reference", _refuses, forward, backward)
