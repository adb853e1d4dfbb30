"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU.

Source: Touvron et al. 2023 (arXiv 2302.13971), the "Transformer++" baseline of later papers.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, gated_mlp_width
from effattn.nn.mixers.attention import AttentionConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class TransformerConfig:
    """num_kv_heads None: num_heads. head_dim None: width / num_heads. mlp_width None: 8/3 width,
    rounded up to a multiple of 64. window: tokens seen to the left; None: all. rotary_dim None:
    the whole head. qkv_bias: query, key and value get biases, as in Qwen2.
    remat: none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    window: int | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    soft_cap: float | None = None
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Transformer":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        return Transformer(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class Transformer(LanguageModel):
    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        # The two projections that write to the residual stream start smaller (GPT-2).
        out_std = std / (2 * config.num_layers) ** 0.5
        mlp_width = config.mlp_width
        if mlp_width is None:
            mlp_width = gated_mlp_width(width)
        attention = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            rotary_base=config.rotary_base,
            window=config.window,
            qkv_bias=config.qkv_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            soft_cap=config.soft_cap,
            init_std=std,
            out_init_std=out_std,
        )
        stds = {"init_std": std, "out_init_std": out_std}

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = GatedMLP(width, mlp_width, **stds, dtype=dtype, rngs=rngs)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(("attention",) * config.num_layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
