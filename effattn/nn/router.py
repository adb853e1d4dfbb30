"""Router heads: numbers per token that decide what becomes of it, and the losses that teach them.

A decision has no gradient. It reaches the head through the score that scales what was decided on,
and through a loss that asks the logits to foretell the decision.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.layers import statistics_dtype
from effattn.nn.param import normal, parameter

KINDS = ("linear", "mlp")
SCORES = ("sigmoid", "tanh", "identity", "softmax")


class Router(nnx.Module):
    """[..., width] -> [..., outputs] logits, in float32 or wider whatever the compute dtype: a
    decision in bfloat16 falls either way where two tokens are near.

    kind: "linear", or "mlp" with one hidden layer of 2 width and the exact GELU; no biases.
    temperature divides the input. Raises ValueError for an unknown kind or a temperature <= 0.
    """

    def __init__(
        self,
        width: int,
        outputs: int = 1,
        *,
        kind: str = "linear",
        temperature: float = 1.0,
        init_std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        check_in("router", kind, KINDS)
        check_at_least("outputs", outputs, 1)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature}, expected more than 0")
        self.temperature = temperature
        init, hidden = normal(init_std), 2 * width
        wide = kind == "mlp"
        self.hidden = parameter((width, hidden), ("embed", "mlp"), init, rngs) if wide else None
        shape, axes = ((hidden, outputs), "mlp") if wide else ((width, outputs), "embed")
        # The outputs have no name: a row per decision is no matrix to orthogonalise.
        self.kernel = parameter(shape, (axes, None), init, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(statistics_dtype(x.dtype))
        if self.temperature != 1:
            x = x / self.temperature
        if self.hidden is not None:
            x = jax.nn.gelu(_product(x, self.hidden[...]), approximate=False)
        return _product(x, self.kernel[...])


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def score(logits: jax.Array, name: str, alpha: float) -> jax.Array:
    """alpha sigmoid(g), alpha tanh(g), alpha softmax(g) over the last axis, or g ("identity")."""
    check_in("score", name, SCORES)
    if name == "identity":
        return logits
    function = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "softmax": jax.nn.softmax}[name]
    return alpha * function(logits)


def top_rows(
    scores: jax.Array, count: jax.Array, eligible: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` rows of highest score in every row of a batch; of equal ones the earlier.

    scores: [batch, seq_len]. count: int [batch], at most `capacity` and the eligible rows.
    eligible: bool [batch, seq_len]. Returns (source: int32 [batch, capacity], their slots in
    rising order and seq_len behind them, as of `compact.sources`; chosen: bool [batch, seq_len]).
    """
    batch, length = scores.shape
    # Of equal values `top_k` names the one of lower index first: the order is (score, -position).
    ranked = jnp.where(eligible, jax.lax.stop_gradient(scores), -jnp.inf)
    _, order = jax.lax.top_k(ranked, capacity)
    order = jnp.where(jnp.arange(capacity) < count[:, None], order, length)
    source = jnp.sort(order, axis=1).astype(jnp.int32)
    chosen = jnp.zeros((batch, length), bool)
    chosen = chosen.at[jnp.arange(batch)[:, None], source].set(True, mode="drop")
    return source, chosen


# ---- losses: [...] logits or scores -> sums over the tokens of a mask


def foretelling_loss(logits: jax.Array, chosen: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of the binary cross entropy of sigmoid(logits) with `chosen`; all [batch, seq_len]."""
    loss = jax.nn.softplus(logits) - jnp.where(chosen, logits, 0)
    return jnp.sum(jnp.where(mask, loss, 0))


def z_loss(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of logsumexp(logits)^2 over the outputs. logits: [batch, seq_len, outputs]."""
    return jnp.sum(jnp.where(mask, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0))


def load(choice: jax.Array, mask: jax.Array, outputs: int) -> jax.Array:
    """float32 [outputs]: how many tokens of the mask chose each. choice: int [batch, seq_len]."""
    one_hot = (choice[..., None] == jnp.arange(outputs)) & mask[..., None]
    return jnp.sum(one_hot, axis=(0, 1), dtype=jnp.float32)


def balance_loss(scores: jax.Array, loads: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum over tokens of outputs x sum_e f_e score_e, f_e the share of tokens that chose e.

    Least where the loads are equal. scores: [batch, seq_len, outputs]; loads: [outputs], of `load`,
    which carry no gradient. Source: Fedus et al. 2021, Switch Transformers, equations 4 to 6.
    """
    share = loads / jnp.maximum(jnp.sum(loads), 1)
    per_token = scores.shape[-1] * jnp.sum(scores * share.astype(scores.dtype), axis=-1)
    return jnp.sum(jnp.where(mask, per_token, 0))


def moved_bias(bias: jax.Array, loads: Any, rate: float) -> jax.Array:
    """The bias of a selection after a step: up by `rate` for what was chosen less than the mean.

    Balances loads without a loss. Source: Wang et al. 2024 (arXiv 2408.15664).
    """
    return bias + rate * jnp.sign(jnp.mean(loads) - loads).astype(bias.dtype)
