"""MLPs that spend more on some tokens than on others, and the block that holds one.

`ACM`: an MLP split into learners, of which a gate runs the first g. `DuoMLP`: one of a big MLP, a
small one and nothing. Both choose for every token by itself, so they are causal and have no state.
Sources: Wójcik et al. 2023, Adaptive Computation Modules (arXiv 2312.10193); Alizadeh et al. 2024,
Duo-LLM (arXiv 2410.10846).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.compact import Capacity, with_capacity
from effattn.nn.layers import GatedMLP, statistics_dtype
from effattn.nn.mixer import SequenceMixer
from effattn.nn.param import Dense, normal, parameter, project

GATES = ("linear", "mlp")
ROUTINGS = ("learned", "random")


def choose(logits: jax.Array, *, key: jax.Array | None, temperature: float = 1.0) -> jax.Array:
    """The one-hot of the largest logit, with the gradient of the softmax (straight through).

    logits: [..., choices]. With a key, Gumbel noise is added first: a sample of the softmax. Ties
    go to the first, which is the cheapest. Source: Jang et al. 2016.
    """
    logits = logits.astype(statistics_dtype(logits.dtype))
    if key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    hard = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=logits.dtype)
    soft = jax.nn.softmax(logits / temperature, axis=-1)
    return hard + (soft - jax.lax.stop_gradient(soft))  # the bracket is exactly 0


def budget_loss(cost: jax.Array, budget: float, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of |mean cost / largest cost - budget|, one number for the whole batch.

    cost: share of the largest cost, [..., batch, seq_len]; leading axes (layers) are averaged. The
    sum is the weight times the difference, so that microbatches average theirs: each of them is
    held to the budget by itself.
    """
    weight = jnp.sum(valid, dtype=cost.dtype)
    layers = cost.size // max(valid.size, 1)
    spent = jnp.sum(jnp.where(valid, cost, 0)) / max(layers, 1)
    return jnp.abs(spent - budget * weight), weight


def check_lossless(capacity: Capacity | None) -> None:
    """Raises ValueError for a mode in which tokens could lose their MLP without a word."""
    if capacity is not None:
        check_in("capacity.mode", capacity.mode, ("exact", "bucket"))


# ---- ACM


class ACM(nnx.Module):
    """y_g = bias_0 + sum_{i<=g} (gelu(x up_i + up_bias_i) down_i + bias_i), g of 0..learners.

    A gate chooses g for every token: `gate` "linear", or "mlp" with a hidden layer of gate_width.
    up: [width, learners * learner_width]; down: its transpose's shape; bias: [learners + 1, width].
    The authors' gated path forgets the last learner where g = learners; this one does not.
    capacity: with it, a call without a key runs every learner on the tokens that chose it alone;
    the gate then has no gradient. None: all learners on all tokens, masked.
    """

    def __init__(
        self,
        width: int,
        *,
        learners: int = 4,
        learner_width: int,
        gate: str = "mlp",
        gate_width: int = 64,
        temperature: float = 1.0,
        capacity: Capacity | None = None,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        check_at_least("learners", learners, 1)
        check_at_least("learner_width", learner_width, 1)
        check_in("gate", gate, GATES)
        check_lossless(capacity)
        self.learners, self.temperature, self.dtype = learners, temperature, dtype
        self.capacity = capacity
        inner, zeros = learners * learner_width, jax.nn.initializers.zeros
        out_std = init_std if out_init_std is None else out_init_std
        self.up = parameter((width, inner), ("embed", "mlp"), normal(init_std), rngs)
        self.up_bias = parameter((inner,), ("mlp",), zeros, rngs)
        self.down = parameter((inner, width), ("mlp", "embed"), normal(out_std), rngs)
        self.bias = parameter((learners + 1, width), (None, "embed"), zeros, rngs)
        std, wide = normal(init_std), statistics_dtype(dtype)
        options: dict[str, Any] = {"init": std, "use_bias": True, "dtype": wide, "rngs": rngs}
        hidden = width if gate == "linear" else gate_width
        axes = ("embed", None)
        self.gate_hidden = Dense(width, gate_width, axes, **options) if gate == "mlp" else None
        self.gate = Dense(hidden, learners + 1, axes, **options)

    def gate_logits(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., learners + 1], float32 at least."""
        if self.gate_hidden is not None:
            x = jax.nn.gelu(self.gate_hidden(x), approximate=False)
        return self.gate(x)

    def _hidden(self, x: jax.Array, up: jax.Array, bias: jax.Array) -> jax.Array:
        return jax.nn.gelu(project(x, up, self.dtype, self.dtype) + bias.astype(self.dtype), False)

    def prefix_sums(self, x: jax.Array) -> jax.Array:
        """y_0, ..., y_learners: [..., width] -> [..., learners + 1, width], in float32 at least."""
        hidden = self._hidden(x, self.up[...], self.up_bias[...])
        hidden = hidden.reshape(*x.shape[:-1], self.learners, -1)
        down = self.down[...].reshape(self.learners, -1, x.shape[-1])
        parts = jnp.einsum(
            "...lh,lhd->...ld",
            hidden,
            down.astype(self.dtype),
            preferred_element_type=statistics_dtype(self.dtype),
        )
        parts = jnp.concatenate([jnp.zeros_like(parts[..., :1, :]), parts], axis=-2)
        return jnp.cumsum(parts + self.bias[...], axis=-2)

    def apply(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """sum_g weights_g y_g; for a one-hot, y_g. weights: [..., learners + 1], summing to 1."""
        # A learner counts with everything that is chosen at or beyond it.
        used = jnp.cumsum(weights[..., ::-1], axis=-1)[..., ::-1].astype(self.dtype)
        hidden = self._hidden(x, self.up[...], self.up_bias[...])
        hidden = hidden.reshape(*x.shape[:-1], self.learners, -1) * used[..., 1:, None]
        y = project(hidden.reshape(*x.shape[:-1], -1), self.down[...], self.dtype, self.dtype)
        return y + project(used, self.bias[...], self.dtype, self.dtype)

    def apply_sparsely(
        self, x: jax.Array, choice: jax.Array, info: TokenInfo, capacity: Capacity
    ) -> jax.Array:
        """y_choice, every learner run on the tokens that chose it alone. choice: [batch, seq]."""
        groups = (self.learners, -1)
        ups = jnp.moveaxis(self.up[...].reshape(x.shape[-1], *groups), 1, 0)
        downs = self.down[...].reshape(*groups, x.shape[-1])
        biases = self.up_bias[...].reshape(groups)

        def learner(y: jax.Array, given: tuple) -> tuple[jax.Array, None]:
            number, up, up_bias, down, bias = given

            def inner(x: jax.Array, info: TokenInfo) -> tuple[jax.Array, None]:
                hidden = self._hidden(x, up, up_bias)
                part = project(hidden, down, self.dtype, self.dtype)
                return part + bias.astype(self.dtype), None

            part, _, _ = with_capacity(inner, x, info, choice >= number, capacity)
            return y + part, None

        bias = self.bias[...]
        y = jnp.broadcast_to(bias[0].astype(self.dtype), x.shape)
        numbers = jnp.arange(1, self.learners + 1)
        return jax.lax.scan(learner, y, (numbers, ups, biases, downs, bias[1:]))[0]

    def __call__(
        self, x: jax.Array, info: TokenInfo | None = None, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """(y, share of the learners that each token ran [...]). x: [..., width].

        key: for Gumbel noise, in training; None: the gate's largest. info: for the sparse form.
        """
        weights = choose(self.gate_logits(x), key=key, temperature=self.temperature)
        share = jnp.arange(self.learners + 1, dtype=weights.dtype) / self.learners
        if key is None and info is not None and self.capacity is not None:
            choice = jnp.argmax(weights, axis=-1)
            y = self.apply_sparsely(x.astype(self.dtype), choice, info, self.capacity)
        else:
            y = self.apply(x, weights)
        return y, weights @ share


def distillation_errors(acm: ACM, x: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared error of every prefix to the teacher's output: [..., learners + 1].

    x, teacher: [..., width]. Its mean is the loss of the first phase: every prefix learns the
    whole module that it will stand in for.
    """
    return jnp.mean(jnp.square(acm.prefix_sums(x) - teacher[..., None, :]), axis=-1)


def gate_labels(errors: jax.Array, factor: float) -> jax.Array:
    """What the gate is first trained to choose: 1 + the first g with errors_g < factor errors_{g+1}

    that is, where one learner more helps by less than `factor` (> 1); all learners where there is
    none. errors: [..., learners + 1]. int32 [...]. The authors take g = 0 for "none".
    Raises ValueError for factor <= 1: every gain would be too small.
    """
    if not factor > 1:
        raise ValueError(f"factor: got {factor}, expected more than 1")
    small = errors[..., :-1] < factor * errors[..., 1:]
    learners = errors.shape[-1] - 1
    return jnp.where(jnp.any(small, axis=-1), jnp.argmax(small, axis=-1) + 1, learners)


# ---- Duo-LLM


class DuoMLP(nnx.Module):
    """Nothing, a small gated MLP or a big one (choices 0, 1, 2), for every token.

    routing "random": a call with a key draws the three evenly, which trains both MLPs to stand in
    for each other; one without takes the big MLP. "learned": the router chooses; with a key, by
    Gumbel noise. Every call runs both MLPs on all tokens; with `capacity`, one without a key
    runs each on its tokens alone, and the router has no gradient.
    """

    def __init__(
        self,
        width: int,
        *,
        mlp_width: int,
        small_width: int,
        routing: str = "learned",
        temperature: float = 1.0,
        capacity: Capacity | None = None,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        check_in("routing", routing, ROUTINGS)
        check_lossless(capacity)
        check_at_least("small_width", small_width, 1)
        check_at_least("mlp_width", mlp_width, small_width)
        self.routing, self.temperature, self.capacity = routing, temperature, capacity
        self.costs = (0.0, small_width / mlp_width, 1.0)
        stds: dict[str, Any] = {"init_std": init_std, "out_init_std": out_init_std}
        self.small = GatedMLP(width, small_width, **stds, dtype=dtype, rngs=rngs)
        self.big = GatedMLP(width, mlp_width, **stds, dtype=dtype, rngs=rngs)
        wide, axes = statistics_dtype(dtype), ("embed", None)
        self.router = (
            Dense(width, 3, axes, init=normal(init_std), dtype=wide, rngs=rngs)
            if routing == "learned"
            else None
        )

    def _sparsely(
        self, x: jax.Array, taken: jax.Array, info: TokenInfo, capacity: Capacity
    ) -> jax.Array:
        def run(mlp: GatedMLP, tokens: jax.Array) -> jax.Array:
            return with_capacity(lambda x, info: (mlp(x), None), x, info, tokens, capacity)[0]

        return run(self.small, taken == 1) + run(self.big, taken == 2)

    def weights(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The one-hot of every token's choice, [..., 3]."""
        if self.router is not None:
            return choose(self.router(x), key=key, temperature=self.temperature)
        if key is None:
            choice = jnp.full(x.shape[:-1], 2)
        else:
            choice = jax.random.randint(key, x.shape[:-1], 0, 3)
        return jax.nn.one_hot(choice, 3, dtype=statistics_dtype(x.dtype))

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo | None = None,
        *,
        key: jax.Array | None = None,
        choice: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """(y, cost of each token as a share of the big MLP's [...]). x: [..., width].

        choice: int [...], in place of the router's: what a search for the best pattern tries.
        """
        if choice is None:
            weights = self.weights(x, key)
        else:
            weights = jax.nn.one_hot(choice, 3, dtype=statistics_dtype(x.dtype))
        cost = weights @ jnp.asarray(self.costs, weights.dtype)
        if key is None and info is not None and self.capacity is not None:
            return self._sparsely(x, jnp.argmax(weights, axis=-1), info, self.capacity), cost
        small, big = self.small(x), self.big(x)
        share = weights.astype(small.dtype)
        return small * share[..., 1:2] + big * share[..., 2:3], cost


# ---- in a stack


class AdaptiveAux(NamedTuple):
    """mixer: the mixer's own aux. cost: [batch, seq_len], share of the largest MLP's."""

    mixer: Any
    cost: jax.Array


class AdaptiveMLP(Protocol):
    """An `ACM` or a `DuoMLP`: (x, info, key) -> (y, cost of each token)."""

    def __call__(
        self, x: jax.Array, info: TokenInfo | None = None, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]: ...


class AdaptiveBlock(Block):
    """A `Block` whose MLP takes a key and says what it spent; its aux is an `AdaptiveAux`."""

    def __init__(
        self,
        mixer: SequenceMixer,
        mlp: AdaptiveMLP,
        mixer_norm: Callable[[jax.Array], jax.Array],
        mlp_norm: Callable[[jax.Array], jax.Array],
    ):
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.adaptive_norm, self.adaptive = mlp_norm, mlp

    def __call__(
        self, x: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, **arguments: jax.Array
    ) -> tuple[jax.Array, AdaptiveAux]:
        mixer_key, mlp_key = (None, None) if key is None else jax.random.split(key)
        y, aux = self.mixer(self.mixer_norm(x), info, key=mixer_key, **arguments)
        x = x + y.astype(x.dtype)
        y, cost = self.adaptive(self.adaptive_norm(x), info, key=mlp_key)
        return x + y.astype(x.dtype), AdaptiveAux(aux, cost)

    def _add_mlp(self, x: jax.Array) -> jax.Array:
        return x + self.adaptive(self.adaptive_norm(x))[0].astype(x.dtype)
