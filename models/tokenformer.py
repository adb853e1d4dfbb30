"""TokenFormer: a transformer whose every linear layer attends to learned key-value pairs.

`x += out(attention(query, key, value of norm(x))); x += pattention(norm(x))`, the five of them
Pattentions; `grow` adds slots to a trained model. Source: Wang et al. 2024 (arXiv 2410.23168).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_multiple
from effattn.nn import pattention
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, Head, LayerNorm, statistics_dtype
from effattn.nn.mixers.attention import Attention, AttentionConfig
from effattn.nn.pattention import Pattention
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class TokenFormerConfig:
    """attention_slots: of query, key, value and output; None: width. mlp_slots None: 4 width.

    normalisation: l2_norm_gelu | gelu_l2_norm | softmax. tau: "fixed" keeps the scale that belongs
    to base_attention_slots and base_mlp_slots (None: no growth so far), so that `grow` does not
    change what the model computes; "sqrt_slots" is the authors', whose scale moves with growth.
    rotary_fraction: the turned part of a head, rounded down to pairs. Values start with a standard
    deviation of 2 / (num_layers sqrt(width)). remat: none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    attention_slots: int | None = None
    mlp_slots: int | None = None
    normalisation: str = "l2_norm_gelu"
    tau: str = "fixed"
    base_attention_slots: int | None = None
    base_mlp_slots: int | None = None
    rotary_fraction: float = 0.25
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def slots(self) -> tuple[int, int]:
        """Slots of the four Pattentions of attention, and of the one in the MLP's place."""
        attention = self.width if self.attention_slots is None else self.attention_slots
        return attention, 4 * self.width if self.mlp_slots is None else self.mlp_slots

    def flops_by_part(
        self, *, vocab_size: int, seq_len: int
    ) -> tuple[tuple[str, int, str, float], ...]:
        """Scores and values of 5 Pattentions, and of the visible pairs of tokens; see flops.py."""
        (attention, mlp), layers = self.slots(), self.num_layers
        return (
            ("layer", layers, "projections", layers * 2 * 2 * self.width * 4 * attention),
            ("layer", layers, "pairs", layers * 4 * self.width * (seq_len + 1) / 2),
            ("layer", layers, "mlp", layers * 2 * 2 * self.width * mlp),
            ("head", 1, "logits", 2 * self.width * vocab_size),
        )

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "TokenFormer":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_multiple("model.width", self.width, "model.num_heads", self.num_heads)
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(
                f"model.rotary_fraction: got {self.rotary_fraction}, expected a part of 1"
            )
        return TokenFormer(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class SimpleLayerNorm(nnx.Module):
    """`(x - mean(x)) / sqrt(var(x) + eps)` over the last axis: LayerNorm without parameters."""

    def __init__(self, *, eps: float, dtype: Any):
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(statistics_dtype(x.dtype))
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.eps)).astype(self.dtype)


class TokenFormer(LanguageModel):
    def __init__(
        self,
        config: TokenFormerConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        attention_slots, mlp_slots = config.slots()
        head_dim = width // config.num_heads
        attention = AttentionConfig(
            num_heads=config.num_heads,
            rotary_dim=int(head_dim * config.rotary_fraction) // 2 * 2,
            rotary_base=config.rotary_base,
        )

        def tokens(
            slots: int, base: int | None, axes: tuple[str, str], rngs: nnx.Rngs
        ) -> Pattention:
            return Pattention(
                width,
                width,
                slots,
                axes,
                normalisation=config.normalisation,
                tau=config.tau,
                base_slots=base,
                key_std=std,
                value_std=value_std(config),
                dtype=dtype,
                rngs=rngs,
            )

        def mixer(rngs: nnx.Rngs) -> Attention:
            made = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            slots = attention_slots, config.base_attention_slots
            axes = {
                "query": ("embed", "heads"),
                "key": ("embed", "kv_heads"),
                "value": ("embed", "kv_heads"),
                "out": ("heads", "embed"),
            }
            # The projections are all that differs. Under jit the ones replaced are never drawn.
            for name, names in axes.items():
                setattr(made, name, tokens(*slots, names, rngs))
            return made

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mlp = tokens(mlp_slots, config.base_mlp_slots, ("embed", "embed"), rngs)
            norms = [SimpleLayerNorm(eps=config.norm_eps, dtype=dtype) for _ in range(2)]
            return Block(mixer(rngs), mlp, *norms)

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(("layer",) * config.num_layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = LayerNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )


def value_std(config: TokenFormerConfig) -> float:
    """The standard deviation that slot values start with."""
    return 2 / (config.num_layers * config.width**0.5)


def grow(
    config: TokenFormerConfig,
    params: dict,
    *,
    attention_slots: int,
    mlp_slots: int,
    key: jax.Array,
) -> tuple[TokenFormerConfig, dict]:
    """(config, params) of a larger model that starts where the trained one ended.

    params: the pure dict of a TokenFormer's parameters, such as `TrainState.params`. With tau
    "fixed" and a normalisation other than "softmax" the new model computes the same function. An
    optimizer starts anew. Raises ValueError where slots would shrink.
    """
    attention, mlp = config.slots()
    base_attention, base_mlp = config.base_attention_slots, config.base_mlp_slots
    larger = dataclasses.replace(
        config,
        attention_slots=attention_slots,
        mlp_slots=mlp_slots,
        base_attention_slots=attention if base_attention is None else base_attention,
        base_mlp_slots=mlp if base_mlp is None else base_mlp,
    )

    def slots(path: tuple[Any, ...]) -> int:
        return mlp_slots if path[-1] == "mlp" else attention_slots

    return larger, pattention.grow(params, slots, value_std=value_std(config), key=key)
