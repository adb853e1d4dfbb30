"""MrT5's delete gate: which tokens of an encoder the layers after it need not see.

In training a deleted token is masked softly and stays where it is; afterwards it is removed and the
rest moves together. Source: Kallini et al. 2024, MrT5 (arXiv 2410.20771), the authors' code.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.layers import RMSNorm, statistics_dtype
from effattn.nn.param import Dense
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments


class Gate(NamedTuple):
    """logits, mask: float32 at least, [batch, seq_len]. mask: scale * sigmoid(-logit), from `scale`
    (deleted) to 0 (kept), added to the scores of a key; padding has `scale` itself.
    kept: bool, mask > scale / 2, which is logit > 0.
    """

    logits: jax.Array
    mask: jax.Array
    kept: jax.Array


class DeleteGate(nnx.Module):
    """`scale * sigmoid(-(w . norm(h) + b))`; b starts at 1, so that at first little is deleted."""

    def __init__(self, width: int, *, scale: float, eps: float, dtype: Any, rngs: nnx.Rngs):
        if not scale < 0:
            raise ValueError(f"gate_scale: got {scale}, expected less than 0")
        self.scale = scale
        wide = statistics_dtype(dtype)
        self.norm = RMSNorm(width, eps=eps, dtype=wide, rngs=rngs)
        init = jax.nn.initializers.xavier_uniform()
        options: dict[str, Any] = {"init": init, "use_bias": True, "dtype": wide, "rngs": rngs}
        self.project = Dense(width, 1, ("embed", None), **options)
        assert self.project.bias is not None
        self.project.bias[...] = jnp.ones_like(self.project.bias[...])

    def __call__(self, x: jax.Array, info: TokenInfo, *, key: jax.Array | None = None) -> Gate:
        """x: [batch, seq_len, width]. key: for Gumbel noise on the logits; None: none.

        A document that would lose every token keeps its first: the authors' code fails on a batch
        without any, and attends padding in such a row.
        """
        logits = self.project(self.norm(x))[..., 0]
        noisy = logits
        if key is not None:
            noise = jax.random.gumbel(key, (2, *logits.shape), logits.dtype)
            noisy = logits + noise[0] - noise[1]
        mask = jnp.where(info.valid, self.scale * jax.nn.sigmoid(-noisy), self.scale)
        kept = (mask > self.scale / 2) & info.valid
        return Gate(logits, mask, keep_one(kept, info))


def keep_one(kept: jax.Array, info: TokenInfo) -> jax.Array:
    """`kept`, and the first valid token of every document that keeps none. bool [batch, seq_len]"""
    documents, valid = runs_of_segments(info.segments)

    def row(kept: jax.Array, documents: jax.Array, valid: jax.Array) -> jax.Array:
        size = len(documents)
        any_kept = jax.ops.segment_max(kept & valid, documents, size)[documents]
        place = jnp.where(valid, jnp.arange(size), size)
        first = place == jax.ops.segment_min(place, documents, size)[documents]
        return kept | (valid & first & ~any_kept)

    return jax.vmap(row)(kept, documents, valid)


def deletion_loss(gate: Gate, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of the mean gate mask over what is valid: negative, least where all is gone."""
    weight = jnp.sum(valid, dtype=gate.mask.dtype)
    return jnp.sum(jnp.where(valid, gate.mask, 0)), weight


class Controller(NamedTuple):
    """A PI controller's state, float32 scalars: the loss's weight follows the share deleted.

    proportional, integral: its two terms. weight: max(0, their sum), what the next step uses.
    """

    proportional: jax.Array
    integral: jax.Array
    weight: jax.Array

    @classmethod
    def start(cls) -> "Controller":
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    def update(
        self, deleted: jax.Array, target: float, *, proportional_gain: float, integral_gain: float
    ) -> "Controller":
        """After a step that deleted the share `deleted` where `target` is wanted.

        p <- 0.9 p + 0.1 k_p (target - deleted); i <- i + k_i (target - deleted).
        """
        error = jnp.float32(target) - jax.lax.stop_gradient(deleted).astype(jnp.float32)
        proportional = 0.9 * self.proportional + 0.1 * proportional_gain * error
        integral = self.integral + integral_gain * error
        weight = jnp.maximum(proportional + integral, 0)
        return Controller(proportional, integral, weight)
