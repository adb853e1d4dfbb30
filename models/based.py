"""BASED: gated short convolutions, Taylor linear attention and sliding window attention in turn.

Convolutions mix locally, the linear layers see the whole past through a fixed state, the windows
compare nearby tokens exactly. Source: Arora et al. 2024 (arXiv 2402.18668). With "prefix" in the
place of "linear" it is JRT-RNN, whose linear layers read the first part of a document twice: Arora
et al. 2024 (arXiv 2407.05483).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.based import BasedConfig
from effattn.nn.mixers.jrt import JRTConfig
from effattn.nn.mixers.short_conv import ShortConvConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class BasedModelConfig:
    """pattern: "conv", "linear", "prefix" or "window" per layer, repeated until num_layers are
    named.

    feature_map: of "linear" and "prefix" layers, "taylor" or "elu" (plain linear attention).
    num_heads is that of linear and window layers, num_kv_heads (None: num_heads) of window layers
    only. head_dim None: width / num_heads. mlp_width None: 2 width. window: tokens seen to the
    left; the paper's "window 256" is 128 here. enc_length: first tokens of a document that every
    token sees in a "prefix" layer; a loss for the next token inside them would read its answers
    (see `data.prefix_length`). remat: none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    pattern: tuple[str, ...] = ("conv", "linear", "window")
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    feature_dim: int = 16  # the linear layers' state grows with its square
    feature_map: str = "taylor"
    window: int = 64
    enc_length: int = 1024
    conv_kernel: int = 3
    conv_expand: int = 4
    mlp_width: int | None = None
    rotary_base: float = 10000.0
    linear_eps: float = 1e-12
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def layers(self) -> tuple[str, ...]:
        """The kind of every layer. Raises ValueError for an unknown kind or an empty pattern."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("len(model.pattern)", len(self.pattern), 1)
        for kind in self.pattern:
            check_in("model.pattern", kind, ["conv", "linear", "prefix", "window"])
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "BasedModel":
        """Raises ValueError where a field does not fit another."""
        return BasedModel(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class BasedModel(LanguageModel):
    def __init__(
        self,
        config: BasedModelConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        layers, width, std = config.layers(), config.width, config.initializer_range
        # The two projections that write to the residual stream start smaller (GPT-2).
        stds = {"init_std": std, "out_init_std": std / (2 * len(layers)) ** 0.5}
        mlp_width = 2 * width if config.mlp_width is None else config.mlp_width
        linear: dict[str, Any] = {
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "feature_dim": config.feature_dim,
            "feature_map": config.feature_map,
            "eps": config.linear_eps,
            **stds,
        }
        mixers: dict[str, ShortConvConfig | BasedConfig | AttentionConfig] = {
            "conv": ShortConvConfig(
                kernel_size=config.conv_kernel, expand=config.conv_expand, **stds
            ),
            "linear": BasedConfig(**linear),
            "prefix": JRTConfig(enc_length=config.enc_length, **linear),
            "window": AttentionConfig(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                rotary_base=config.rotary_base,
                window=config.window,
                **stds,
            ),
        }

        self.prefix_length = config.enc_length if "prefix" in layers else 0
        self.causal, self.decodes = self.prefix_length == 0, True

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = mixers[kind].build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = GatedMLP(width, mlp_width, **stds, dtype=dtype, rngs=rngs)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        # No position embedding: order comes from the convolutions and the windows' rotary.
        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
