"""Aaren: a Transformer's layers with one learned query per layer, in constant memory per token.

Order enters only through the prefixes, and nothing can be looked up; "conv" in the pattern puts
gated short convolutions between the layers, which tell neighbours apart. Source: Feng et al. 2024,
Attention as an RNN (arXiv 2405.13956). There is no official code; we normalise before each branch
and not after it, because that trains without a warm-up.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import MLP, Embedding, Head, LayerNorm
from effattn.nn.mixers.aaren import AarenConfig
from effattn.nn.mixers.short_conv import ShortConvConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class AarenModelConfig:
    """pattern: "aaren" or "conv" per layer, repeated until num_layers are named.

    head_dim None: width / num_heads. mlp_width None: 4 width. token_std: of the learned query
    tokens. remat: none | dots | names | full | offload.
    """

    num_layers: int = 6
    width: int = 512
    pattern: tuple[str, ...] = ("aaren",)
    num_heads: int = 8
    head_dim: int | None = None
    mlp_width: int | None = None
    token_std: float = 1.0
    conv_kernel: int = 3
    conv_expand: int = 4
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def layers(self) -> tuple[str, ...]:
        """The kind of every layer. Raises ValueError for an unknown kind or an empty pattern."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("len(model.pattern)", len(self.pattern), 1)
        for kind in self.pattern:
            check_in("model.pattern", kind, ["aaren", "conv"])
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def inner_mlp_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "AarenModel":
        """Raises ValueError where a field does not fit another."""
        return AarenModel(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class AarenModel(LanguageModel):
    def __init__(
        self,
        config: AarenModelConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        layers, width, std = config.layers(), config.width, config.initializer_range
        # The two projections that write to the residual stream start smaller (GPT-2).
        stds = {"init_std": std, "out_init_std": std / (2 * len(layers)) ** 0.5}
        mixers: dict[str, AarenConfig | ShortConvConfig] = {
            "aaren": AarenConfig(
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                token_std=config.token_std,
                **stds,
            ),
            "conv": ShortConvConfig(
                kernel_size=config.conv_kernel, expand=config.conv_expand, **stds
            ),
        }

        def norm(rngs: nnx.Rngs) -> LayerNorm:
            return LayerNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = mixers[kind].build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = MLP(
                width,
                config.inner_mlp_width(),
                activation=jax.nn.relu,
                use_bias=True,
                **stds,
                dtype=dtype,
                rngs=rngs,
            )
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
