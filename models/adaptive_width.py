"""A Llama-style decoder whose MLPs spend more on some tokens than on others.

mlp "acm": a gate runs the first so many of an MLP's learners (Wójcik et al. 2023, arXiv
2312.10193). "duo": a router takes a big MLP, a small one or none (Alizadeh et al. 2024, Duo-LLM,
arXiv 2410.10846). `effattn.nn.adaptive_mlp` has both.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.nn.adaptive_mlp import ACM, AdaptiveBlock, DuoMLP, budget_loss
from effattn.nn.compact import Capacity, CapacityConfig
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, Head, RMSNorm, gated_mlp_width
from effattn.nn.mixer import Output
from effattn.nn.mixers.attention import AttentionConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class AdaptiveWidthConfig:
    """mlp: acm | duo. mlp_width: of the whole MLP, or of the big one; None: 4 width, 8/3 width up
    to a multiple of 64.

    acm: learners, gate (linear | mlp) with gate_width. duo: small_width (None: mlp_width / 8),
    routing (learned | random). budget: share of the MLPs' cost that `budget_weight` times the loss
    |share - budget| asks for. temperature: of the gate's gradient in training. sparse: with it, a
    pass without a key (evaluation) runs what was chosen and no more; how, says `capacity`. remat:
    none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    mlp: str = "acm"
    mlp_width: int | None = None
    learners: int = 4
    gate: str = "mlp"
    gate_width: int = 64
    small_width: int | None = None
    routing: str = "learned"
    budget: float = 0.5
    budget_weight: float = 0.1
    temperature: float = 1.0
    sparse: bool = False
    capacity: CapacityConfig = field(default_factory=lambda: CapacityConfig(mode="bucket"))
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def widths(self) -> tuple[int, int]:
        """Of the whole (big) MLP and of the small one."""
        big = self.mlp_width
        if big is None:
            big = 4 * self.width if self.mlp == "acm" else gated_mlp_width(self.width)
        return big, max(1, big // 8) if self.small_width is None else self.small_width

    def flops_by_part(
        self, *, vocab_size: int, seq_len: int
    ) -> tuple[tuple[str, int, str, float], ...]:
        """What tokens cost that spend the budget; gates and routers included. See flops.py."""
        width, layers = self.width, self.num_layers
        kv = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        projections = 2 * width * width * (2 + 2 * kv / self.num_heads)
        big, _ = self.widths()
        if self.mlp == "duo":
            router = 2 * width * 3 * (self.routing == "learned")
        elif self.gate == "mlp":
            router = 2 * self.gate_width * (width + self.learners + 1)
        else:
            router = 2 * width * (self.learners + 1)
        mlp = self.budget * (2 if self.mlp == "acm" else 3) * 2 * width * big
        return (
            ("layer", layers, "projections", layers * projections),
            ("layer", layers, "pairs", layers * 4 * width * (seq_len + 1) / 2),
            ("layer", layers, "mlp", layers * mlp),
            ("layer", layers, "router", layers * router),
            ("head", 1, "logits", 2 * width * vocab_size),
        )

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "AdaptiveWidth":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_in("model.mlp", self.mlp, ["acm", "duo"])
        if self.mlp == "acm":
            check_at_least("model.learners", self.learners, 1)
            check_multiple("model.mlp_width", self.widths()[0], "model.learners", self.learners)
        if not 0 <= self.budget <= 1:
            raise ValueError(f"model.budget: got {self.budget}, expected a share from 0 to 1")
        capacity = self.capacity.build("model.capacity") if self.sparse else None
        options = {"capacity": capacity, "dtype": dtype, "rngs": rngs}
        return AdaptiveWidth(self, vocab_size=vocab_size, sequence=sequence, **options)


class AdaptiveWidth(LanguageModel):
    # Rounding can tip a gate over.
    chooses = True

    def __init__(
        self,
        config: AdaptiveWidthConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        capacity: Capacity | None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        stds: dict[str, Any] = {
            "init_std": std,
            "out_init_std": std / (2 * config.num_layers) ** 0.5,
        }
        self.budget, self.budget_weight = config.budget, config.budget_weight
        attention = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            rotary_base=config.rotary_base,
            **stds,
        )
        mlp_width, small_width = config.widths()
        shared: dict[str, Any] = {"temperature": config.temperature, "capacity": capacity, **stds}

        def mlp(rngs: nnx.Rngs) -> ACM | DuoMLP:
            if config.mlp == "acm":
                return ACM(
                    width,
                    learners=config.learners,
                    learner_width=mlp_width // config.learners,
                    gate=config.gate,
                    gate_width=config.gate_width,
                    **shared,
                    dtype=dtype,
                    rngs=rngs,
                )
            return DuoMLP(
                width,
                mlp_width=mlp_width,
                small_width=small_width,
                routing=config.routing,
                **shared,
                dtype=dtype,
                rngs=rngs,
            )

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> AdaptiveBlock:
            mixer = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            return AdaptiveBlock(mixer, mlp(rngs), norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(("layer",) * config.num_layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. Metric `mlp_share`: what the MLPs cost, of their whole."""
        x, aux = self.stack(self._embed(tokens), info, key=key)
        cost = jnp.concatenate([block.cost for block in aux])  # [layers, batch, seq_len]
        total, weight = budget_loss(cost, self.budget, info.valid)
        spent = jnp.sum(jnp.where(info.valid, cost, 0)) / (len(cost) * jnp.maximum(weight, 1))
        return Output(
            self.final_norm(x),
            losses={"budget_loss": (self.budget_weight * total, weight)},
            metrics={"mlp_share": spent},
            extra=extra,
        )
