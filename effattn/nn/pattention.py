"""Pattention: attention from tokens to learned key-value pairs, TokenFormer's stand-in for Dense.

The pairs ("slots") are rows of two matrices, so a trained layer grows by appending rows, which
`grow` does. Source: Wang et al. 2024, TokenFormer (arXiv 2410.23168), the authors' code.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.layers import statistics_dtype
from effattn.nn.param import normal, parameter, project

NORMALISATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
TAUS = ("fixed", "sqrt_slots")
# The authors divide by the norm as it is: scores that are all zero would be 0 / 0.
SMALLEST_NORM = 1e-12


def normalise_scores(scores: jax.Array, normalisation: str, slots: int) -> jax.Array:
    """The weights of the slots from their scores, both [..., slots of the layer].

    l2_norm_gelu: gelu(a / |a| * sqrt(slots)). gelu_l2_norm: gelu(a) / |gelu(a)| * sqrt(slots).
    softmax: slots * softmax(a). slots: the number that sets the scale, see `Pattention`.
    """

    def unit(a: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(a), axis=-1, keepdims=True)
        return a * (slots**0.5 * jax.lax.rsqrt(jnp.maximum(square, SMALLEST_NORM**2)))

    if normalisation == "l2_norm_gelu":
        return jax.nn.gelu(unit(scores), approximate=False)
    if normalisation == "gelu_l2_norm":
        return unit(jax.nn.gelu(scores, approximate=False))
    return slots * jax.nn.softmax(scores, axis=-1)


class Pattention(nnx.Module):
    """`weights(x keys^T) values`. slot_keys: [slots, in]; slot_values: [slots, out]. No biases.

    axes: names of the input and the output axis. tau "sqrt_slots" scales the weights with the
    number of slots, as the authors do; "fixed" with base_slots (None: slots), the number before any
    growth. A slot whose key is zero then adds gelu(0) = 0, whatever its value, so that growth by
    zero keys leaves the output as it was. (Not with softmax, where a zero score has a weight.)
    Scores and weights are float32 at least. Raises ValueError for unknown names and slots < 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        slots: int,
        axes: tuple[str, str] = ("embed", "embed"),
        *,
        normalisation: str = "l2_norm_gelu",
        tau: str = "fixed",
        base_slots: int | None = None,
        key_std: float = 0.02,
        value_std: float = 0.02,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        check_in("normalisation", normalisation, NORMALISATIONS)
        check_in("tau", tau, TAUS)
        check_at_least("slots", slots, 1)
        base_slots = slots if base_slots is None else base_slots
        check_at_least("base_slots", base_slots, 1)
        check_at_least("slots", slots, base_slots)
        self.normalisation, self.dtype = normalisation, dtype
        self.scale_slots = slots if tau == "sqrt_slots" else base_slots
        inward, outward = axes
        self.slot_keys = parameter((slots, in_features), ("slots", inward), normal(key_std), rngs)
        self.slot_values = parameter(
            (slots, out_features), ("slots", outward), normal(value_std), rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., in] -> [..., out]."""
        scores = project(x, self.slot_keys[...].T, self.dtype, statistics_dtype(self.dtype))
        weights = normalise_scores(scores, self.normalisation, self.scale_slots)
        return project(weights.astype(self.dtype), self.slot_values[...], self.dtype, self.dtype)


def grow(
    params: dict,
    slots: Callable[[tuple[Any, ...]], int],
    *,
    value_std: float = 0.02,
    key: jax.Array,
) -> dict:
    """`params` (a pure dict) with every Pattention in it grown to `slots(path)` slots.

    path: the layer's place in the dict, a tuple of names. New keys are zero and new values
    N(0, value_std^2): with tau "fixed" the function is the same, and since a value is not zero its
    key has a gradient; were both zero neither would ever move. (The authors draw new keys as well,
    which changes the function.) The old rows come first and are kept bit for bit.
    Raises ValueError where a layer would shrink.
    """

    def walk(node: Any, path: tuple[Any, ...]) -> Any:
        if not isinstance(node, dict):
            return node
        if "slot_keys" not in node:
            return {name: walk(child, (*path, name)) for name, child in node.items()}
        keys, values = node["slot_keys"], node["slot_values"]
        wanted, there = slots(path), keys.shape[-2]
        if wanted < there:
            where = ".".join(map(str, path))
            raise ValueError(f"slots of {where}: got {wanted}, expected at least {there}")
        # One draw per layer, told apart by its place, so that the order of the walk is no matter.
        of_layer = jax.random.fold_in(key, zlib.crc32(".".join(map(str, path)).encode()))
        new = wanted - there
        drawn = jax.random.normal(of_layer, (*values.shape[:-2], new, values.shape[-1]))
        zeros = jnp.zeros((*keys.shape[:-2], new, keys.shape[-1]), keys.dtype)
        return {
            "slot_keys": jnp.concatenate([keys, zeros], axis=-2),
            "slot_values": jnp.concatenate(
                [values, value_std * drawn.astype(values.dtype)], axis=-2
            ),
        }

    return walk(params, ())
