"""The small layers that models share: norms, gated MLPs, the token embedding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least
from effattn.nn.param import Axes, Dense, normal, parameter, project
from effattn.parallel.tiles import rows_of_own_tokens

# Rows of the embedding table come in multiples of this, for the matrix units and for sharding.
VOCAB_MULTIPLE = 8


def statistics_dtype(dtype: Any) -> Any:
    """The dtype of sums and residuals over values of `dtype`: float32, or float64 under x64."""
    return jnp.promote_types(dtype, jnp.float32)


class RMSNorm(nnx.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, statistics in float32.

    Source: Zhang and Sennrich 2019.
    """

    def __init__(
        self, width: int, *, axes: Axes = ("embed",), eps: float = 1e-5, dtype: Any, rngs: nnx.Rngs
    ):
        self.eps, self.dtype = eps, dtype
        self.scale = parameter((width,), axes, jax.nn.initializers.ones, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(statistics_dtype(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(self.dtype)


class SimpleRMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps)` over the last axis: RMSNorm without a scale. Qin et al. 2023."""

    def __init__(self, *, eps: float = 1e-6, dtype: Any):
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(statistics_dtype(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps)).astype(self.dtype)


class LayerNorm(nnx.Module):
    """`scale * (x - mean(x)) / sqrt(var(x) + eps) + bias` over the last axis, in float32.

    Source: Ba et al. 2016.
    """

    def __init__(
        self, width: int, *, axes: Axes = ("embed",), eps: float = 1e-5, dtype: Any, rngs: nnx.Rngs
    ):
        self.eps, self.dtype = eps, dtype
        self.scale = parameter((width,), axes, jax.nn.initializers.ones, rngs)
        self.bias = parameter((width,), axes, jax.nn.initializers.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(statistics_dtype(x.dtype))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


class MLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        activation: Callable[[jax.Array], jax.Array],
        use_bias: bool = False,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        options: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        out_std = init_std if out_init_std is None else out_init_std
        self.up = Dense(width, mlp_width, ("embed", "mlp"), init=normal(init_std), **options)
        self.down = Dense(mlp_width, width, ("mlp", "embed"), init=normal(out_std), **options)

    def hidden(self, x: jax.Array) -> jax.Array:
        """[..., mlp_width]"""
        return self.activation(self.up(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.hidden(x))


def gated_mlp_width(width: int) -> int:
    """8/3 width rounded up to a multiple of 64: the weights of a plain MLP of 4 width."""
    return -(-8 * width // (3 * 64)) * 64


class GatedMLP(nnx.Module):
    """SwiGLU: `down(up(x) * silu(gate(x)))`, no biases. Source: Shazeer 2020."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        init = normal(init_std)
        out_init = init if out_init_std is None else normal(out_init_std)
        # Two kernels rather than one split: a split of a sharded axis makes XLA reshard.
        self.up = Dense(width, mlp_width, ("embed", "mlp"), init=init, dtype=dtype, rngs=rngs)
        self.gate = Dense(width, mlp_width, ("embed", "mlp"), init=init, dtype=dtype, rngs=rngs)
        self.down = Dense(mlp_width, width, ("mlp", "embed"), init=out_init, dtype=dtype, rngs=rngs)

    def hidden(self, x: jax.Array) -> jax.Array:
        """[..., mlp_width]"""
        return self.up(x) * jax.nn.silu(self.gate(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.hidden(x))


class SGLU(GatedMLP):
    """`down(up(x) * gate(x))`: the gated MLP without an activation. Source: Qin et al. 2023."""

    def hidden(self, x: jax.Array) -> jax.Array:
        return self.up(x) * self.gate(x)


class Embedding(nnx.Module):
    """Token vectors, and logits from the same table where the head is tied.

    The table has `vocab_size` rows rounded up to a multiple of 8; the rows beyond `vocab_size`
    are never looked up and their logits are cut off.
    """

    def __init__(
        self, vocab_size: int, width: int, *, init_std: float = 0.02, dtype: Any, rngs: nnx.Rngs
    ):
        check_at_least("vocab_size", vocab_size, 1)
        self.vocab_size, self.dtype = vocab_size, dtype
        rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.table = parameter((rows, width), ("vocab", "embed"), normal(init_std), rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[...] int -> [..., width] in the table's dtype; NaN for a token outside the table."""
        if tokens.ndim != 2:
            # A decoding step is left to XLA: rows laid over devices here end its partitioner at the
            # cache, on a mesh of rows, tokens and heads (jax 0.12.0.1).
            return jnp.take(self.table[...], tokens, axis=0)
        return rows_of_own_tokens(self.table, tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., width] -> [..., vocab_size], float32."""
        return _logits(hidden, self.table[...].T, self.vocab_size, self.dtype)


class Head(nnx.Module):
    """An untied output head: [..., width] -> float32 logits [..., vocab_size]."""

    def __init__(
        self, width: int, vocab_size: int, *, init_std: float = 0.02, dtype: Any, rngs: nnx.Rngs
    ):
        self.vocab_size, self.dtype = vocab_size, dtype
        rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.kernel = parameter((width, rows), ("embed", "vocab"), normal(init_std), rngs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return _logits(hidden, self.kernel[...], self.vocab_size, self.dtype)


def _logits(hidden: jax.Array, kernel: jax.Array, vocab_size: int, dtype: Any) -> jax.Array:
    logits = project(hidden, kernel, dtype, statistics_dtype(dtype))
    return logits[..., :vocab_size]
