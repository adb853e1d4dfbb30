"""RAT: recurrence inside chunks and attention from chunk to chunk, alone or with local attention.

With "local" in the pattern every other layer sees a window exactly while the RAT layers carry the
rest. Source: Wei et al. 2025 (arXiv 2507.04416) and the released code.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import MLP, Embedding, Head, RMSNorm
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.rat import RATConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class RATModelConfig:
    """pattern: "rat" or "local" per layer, repeated until num_layers are named.

    head_dim None: width / num_heads. num_groups, chunk_size: of RAT layers, see `RATConfig`.
    num_kv_heads (None: num_heads) and window, the tokens seen to the left, are those of local
    layers. mlp_width None: 4 width. remat: none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    pattern: tuple[str, ...] = ("rat",)
    num_heads: int = 12
    head_dim: int | None = None
    num_groups: int = 2
    chunk_size: int = 16
    num_kv_heads: int | None = None
    window: int = 1024
    mlp_width: int | None = None
    rotary_base: float = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def layers(self) -> tuple[str, ...]:
        """The kind of every layer. Raises ValueError for an unknown kind or an empty pattern."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("len(model.pattern)", len(self.pattern), 1)
        for kind in self.pattern:
            check_in("model.pattern", kind, ["rat", "local"])
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
    ) -> "RATModel":
        """Raises ValueError where a field does not fit another."""
        return RATModel(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class RATModel(LanguageModel):
    def __init__(
        self,
        config: RATModelConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        layers, width, std = config.layers(), config.width, config.initializer_range
        mixers: dict[str, RATConfig | AttentionConfig] = {
            "rat": RATConfig(
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                num_groups=config.num_groups,
                chunk_size=config.chunk_size,
                rotary_base=config.rotary_base,
                init_std=std,
            ),
            "local": AttentionConfig(
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                rotary_base=config.rotary_base,
                window=config.window,
                init_std=std,
            ),
        }

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = mixers[kind].build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = MLP(
                width,
                config.inner_mlp_width(),
                activation=functools.partial(jax.nn.gelu, approximate=False),
                init_std=std,
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
