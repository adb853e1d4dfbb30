"""Mamba-2: a stack of SSD blocks and nothing else, no MLP and no positions.

Source: Dao and Gu 2024 (arXiv 2405.21060), the released models of state-spaces/mamba.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effattn.checks import check_at_least
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, Head, RMSNorm
from effattn.nn.mixers.ssd import SSDConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class Mamba2Config:
    """expand, head_dim, state_dim, num_groups, conv_kernel, a_min, a_max, decay_scale, write_scale:
    see `SSDConfig`.

    remat: none | dots | names | full | offload.
    """

    num_layers: int = 24
    width: int = 768
    expand: int = 2
    head_dim: int = 64
    state_dim: int = 128
    num_groups: int = 1
    conv_kernel: int = 4
    a_min: float = 1.0
    a_max: float = 16.0
    decay_scale: float = 1.0
    write_scale: float = 1.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02  # of the embedding
    tied: bool = True
    remat: str = "none"

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Mamba2":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        return Mamba2(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


class Mamba2(LanguageModel):
    def __init__(
        self,
        config: Mamba2Config,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        ssd = SSDConfig(
            expand=config.expand,
            head_dim=config.head_dim,
            state_dim=config.state_dim,
            num_groups=config.num_groups,
            kernel_size=config.conv_kernel,
            eps=config.norm_eps,
            a_min=config.a_min,
            a_max=config.a_max,
            decay_scale=config.decay_scale,
            write_scale=config.write_scale,
            # One projection per layer writes to the residual stream, so one factor of the depth.
            out_init_scale=config.num_layers**-0.5,
        )

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = ssd.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            return Block(mixer, None, norm(rngs), None)

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(("ssd",) * config.num_layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
