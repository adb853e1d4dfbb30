"""Mixture of experts: every token goes through some of many gated MLPs, which a router chooses.

Sources: Shazeer et al. 2017 (arXiv 1701.06538); Fedus et al. 2021, Switch Transformers (arXiv
2101.03961), balance; Zoph et al. 2022, ST-MoE (arXiv 2202.08906), z loss; Dai et al. 2024,
DeepSeekMoE (arXiv 2401.06066), shared experts; Wang et al. 2024 (arXiv 2408.15664), balance without
a loss; DeepSeek-AI 2024 (arXiv 2412.19437), sigmoid scores. How tokens reach experts on other
devices: `effattn.parallel.experts`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.layers import GatedMLP
from effattn.nn.memory import Memory
from effattn.nn.mixer import SequenceMixer, State
from effattn.nn.param import normal, parameter, project
from effattn.nn.router import Router, balance_loss, score, z_loss
from effattn.parallel.experts import Slots, grouped_product, over_experts
from effattn.parallel.mesh import FOLDS, experts_axis

SCORES = ("softmax", "sigmoid")
ROUTINGS = ("dropless", "capacity")
BALANCES = ("none", "loss", "loss_free")


@dataclass(kw_only=True)
class ExpertsConfig:
    """count: experts, of which a token takes `top_k`; mlp_width: channels of each. shared: so many
    that every token takes besides.

    score: softmax | sigmoid of the router's logits. normalize: the weights of the chosen experts
    are divided by their sum; then all are multiplied by `scale`.
    routing: in training, "dropless", or "capacity": an expert has ceil(capacity_factor x its equal
    share) slots for group_size tokens of a row, None: a whole one, which lie together on a device.
    What finds no slot is dropped, and counted. Evaluation and decoding drop nothing.
    balance: none | loss (weighs balance_coeff) | loss_free (a bias on the selection, moved by
    bias_rate a step). z_coeff: weight of the router's z loss.
    fold: over which axes of the mesh the experts lie: see `effattn.parallel.mesh.FOLDS`.
    """

    count: int = 8
    top_k: int = 2
    mlp_width: int = 1024
    shared: int = 0
    score: str = "softmax"
    normalize: bool = True
    scale: float = 1.0
    routing: str = "dropless"
    capacity_factor: float = 1.25
    group_size: int | None = None
    balance: str = "loss"
    balance_coeff: float = 0.01
    bias_rate: float = 0.001
    z_coeff: float = 0.001
    fold: str = "sequence_tensor"

    def check(self) -> None:
        """Raises ValueError, naming the field of `model.experts`."""
        for name in ("count", "top_k", "mlp_width"):
            check_at_least(f"model.experts.{name}", getattr(self, name), 1)
        if self.top_k > self.count:
            raise ValueError(
                f"model.experts.top_k: got {self.top_k}, expected at most "
                f"model.experts.count={self.count}"
            )
        check_at_least("model.experts.shared", self.shared, 0)
        check_in("model.experts.score", self.score, SCORES)
        check_in("model.experts.routing", self.routing, ROUTINGS)
        check_in("model.experts.balance", self.balance, BALANCES)
        check_in("model.experts.fold", self.fold, FOLDS)
        if not self.capacity_factor > 0:
            raise ValueError(
                f"model.experts.capacity_factor: got {self.capacity_factor}, expected more than 0"
            )
        if self.group_size is not None:
            check_at_least("model.experts.group_size", self.group_size, 1)


class Report(NamedTuple):
    """What a layer's router did, summed over the valid tokens.

    balance, z: the losses, float. load: float32 [count], choices of each expert. dropped: float32,
    choices that found no slot.
    """

    balance: jax.Array
    z: jax.Array
    load: jax.Array
    dropped: jax.Array


class Experts(nnx.Module):
    """`count` gated MLPs (SwiGLU), or with tensor-parallel channels a part of each."""

    def __init__(
        self,
        width: int,
        config: ExpertsConfig,
        *,
        init_std: float,
        out_init_std: float,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.count, self.dtype = config.count, dtype
        experts, inner = experts_axis(config.fold), config.mlp_width
        wide, names = (config.count, width, inner), (experts, "embed", "mlp")
        self.up = parameter(wide, names, normal(init_std), rngs)
        self.gate = parameter(wide, names, normal(init_std), rngs)
        narrow = (config.count, inner, width)
        self.down = parameter(narrow, (experts, "mlp", "embed"), normal(out_init_std), rngs)

    def rows(self, x: jax.Array, sizes: jax.Array | None) -> jax.Array:
        """x: [rows, width] sorted by expert, `sizes` int32 [count] of them each; or, with None,
        [count, rows, width]."""
        up, gate = (self._product(x, kernel[...], sizes) for kernel in (self.up, self.gate))
        return self._product(up * jax.nn.silu(gate), self.down[...], sizes)

    def _product(self, x: jax.Array, kernel: jax.Array, sizes: jax.Array | None) -> jax.Array:
        dtype = self.dtype
        if sizes is None:
            return jax.vmap(lambda x, kernel: project(x, kernel, dtype, dtype))(x, kernel)
        return grouped_product(x, kernel, sizes, dtype)


class MoE(nnx.Module):
    """The experts, their router, and what every token takes besides."""

    def __init__(
        self,
        width: int,
        config: ExpertsConfig,
        *,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        config.check()
        self.count, self.top_k, self.score = config.count, config.top_k, config.score
        self.normalize, self.scale = config.normalize, config.scale
        self.limited = config.routing == "capacity"
        self.capacity_factor, self.group_size = config.capacity_factor, config.group_size
        stds = {
            "init_std": init_std,
            "out_init_std": init_std if out_init_std is None else out_init_std,
        }
        self.router = Router(width, config.count, init_std=init_std, rngs=rngs)
        zeros = jax.nn.initializers.zeros
        free = config.balance == "loss_free"
        self.bias = parameter((config.count,), (None,), zeros, rngs) if free else None
        self.experts = Experts(width, config, **stds, dtype=dtype, rngs=rngs)
        inner = config.shared * config.mlp_width
        self.shared = GatedMLP(width, inner, **stds, dtype=dtype, rngs=rngs) if inner else None

    def __call__(
        self, x: jax.Array, valid: jax.Array, *, training: bool
    ) -> tuple[jax.Array, Report]:
        """x: [batch, seq_len, width]; valid: bool [batch, seq_len], the others take no expert."""
        logits = self.router(x)
        scores = score(logits, self.score, 1.0)
        ranked = scores if self.bias is None else scores + self.bias[...]
        _, choice = jax.lax.top_k(jax.lax.stop_gradient(ranked), self.top_k)
        weight = jnp.take_along_axis(scores, choice, axis=-1)
        if self.normalize:
            # Sigmoids may all be 0.
            total = jnp.sum(weight, axis=-1, keepdims=True)
            weight = weight / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        weight = jnp.where(valid[..., None], weight * self.scale, 0)
        choice = jnp.where(valid[..., None], choice, self.count)
        slots = self._slots(x.shape[1]) if training and self.limited else None
        y, taken = over_experts(self.experts, x, choice, weight, slots)
        if self.shared is not None:
            y = y + self.shared(x)
        load = jnp.sum(choice[..., None] == jnp.arange(self.count), (0, 1, 2), jnp.float32)
        # Of sigmoids, their shares (DeepSeek-AI 2024, equations 17 to 20).
        total = jnp.sum(scores, axis=-1, keepdims=True)
        shares = scores / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
        dropped = jnp.sum(load) - jnp.sum(taken, dtype=jnp.float32)
        return y, Report(balance_loss(shares, load, valid), z_loss(logits, valid), load, dropped)

    def _slots(self, seq_len: int) -> Slots:
        group = seq_len if self.group_size is None else self.group_size
        # Rounded first: a product may lie above a whole number by a rounding.
        each = math.ceil(round(self.capacity_factor * self.top_k * group / self.count, 6))
        return Slots(min(group, each), group)


class MoEBlock(Block):
    """A pre-norm block whose MLP is a mixture of experts; its aux is the `Report`."""

    def __init__(
        self,
        mixer: SequenceMixer,
        moe: MoE,
        mixer_norm: Callable[[jax.Array], jax.Array],
        moe_norm: Callable[[jax.Array], jax.Array],
    ):
        super().__init__(mixer, None, mixer_norm, None)
        self.moe, self.moe_norm = moe, moe_norm

    def take(self, memory: Memory) -> None:
        """Raises ValueError for what splits the MLP by tokens: the experts are split already."""
        for name in ("mlp_tile", "hidden_on_host"):
            if getattr(memory, name):
                raise ValueError(
                    f"memory.{name}: got {getattr(memory, name)} with a mixture of experts, "
                    f"expected {'None' if name == 'mlp_tile' else 0}"
                )
        self.memory = memory

    def _add_experts(
        self, x: jax.Array, valid: jax.Array, training: bool = False
    ) -> tuple[jax.Array, Report]:
        y, report = self.moe(self.moe_norm(x), valid, training=training)
        return x + y.astype(x.dtype), report

    def __call__(
        self, x: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, **arguments: Any
    ) -> tuple[jax.Array, Report]:
        """(x, what the router did). key: given in training alone."""
        y, _ = self.mixer(self.mixer_norm(x), info, key=key, **arguments)
        return self._add_experts(x + y.astype(x.dtype), info.valid, key is not None)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: State, **arguments: Any
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer.prefill(self.mixer_norm(x), info, state, **arguments)
        return self._add_experts(x + y.astype(x.dtype), info.valid)[0], state

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: State, **arguments: Any
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer.step(self.mixer_norm(x_t), info, state, **arguments)
        x = (x_t + y.astype(x_t.dtype))[:, None]
        return self._add_experts(x, info.valid[:, None])[0][:, 0], state
