"""The definition: the recurrence of the delta rule, one token at a time.

S'_t = exp(log_decay_t) S_{t-1}
S_t  = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T        out_t = scale S_t^T q_t
"""

from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.delta_rule.call import DeltaRuleCall, Operands
from effattn.pallas_kernels.dispatch import Backend


def forward(call: DeltaRuleCall, operands: Operands) -> tuple[jax.Array, jax.Array]:
    query, key, value, beta, log_decay, state, runs = operands
    dtype, repeats = call.state_dtype, call.num_heads // call.num_key_heads
    if state is None:
        state = jnp.zeros(call.state_shape, dtype)
    if runs is None:
        runs = jnp.zeros((call.batch, call.seq_len), jnp.int32)
    decay = jnp.ones_like(beta) if log_decay is None else jnp.exp(log_decay)
    query, key = (jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (query, key))

    def token(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        state, run = carry
        q, k, v, beta, decay, run_t = x
        decay = decay * (run_t == run)[:, None]
        state = decay[..., None, None] * state
        recalled = jnp.einsum("bhde,bhd->bhe", state, k, precision="highest")
        state = state + k[..., None] * (beta[..., None] * (v - recalled))[..., None, :]
        out = call.scale * jnp.einsum("bhde,bhd->bhe", state, q, precision="highest")
        return (state, run_t), out

    by_token = jax.tree.map(
        lambda x: x.swapaxes(0, 1), (query, key, value.astype(dtype), beta, decay, runs)
    )
    carry = (state, jnp.zeros(call.batch, jnp.int32))
    (state, _), out = jax.lax.scan(token, carry, by_token)
    return out.swapaxes(0, 1).astype(call.dtype), state


def backward(call: DeltaRuleCall, operands: Operands, d_out: Any, d_state: Any) -> Operands:
    """Plain autodiff of `forward`."""

    def outputs(*arrays: Any) -> Any:
        return forward(call, Operands._make([*arrays, operands.runs]))

    (_, state), vjp = jax.vjp(outputs, *operands[:6])
    d_state = jnp.zeros_like(state) if d_state is None else d_state
    return Operands._make([*vjp((d_out, d_state)), None])


def _refuses(call: DeltaRuleCall) -> str | None:
    return None


BACKEND = Backend("reference", _refuses, forward, backward)
