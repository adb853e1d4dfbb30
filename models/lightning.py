"""TransNormerLLM: linear attention that fades at a fixed rate, without softmax, biases or scales.

The deeper a layer, the slower it forgets: the last sees the whole past alike. With "softmax" in the
pattern every few layers it is MiniMax-01's hybrid. Sources: Qin et al. 2023 (arXiv 2307.14995), the
released code; MiniMax 2025 (arXiv 2501.08313).
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import SGLU, Embedding, Head, SimpleRMSNorm
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.lightning import LightningConfig, slope_scale
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class LightningModelConfig:
    """pattern: "lightning" or "softmax" per layer, repeated until num_layers are named.

    num_kv_heads (None: num_heads) and rotary_base are those of softmax layers. head_dim None: width
    / num_heads. mlp_width None: 2.75 width, rounded up to a multiple of 8. slopes: "transnormer",
    "paper" or "fla", see `LightningConfig`; they depend on the layer's place among all layers.
    lrpe_layers: lightning layers that turn query and key, counted from 0.
    remat: none | dots | names | full | offload.
    """

    num_layers: int = 24
    width: int = 1024
    pattern: tuple[str, ...] = ("lightning",)
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    slopes: str = "transnormer"
    lrpe_layers: tuple[int, ...] = (0,)
    rotary_base: float = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def layers(self) -> tuple[str, ...]:
        """The kind of every layer: "lightning", "lightning with LRPE" or "softmax".

        Raises ValueError for an unknown kind, an empty pattern or LRPE where no lightning layer is.
        """
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("len(model.pattern)", len(self.pattern), 1)
        for kind in self.pattern:
            check_in("model.pattern", kind, ["lightning", "softmax"])
        layers = [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]
        for layer in self.lrpe_layers:
            check_in(
                "model.lrpe_layers", layer, [i for i, k in enumerate(layers) if k != "softmax"]
            )
            layers[layer] = "lightning with LRPE"
        return tuple(layers)

    def inner_mlp_width(self) -> int:
        return -(-11 * self.width // 32) * 8 if self.mlp_width is None else self.mlp_width

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "LightningModel":
        """Raises ValueError where a field does not fit another."""
        return LightningModel(
            self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs
        )


class LightningModel(LanguageModel):
    def __init__(
        self,
        config: LightningModelConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        layers, width, std = config.layers(), config.width, config.initializer_range
        mlp_width = config.inner_mlp_width()

        def mixer(kind: str) -> LightningConfig | AttentionConfig:
            if kind == "softmax":
                return AttentionConfig(
                    num_heads=config.num_heads,
                    num_kv_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    rotary_base=config.rotary_base,
                    init_std=std,
                )
            return LightningConfig(
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                slopes=config.slopes,
                lrpe=kind == "lightning with LRPE",
                eps=config.norm_eps,
                init_std=std,
            )

        def norm() -> SimpleRMSNorm:
            return SimpleRMSNorm(eps=config.norm_eps, dtype=dtype)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            built = mixer(kind).build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = SGLU(width, mlp_width, init_std=std, dtype=dtype, rngs=rngs)
            return Block(built, mlp, norm(), norm())

        # The layer's number is an argument, so that all of one kind compile as one layer.
        scales = [slope_scale(i, len(layers), config.slopes) for i in range(len(layers))]
        arguments = [
            {} if kind == "softmax" else {"slope_scale": scale}
            for kind, scale in zip(layers, scales, strict=True)
        ]
        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.embedding_scale = width**0.5
        self.stack = Stack(layers, block, remat=config.remat, arguments=arguments, rngs=rngs)
        self.final_norm = norm()
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
