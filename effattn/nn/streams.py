"""Several streams of one input: laid into the batch for the layers, joined again after them.

Rows of a folded batch are stream-major: row s * batch + b is stream s of input row b, so every
layer sees one larger batch and one matrix product serves all streams. Only the join looks across
streams. Source: Chen et al. 2025, ParScale (arXiv 2505.10475).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.nn.layers import statistics_dtype
from effattn.nn.param import Dense, normal
from effattn.parallel.mesh import constrain_streams


def fold(tree: Any, streams: int) -> Any:
    """Every leaf [batch, ...] as [streams * batch, ...], the same for all streams."""

    def repeat(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        rows = jnp.broadcast_to(leaf, (streams, *leaf.shape))
        return constrain_streams(rows).reshape(-1, *leaf.shape[1:])

    return tree if streams == 1 else jax.tree.map(repeat, tree)


def unfold(x: jax.Array, streams: int) -> jax.Array:
    """[streams * batch, ...] -> [streams, batch, ...]."""
    return constrain_streams(x.reshape(streams, -1, *x.shape[1:]))


class Aggregation(nnx.Module):
    """sum_s a_s x_s over streams, a = (1 - smoothing) softmax(out(silu(inner(all x)))) + smoothing
    / streams, per token.

    The perceptron reads the streams' features side by side, those of one channel together. Weights
    and sum in float32; matrices N(0, init_std^2), biases zero.
    """

    def __init__(
        self,
        width: int,
        streams: int,
        *,
        smoothing: float,
        init_std: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.streams, self.smoothing = streams, smoothing
        options: dict[str, Any] = {
            "init": normal(init_std),
            "use_bias": True,
            "dtype": dtype,
            "rngs": rngs,
        }
        self.inner = Dense(streams * width, width, ("embed", "mlp"), **options)
        # Not a matrix to orthogonalise: it has as few columns as there are streams.
        self.out = Dense(width, streams, ("mlp", None), **options)

    def interleaved(self, x: jax.Array) -> jax.Array:
        """[streams, ..., width] -> [..., width * streams]: channel d of stream s is entry
        d * streams + s."""
        x = jnp.moveaxis(x, 0, -1)
        return x.reshape(*x.shape[:-2], -1)

    def scores(self, x: jax.Array) -> jax.Array:
        """[streams, ..., width] -> [..., streams], before the softmax."""
        return self.out(jax.nn.silu(self.inner(self.interleaved(x))))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x: [streams, ..., width] -> ([..., width] like x, weights [..., streams] in float32)."""
        scores = self.scores(x)
        wide = statistics_dtype(scores.dtype)
        weights = jax.nn.softmax(scores.astype(wide), axis=-1)
        weights = weights * (1 - self.smoothing) + self.smoothing / self.streams
        y = jnp.einsum("...s,s...d->...d", weights, x.astype(wide))
        return y.astype(x.dtype), weights
