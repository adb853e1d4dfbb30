"""Join attention over two sets of keys into attention over both, from log-sum-exps alone.

Rings, split caches, sparse branches and learned prefixes are built on this one identity.
"""

import jax
import jax.numpy as jnp


def merge(
    out1: jax.Array, lse1: jax.Array, out2: jax.Array, lse2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of one softmax over both key sets: lse = log(exp lse1 + exp lse2).

    out1, out2: [batch, seq_len, num_heads, value_dim]; lse1, lse2: [batch, seq_len, num_heads],
    -inf where a query saw no key. Where both are -inf: out 0, lse -inf, zero gradients.
    Differentiable in all four; the arithmetic is in the dtype of the log-sum-exps.
    """
    # Any finite reference cancels, so it carries no gradient. Where both lse are -inf it must
    # not be -inf itself: exp(-inf - -inf) is nan.
    largest = jax.lax.stop_gradient(jnp.maximum(lse1, lse2))
    reference = jnp.where(largest == -jnp.inf, 0, largest)
    weight1, weight2 = jnp.exp(lse1 - reference), jnp.exp(lse2 - reference)
    total = weight1 + weight2
    seen = total > 0
    total = jnp.where(seen, total, 1)
    out = out1 * (weight1 / total)[..., None] + out2 * (weight2 / total)[..., None]
    lse = jnp.where(seen, reference + jnp.log(total), -jnp.inf)
    return out.astype(jnp.result_type(out1, out2)), lse
