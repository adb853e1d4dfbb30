"""Mixture-of-Recursions: shared layers that run over each token as often as a router says.

A private first layer; a block of shared layers, run up to num_recursions times; a private last
layer. Expert choice: before every recursion its router scores the tokens that are still alive, and
the best go through the block, attending to one another alone. Token choice: one router tells every
token its depth at once. With routing "none" this is the plain recursive transformer.

The top of a sequence's scores cannot be known token by token. Hence two modes, told apart by `key`:
called with a key, as the training step does, expert choice takes the top; without (evaluation), as
in `prefill` and `step`, a token goes on if its own logit is positive, which a loss teaches the
logits to mean the same. `mode_gap` measures what is left between the two.

Source: Bae et al. 2025 (arXiv 2507.10524). Where we differ: see `MoRConfig`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import Batch, TokenInfo
from effattn.checks import check_at_least, check_in, check_same_length
from effattn.nn.block import Block
from effattn.nn.compact import CapacityConfig
from effattn.nn.depth import FullDepth, Memory, Routed, Routing
from effattn.nn.depth_choice import ExpertChoice, TokenChoice
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, gated_mlp_width
from effattn.nn.mixer import Output, State
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.recursion import Layout, RecursiveStack, layout
from effattn.nn.router import Router, moved_bias
from effattn.parallel.sequence import Local, SequenceParallel

SCORES = {"expert": ("sigmoid", "tanh", "identity"), "token": ("softmax", "sigmoid")}


@dataclass(kw_only=True)
class MoRConfig:
    """num_layers: that a token goes through at full depth; rounded down to what divides.

    sharing: cycle | sequence | middle_cycle | middle_sequence; with a router the two cycles.
    routing: none | expert | token. router: linear | mlp. score: sigmoid | tanh | identity (expert),
    softmax | sigmoid (token); None: the first. alpha, its factor; None: 0.1, of softmax 1.
    gating: "weighted" scales what a recursion returns by the score, "additive" does not.

    capacities: the share of a row's tokens that each recursion takes; None: (N - r + 1) / N. Where
    it is 1 nothing is decided, and the causal mode takes every token too.
    capacity_warmup_steps: from 1 down to the capacities along half a cosine, in `warmup_rungs`
    compiled sizes. sampling: what the causal mode decides by: the router itself, taught by a loss
    ("aux_loss"), or a second one that learns from the first ("aux_router").
    balance: none | loss | loss_free, for token choice; balance_warmup_steps at full depth.

    kv: "recursion": every recursion has keys and values of its own tokens; "shared": later ones
    read those of the first, and with update_cache their own where a token is still alive.
    capacity: of training with token choice; evaluation_capacity: of the causal mode and of prompts.
    gap_every: steps between two estimates of `mode_gap` in the metrics of training; None: never.
    The other fields are those of TransformerConfig.
    """

    num_layers: int = 32
    width: int = 960
    num_heads: int = 15
    num_kv_heads: int | None = 5
    head_dim: int | None = None
    mlp_width: int | None = None
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    num_recursions: int = 3
    sharing: str = "middle_cycle"
    routing: str = "expert"
    router: str = "linear"
    score: str | None = None
    alpha: float | None = None
    temperature: float = 1.0
    gating: str = "weighted"
    capacities: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 0
    warmup_rungs: int = 4
    sampling: str = "aux_loss"
    sampling_coeff: float = 0.001
    z_coeff: float = 0.0
    balance: str = "loss"
    balance_coeff: float = 0.1
    bias_rate: float = 0.001
    balance_warmup_steps: int = 0

    kv: str = "recursion"
    update_cache: bool = False
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    evaluation_capacity: CapacityConfig = field(default_factory=CapacityConfig)
    gap_every: int | None = None

    def layout(self) -> Layout:
        return layout(self.num_layers, self.num_recursions, self.sharing)

    def shares(self) -> tuple[float, ...]:
        """The share of the tokens that each recursion takes in training; without a router all."""
        n = self.num_recursions
        if self.routing == "none":
            return (1.0,) * n
        if self.capacities is None:
            return tuple((n - r) / n for r in range(n))
        return tuple(self.capacities)

    def score_name(self) -> str:
        return SCORES[self.routing][0] if self.score is None else self.score

    def inner_mlp_width(self) -> int:
        return gated_mlp_width(self.width) if self.mlp_width is None else self.mlp_width

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "MoR":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_in("model.routing", self.routing, ("none", *SCORES))
        check_in("model.kv", self.kv, ("recursion", "shared"))
        if self.routing != "none":
            self._check_routing()
        self.layout()
        return MoR(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)

    def _check_routing(self) -> None:
        check_in("model.sharing", self.sharing, ("cycle", "middle_cycle"))
        check_in("model.score", self.score_name(), SCORES[self.routing])
        check_in("model.gating", self.gating, ("weighted", "additive"))
        check_in("model.sampling", self.sampling, ("aux_loss", "aux_router"))
        check_in("model.balance", self.balance, ("none", "loss", "loss_free"))
        check_at_least("model.warmup_rungs", self.warmup_rungs, 2)
        shares = self.shares()
        check_same_length("model.capacities", shares, self.num_recursions, "recursion")
        falling = all(high >= low for high, low in zip(shares, shares[1:], strict=False))
        if not falling or not 0 < shares[-1] <= shares[0] <= 1:
            raise ValueError(
                f"model.capacities: got {shares}, expected shares in (0, 1], none above the one "
                "before it: a recursion takes some of the tokens that the last one took"
            )
        if self.gap_every is not None:
            check_at_least("model.gap_every", self.gap_every, 1)
        pooled = self.capacity.pooled or self.evaluation_capacity.pooled
        if pooled and self.kv == "shared":
            raise ValueError(
                "model.capacity.pooled: got True with kv='shared', expected False: the keys that a "
                "recursion reads lie row by row"
            )


class MoRState(NamedTuple):
    """first, last: of the private layers, or None."""

    first: State
    shared: Memory
    last: State


class MoR(LanguageModel):
    def __init__(
        self,
        config: MoRConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        # The two projections that write to the residual stream start smaller (GPT-2).
        layout = config.layout()
        stds = {"init_std": std, "out_init_std": std / (2 * layout.num_layers) ** 0.5}
        attention = AttentionConfig(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary_base=config.rotary_base,
            norm_eps=config.norm_eps,
            **stds,
        )

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = attention.build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = GatedMLP(width, config.inner_mlp_width(), **stds, dtype=dtype, rngs=rngs)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.first = block("private", rngs) if layout.private else None
        shared = ("shared",) * layout.base_depth
        stack = RecursiveStack(shared, block, remat=config.remat, rngs=rngs)
        self.recursions = recursions(config, stack, dtype, rngs)
        self.last = block("private", rngs) if layout.private else None
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )
        self.chooses = config.routing != "none"
        self.bias_rate = config.bias_rate
        self.loss_free = config.routing == "token" and config.balance == "loss_free"
        warmups = {
            "none": 0,
            "expert": config.capacity_warmup_steps,
            "token": config.balance_warmup_steps,
        }
        self.warmup = warmups[config.routing]
        self.gap_every = config.gap_every if config.routing == "expert" else None

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. key: given in training alone, where it chooses the mode;
        nothing is drawn from it. Losses and metrics are those of the routers; padding counts in
        none of them. An evaluation that overflows its capacity is nan throughout."""
        training = key is not None
        out, hidden = self._hidden(tokens, info, training=training, extra=extra)
        metrics = dict(out.metrics)
        if training and extra is not None:
            extra = dict(extra)
            if "load" in extra:
                extra["load"] = extra["load"] + out.loads
            if self.gap_every is not None:
                batch = _next_tokens(tokens, info)
                extra["gap"] = metrics["mode_gap"] = jax.lax.cond(
                    extra["step"] % self.gap_every == 0,
                    lambda: jax.lax.stop_gradient(mode_gap(self, batch, extra=extra)),
                    lambda: extra["gap"],
                )
        return Output(hidden, out.losses, metrics, extra)

    def _hidden(
        self, tokens: jax.Array, info: TokenInfo, *, training: bool, extra: Any = None
    ) -> tuple[Routed, jax.Array]:
        """(what the routers did, hidden states after the final norm)."""
        x = self._embed(tokens)
        if self.first is not None:
            x, _ = self.first(x, info)
        out = self.recursions(x, info, training=training, extra=extra)
        x = out.x
        if self.last is not None:
            x, _ = self.last(x, info)
        if "capacity_error" in out.metrics and not training:
            # A training step refuses to commit what overflowed; an evaluation has to fail itself.
            x = jnp.where(out.metrics["capacity_error"] > 0, jnp.nan, x)
        return out, self.final_norm(x)

    def depths(self, tokens: jax.Array, info: TokenInfo) -> jax.Array:
        """int32 [batch, seq_len]: how many recursions each token takes, as in decoding."""
        return self._hidden(tokens, info, training=False)[0].depth

    # ---- what is not trained by gradients

    def init_extra(self) -> Any:
        """step: finished updates. load: tokens that chose each depth since the last one. gap: the
        last estimate of `mode_gap`. None where nothing is to be remembered."""
        extra: dict[str, jax.Array] = {}
        if self.warmup or self.gap_every is not None:
            extra["step"] = jnp.zeros((), jnp.int32)
        if self.loss_free:
            extra["load"] = jnp.zeros((self.recursions.num_recursions,), jnp.float32)
        if self.gap_every is not None:
            extra["gap"] = jnp.zeros((), jnp.float32)
        return extra or None

    def end_step(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(parameters, extra) after an optimiser's step: moves the bias of the loss-free balance by
        the loads of all its microbatches, and counts the step. params: a pure dict."""
        if extra is None:
            return params, extra
        extra = dict(extra)
        if "load" in extra:
            bias = moved_bias(params["recursions"]["bias"], extra["load"], self.bias_rate)
            if self.warmup:
                bias = jnp.where(extra["step"] < self.warmup, jnp.zeros_like(bias), bias)
            params = {**params, "recursions": {**params["recursions"], "bias": bias}}
            extra["load"] = jnp.zeros_like(extra["load"])
        if "step" in extra:
            extra["step"] = extra["step"] + 1
        return params, extra

    # ---- decoding

    def init_state(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> MoRState:
        def private(block: Block | None) -> State:
            return None if block is None else block.init_state(batch, max_len, dtype)

        shared = self.recursions.init_memory(batch, max_len, dtype)
        return MoRState(private(self.first), shared, private(self.last))

    def prefill(
        self, tokens: jax.Array, info: TokenInfo, state: MoRState
    ) -> tuple[jax.Array, MoRState]:
        """(logits [batch, seq_len, vocab_size], state)."""
        x, first, last = self._embed(tokens), None, None
        if self.first is not None:
            x, first = self.first.prefill(x, info, state.first)
        out = self.recursions.decode(x, info, state.shared)
        x = out.x
        if self.last is not None:
            x, last = self.last.prefill(x, info, state.last)
        assert out.memory is not None
        return self.logits(self.final_norm(x)), MoRState(first, out.memory, last)

    def step(
        self, token: jax.Array, info: TokenInfo, state: MoRState
    ) -> tuple[jax.Array, MoRState]:
        """token and info's fields: [batch]. (logits [batch, vocab_size], state). Rows may be at
        different depths; a recursion that none of them takes is not run."""
        x, first, last = self._embed(token), None, None
        if self.first is not None:
            x, first = self.first.step(x, info, state.first)
        one = TokenInfo(*(field[:, None] for field in info))
        out = self.recursions.decode(x[:, None], one, state.shared)
        x = out.x[:, 0]
        if self.last is not None:
            x, last = self.last.step(x, info, state.last)
        assert out.memory is not None
        return self.logits(self.final_norm(x)), MoRState(first, out.memory, last)


def recursions(
    config: MoRConfig, stack: RecursiveStack, dtype: Any, rngs: nnx.Rngs
) -> FullDepth | ExpertChoice | TokenChoice:
    """The shared layers and the routers over them."""
    layout = config.layout()
    if config.routing == "none":
        return FullDepth(stack, layout)
    name = config.score_name()
    routing = Routing(
        score=name,
        alpha=(1.0 if name == "softmax" else 0.1) if config.alpha is None else config.alpha,
        weighted=config.gating == "weighted",
        z_coeff=config.z_coeff,
        shared_keys=config.kv == "shared",
        update_keys=config.kv == "shared" and config.update_cache,
        training=config.capacity.build("model.capacity"),
        evaluation=config.evaluation_capacity.build("model.evaluation_capacity"),
    )
    options: dict[str, Any] = {
        "kind": config.router,
        "init_std": config.initializer_range,
        "rngs": rngs,
    }
    if config.routing == "token":
        head = Router(
            config.width, layout.num_recursions, temperature=config.temperature, **options
        )
        return TokenChoice(
            stack,
            layout,
            routing,
            dtype,
            head,
            balance_coeff=config.balance_coeff if config.balance == "loss" else 0.0,
            loss_free=config.balance == "loss_free",
            warmup=config.balance_warmup_steps,
            rngs=rngs,
        )

    def heads(temperature: float) -> list[Router]:
        return [
            Router(config.width, temperature=temperature, **options)
            for _ in range(layout.num_recursions)
        ]

    return ExpertChoice(
        stack,
        layout,
        routing,
        dtype,
        heads(config.temperature),
        # The second routers read what they are given as it is.
        heads(1.0) if config.sampling == "aux_router" else None,
        shares=config.shares(),
        sampling_coeff=config.sampling_coeff,
        warmup=config.capacity_warmup_steps,
        rungs=config.warmup_rungs,
    )


# ---- the gap between the two modes


def mode_gap(model: MoR, batch: Batch, *, extra: Any = None) -> jax.Array:
    """Loss in the causal mode less the loss in the mode of training, nats per token; a scalar.

    What the model loses by deciding token by token what training decided by looking ahead: 0 for
    token choice. Both losses are of the batch's targets alone. extra: of the train state.
    """

    def loss(training: bool) -> jax.Array:
        _, hidden = model._hidden(batch.tokens, batch.info, training=training, extra=extra)
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        nats = (jax.nn.logsumexp(logits, axis=-1) - picked) * batch.loss_weights
        return jnp.sum(nats) / jnp.maximum(jnp.sum(batch.loss_weights), 1)

    return (loss(False) - loss(True)).astype(jnp.float32)


def _next_tokens(tokens: jax.Array, info: TokenInfo) -> Batch:
    """The batch whose targets are the tokens that follow within their documents."""
    segments = info.segments
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    weights = jnp.pad(follows, ((0, 0), (0, 1))).astype(jnp.float32)
    return Batch(tokens, jnp.roll(tokens, -1, axis=1), weights, info)
