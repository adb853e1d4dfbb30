"""The transformer with a mixture of experts in place of its MLPs.

Mixtral (Jiang et al. 2024, arXiv 2401.04088), OLMoE (Muennighoff et al. 2024, arXiv 2409.02060) and
DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066) differ in the values of `ExpertsConfig` alone, and
in how many first layers are dense.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, gated_mlp_width
from effattn.nn.mixer import Output
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.moe import ExpertsConfig, MoE, MoEBlock, Report
from effattn.nn.router import moved_bias
from effattn.parallel.sequence import Local, SequenceParallel

EXPERTS = "experts"


@dataclass(kw_only=True)
class MoEConfig:
    """dense_layers: how many first layers have one MLP of mlp_width channels instead of experts.
    The other fields are those of TransformerConfig."""

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    rotary_base: float = 10000.0
    qk_norm: bool = False
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"
    dense_layers: int = 0
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def layers(self) -> tuple[str, ...]:
        rest = self.num_layers - self.dense_layers
        return ("dense",) * self.dense_layers + (EXPERTS,) * rest

    def inner_mlp_width(self) -> int:
        return gated_mlp_width(self.width) if self.mlp_width is None else self.mlp_width

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "MoETransformer":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        if not 0 <= self.dense_layers < self.num_layers:
            raise ValueError(
                f"model.dense_layers: got {self.dense_layers}, expected 0 to "
                f"{self.num_layers - 1}, less than model.num_layers"
            )
        return MoETransformer(
            self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs
        )


class MoETransformer(LanguageModel):
    def __init__(
        self,
        config: MoEConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        # The two projections that write to the residual stream start smaller (GPT-2).
        stds = {"init_std": std, "out_init_std": std / (2 * config.num_layers) ** 0.5}
        attention = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_base=config.rotary_base,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            **stds,
        )

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            options: dict[str, Any] = {**stds, "dtype": dtype, "rngs": rngs}
            if kind == EXPERTS:
                moe = MoE(width, config.experts, **options)
                return MoEBlock(mixer, moe, norm(rngs), norm(rngs))
            mlp = GatedMLP(width, config.inner_mlp_width(), **options)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(config.layers(), block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
        experts = config.experts
        self.balance_coeff = experts.balance_coeff if experts.balance == "loss" else 0.0
        self.z_coeff = experts.z_coeff
        # Of the loss-free balance, None without.
        self.bias_rate = experts.bias_rate if experts.balance == "loss_free" else None
        self.count, self.chooses = experts.count, True

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. key: given in training alone, where capacity routing drops
        what finds no slot; nothing is drawn from it.

        Losses: sums over the layers. Metrics: experts_load_max, the load of the busiest expert of
        any layer over the mean; experts_overflow, choices that were dropped, in all layers; and
        experts_dropped, their share of all choices.
        """
        x, aux = self.stack(self._embed(tokens), info, key=key)
        reports = [report for report in aux if isinstance(report, Report)]
        # Of every layer with experts; load: [layers, experts].
        balance, z, load, dropped = jax.tree.map(lambda *parts: jnp.concatenate(parts), *reports)
        count = jnp.sum(info.valid, dtype=jnp.float32)
        losses: dict[str, tuple[jax.Array, jax.Array]] = {}
        if self.balance_coeff:
            losses["experts_balance"] = (self.balance_coeff * jnp.sum(balance), count)
        if self.z_coeff:
            losses["experts_z"] = (self.z_coeff * jnp.sum(z), count)
        dropped = jnp.sum(dropped)
        metrics = {
            "experts_load_max": jnp.max(load) / jnp.maximum(jnp.mean(load), 1e-9),
            "experts_overflow": dropped,
            "experts_dropped": dropped / jnp.maximum(jnp.sum(load), 1),
        }
        if key is not None and extra is not None:
            extra = extra + load
        return Output(self.final_norm(x), losses, metrics, extra)

    # ---- what is not trained by gradients

    def init_extra(self) -> jax.Array | None:
        """float32 [layers with experts, experts]: choices since the last step, for the loss-free
        balance; otherwise None."""
        if self.bias_rate is None:
            return None
        layers = sum(group.repeats * group.pattern.count(EXPERTS) for group in self.stack.plan)
        return jnp.zeros((layers, self.count), jnp.float32)

    def end_step(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(parameters, extra) after an optimiser's step: moves every layer's bias by the loads of
        all its microbatches. params: a pure dict."""
        if extra is None or self.bias_rate is None:
            return params, extra
        rate, blocks, first = self.bias_rate, dict(params["stack"]["blocks"]), 0
        for index, block in blocks.items():
            if "moe" not in block:
                continue
            bias = block["moe"]["bias"]
            loads = extra[first : first + len(bias)]
            moved = jax.vmap(lambda b, load: moved_bias(b, load, rate))
            moe = {**block["moe"], "bias": moved(bias, loads)}
            blocks[index] = {**block, "moe": moe}
            first += len(bias)
        stack = {**params["stack"], "blocks": blocks}
        return {**params, "stack": stack}, jnp.zeros_like(extra)
