"""Adaptive depth by halting: one layer applied again and again until each sequence has had enough.

A classifier of whole sequences: after every application it says a class and how likely it stops
there. PonderNet weighs the losses of all depths by that probability; PALBERT's Q-exit stops at the
depth where the probabilities first sum to more than a half. It predicts no next token and is no
`Model` of a language: `losses` is what to train and `classify` what to run.
Sources: Banino et al. 2021, PonderNet (arXiv 2107.05407); Balagansky and Gavrilov 2022, PALBERT
(arXiv 2204.03276); the layer is ALBERT's (Lan et al. 2019), with rotary positions.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.masks import Full, Window
from effattn.nn.layers import MLP, Embedding, LayerNorm, statistics_dtype
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.param import Dense, normal
from effattn.parallel.sequence import Local, SequenceParallel

DIVERGENCES = ("p_prior", "prior_p")


@dataclass(kw_only=True)
class HaltingConfig:
    """max_depth: applications of the layer at most. embedding_width: None: width.

    window: tokens seen to either side; None: all. halting_width: of the halting unit's hidden
    layers. prior: of the geometric distribution that depths are drawn to, by a loss of `beta` times
    a divergence: "p_prior", KL(p || prior), as both papers write it, or "prior_p", KL(prior || p),
    which is what PALBERT's code computes. threshold: of Q-exit.
    """

    max_depth: int = 12
    width: int = 768
    embedding_width: int | None = 128
    num_heads: int = 12
    mlp_width: int | None = None  # None: 4 width
    window: int | None = None
    halting_width: int = 64
    prior: float = 0.1
    beta: float = 0.5
    divergence: str = "p_prior"
    threshold: float = 0.5
    rotary_base: float = 10000.0
    norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def build(
        self,
        *,
        vocab_size: int,
        num_classes: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "HaltingClassifier":
        """Raises ValueError where a field does not fit another."""
        check_at_least("model.max_depth", self.max_depth, 1)
        check_at_least("num_classes", num_classes, 2)
        check_multiple("model.width", self.width, "model.num_heads", self.num_heads)
        check_in("model.divergence", self.divergence, DIVERGENCES)
        for name in ("prior", "threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name}: got {getattr(self, name)}, expected a probability in (0, 1)"
                )
        sizes = {"vocab_size": vocab_size, "num_classes": num_classes}
        return HaltingClassifier(self, **sizes, sequence=sequence, dtype=dtype, rngs=rngs)


# ---- the distribution over depths: halts are logits [depth, batch] of stopping when one gets there


def log_survival(halts: jax.Array) -> jax.Array:
    """log prod_{j<=i} (1 - lambda_j), [depth, batch]; -inf at the last depth, where all stop."""
    alive = jnp.cumsum(jax.nn.log_sigmoid(-halts), axis=0)
    return alive.at[-1].set(-jnp.inf)


def log_exit(halts: jax.Array) -> jax.Array:
    """log p_i, p_i = lambda_i prod_{j<i} (1 - lambda_j), [depth, batch]; sums to 1 over depths.

    lambda of the last depth is 1, whatever its logit: what is left stops there.
    """
    before = jnp.concatenate([jnp.zeros_like(halts[:1]), log_survival(halts)[:-1]])
    return before + jax.nn.log_sigmoid(halts).at[-1].set(0)


def q_exit(halts: jax.Array, threshold: float = 0.5) -> jax.Array:
    """The first i with p_0 + ... + p_i > threshold, int32 [batch]. Source: PALBERT."""
    return jnp.argmax(log_survival(halts) < math.log1p(-threshold), axis=0).astype(jnp.int32)


def log_geometric(depth: int, prior: float) -> jax.Array:
    """log of the geometric distribution cut at `depth` and made to sum to 1, [depth]."""
    logs = math.log(prior) + math.log1p(-prior) * jnp.arange(depth)
    return jax.nn.log_softmax(logs)


class PonderLoss(NamedTuple):
    """Scalars, means over the batch: total = expected + beta divergence. depth: the mean of p."""

    total: jax.Array
    expected: jax.Array
    divergence: jax.Array
    depth: jax.Array


def ponder_loss(
    losses: jax.Array, halts: jax.Array, *, prior: float, beta: float, divergence: str
) -> PonderLoss:
    """sum_i p_i L_i + beta KL, mean over the batch. losses, halts: [depth, batch]."""
    log_p, log_prior = log_exit(halts), log_geometric(len(halts), prior)[:, None]
    p = jnp.exp(log_p)
    if divergence == "p_prior":
        apart = jnp.sum(p * (log_p - log_prior), axis=0)
    else:
        apart = jnp.sum(jnp.exp(log_prior) * (log_prior - log_p), axis=0)
    expected, apart = jnp.mean(jnp.sum(p * losses, axis=0)), jnp.mean(apart)
    depth = jnp.mean(jnp.arange(1, len(halts) + 1) @ p)
    return PonderLoss(expected + beta * apart, expected, apart, depth)


# ---- the model


class Depths(NamedTuple):
    """What every depth says. logits: [depth, batch, num_classes]. halts: logits of stopping."""

    logits: jax.Array
    halts: jax.Array


class Classified(NamedTuple):
    """logits: [batch, num_classes], at the depth [batch] (from 1) where each row left. steps: how
    often the layer ran, int32: the largest depth."""

    logits: jax.Array
    depth: jax.Array
    steps: jax.Array


class HaltingClassifier(nnx.Module):
    """Rows are whole sequences; the state of the first token is the sequence's."""

    def __init__(
        self,
        config: HaltingConfig,
        *,
        vocab_size: int,
        num_classes: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        width, std = config.width, config.initializer_range
        self.max_depth, self.threshold = config.max_depth, config.threshold
        self.prior, self.beta, self.divergence = config.prior, config.beta, config.divergence
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        dense: dict[str, Any] = {"init": normal(std), "use_bias": True, **options}
        inner = width if config.embedding_width is None else config.embedding_width
        self.embedding = Embedding(vocab_size, inner, init_std=std, **options)
        self.project = Dense(inner, width, (None, "embed"), **dense)
        attention = AttentionConfig(
            num_heads=config.num_heads, rotary_base=config.rotary_base, init_std=std
        )
        self.attention = attention.build(width, sequence=sequence, **options)
        side = config.window
        self.attention.mask = Full() if side is None else Window(left=side, right=side)
        mlp_width = 4 * width if config.mlp_width is None else config.mlp_width
        self.mlp = MLP(
            width, mlp_width, activation=jax.nn.gelu, use_bias=True, init_std=std, **options
        )

        def norm() -> LayerNorm:
            return LayerNorm(width, eps=config.norm_eps, **options)

        self.embedding_norm, self.attention_norm, self.mlp_norm = norm(), norm(), norm()
        hidden, axes = config.halting_width, (None, None)
        # What stops is decided in float32: a half is a threshold.
        dense["dtype"] = statistics_dtype(dtype)
        self.halting = nnx.List(
            [
                Dense(2 * width, hidden, ("embed", None), **dense),
                Dense(hidden, hidden, axes, **dense),
                Dense(hidden, 1, axes, **dense),
            ]
        )
        self.pool = Dense(width, width, ("embed", "embed"), **dense)
        self.head = Dense(width, num_classes, ("embed", None), **dense)

    def _start(self, tokens: jax.Array) -> jax.Array:
        return self.embedding_norm(self.project(self.embedding(tokens)))

    def _again(
        self, x: jax.Array, info: TokenInfo
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """(x after one application, (logits [batch, classes], halting logit [batch]) there)."""
        before = x[:, 0]
        x = self.attention_norm(x + self.attention(x, info)[0])
        x = self.mlp_norm(x + self.mlp(x))
        h = jnp.concatenate([x[:, 0], before], axis=-1)
        for layer in self.halting[:-1]:
            h = jnp.tanh(layer(h))
        halt = self.halting[-1](h)[..., 0]
        return x, (self.head(jnp.tanh(self.pool(x[:, 0]))), halt)

    def __call__(self, tokens: jax.Array, info: TokenInfo) -> Depths:
        """Every depth of every row. tokens: int [batch, seq_len], one sequence per row."""
        x = self._start(tokens)
        return Depths(*jax.lax.scan(lambda x, _: self._again(x, info), x, length=self.max_depth)[1])

    def losses(self, tokens: jax.Array, info: TokenInfo, labels: jax.Array) -> PonderLoss:
        """labels: int [batch]."""
        out = self(tokens, info)
        log_probs = jax.nn.log_softmax(out.logits)
        each = -jnp.take_along_axis(log_probs, labels[None, :, None], axis=-1)[..., 0]
        return ponder_loss(
            each, out.halts, prior=self.prior, beta=self.beta, divergence=self.divergence
        )

    def classify(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None
    ) -> Classified:
        """Runs the layer until the last row has left, no further.

        A row leaves by Q-exit; with a key, as PonderNet's: at every depth with its probability. Its
        logits are those of that depth, whatever the rows beside it still compute.
        """
        batch, x = len(tokens), self._start(tokens)
        classes = self.head.kernel.shape[-1]
        wide = statistics_dtype(x.dtype)
        limit = math.log1p(-self.threshold)

        def running(carry: tuple) -> jax.Array:
            return jnp.any(carry[2] == 0)

        def again(carry: tuple) -> tuple:
            step, x, depth, logits, alive = carry
            x, (said, halt) = self._again(x, info)
            alive = alive + jax.nn.log_sigmoid(-halt)
            if key is None:
                leaves = alive < limit
            else:
                draw = jax.random.uniform(jax.random.fold_in(key, step), (batch,), halt.dtype)
                leaves = draw < jax.nn.sigmoid(halt)
            step = step + 1
            leaves = (leaves | (step == self.max_depth)) & (depth == 0)
            depth = jnp.where(leaves, step, depth)
            return step, x, depth, jnp.where(leaves[:, None], said, logits), alive

        zeros = jnp.zeros((batch,), jnp.int32)
        start = (
            jnp.int32(0),
            x,
            zeros,
            jnp.zeros((batch, classes), wide),
            jnp.zeros((batch,), wide),
        )
        steps, _, depth, logits, _ = jax.lax.while_loop(running, again, start)
        return Classified(logits, depth, steps)
