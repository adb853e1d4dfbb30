"""Who decides how deep a token goes: a router per recursion, or one router for all of them.

In `ExpertChoice` every recursion picks among the tokens of the one before. In `TokenChoice` every
token is told its depth at once. Source: Bae et al. 2025 (arXiv 2507.10524), section 2.2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn import compact
from effattn.nn.compact import Capacity
from effattn.nn.depth import Losses, Memory, Metrics, Recursions, Routed, Routing, loads
from effattn.nn.param import parameter
from effattn.nn.recursion import Layout, RecursiveStack
from effattn.nn.router import (
    Router,
    balance_loss,
    foretelling_loss,
    load,
    top_rows,
    z_loss,
)


class Level(NamedTuple):
    """One recursion of expert choice in training, over the tokens alive before it.

    before, after: [batch, alive, width] of all alive ones, [batch, taken, width] of those taken.
    alive: their TokenInfo. logits: [batch, alive, 1] of the router, decisive: of what decides in
    the causal mode. chosen: bool [batch, alive]. source: int32 [batch, taken], which of the alive;
    None: all. taken: int32 [batch].
    """

    before: jax.Array
    after: jax.Array
    alive: TokenInfo
    logits: jax.Array
    decisive: jax.Array
    chosen: jax.Array
    source: jax.Array | None
    taken: jax.Array


class ExpertChoice(Recursions):
    """Every recursion picks among the tokens of the one before, by a router of its own.

    In training the best of a row, as many as its share of the row's tokens; otherwise those with a
    positive logit, which looks at no other token. A share of 1 takes all of them in both modes.
    shares: of each recursion. aux_routers: what decides in the causal mode instead of the routers.
    warmup: updates from shares of 1 down to these, in `rungs` compiled sizes.
    """

    def __init__(
        self,
        stack: RecursiveStack,
        layout: Layout,
        routing: Routing,
        dtype: Any,
        routers: list[Router],
        aux_routers: list[Router] | None,
        *,
        shares: tuple[float, ...],
        sampling_coeff: float,
        warmup: int,
        rungs: int,
    ):
        super().__init__(stack, layout, routing, dtype)
        self.routers = nnx.List(routers)
        self.aux_routers = None if aux_routers is None else nnx.List(aux_routers)
        self.shares, self.sampling_coeff = shares, sampling_coeff
        self.warmup, self.rungs = warmup, rungs

    def __call__(self, x: jax.Array, info: TokenInfo, *, training: bool, extra: Any) -> Routed:
        if not training:
            return self._causal(x, info, self._memory_of_one_call(x), self.routing.evaluation)
        if not self.warmup or extra is None:
            return self._best(x, info, self.shares)
        left = jnp.minimum(extra["step"] / self.warmup, 1)
        left = (1 + jnp.cos(jnp.pi * left)) / 2  # from 1 to 0
        steps = [i / (self.rungs - 1) for i in range(self.rungs)]
        # Up to the next size; float32 has no exact 0 at the end of the cosine.
        rung = jnp.sum(left > jnp.array(steps[:-1]) + 1e-6)
        branches = [
            lambda x, shares=tuple(c + (1 - c) * step for c in self.shares): self._best(
                x, info, shares
            )
            for step in steps
        ]
        return jax.lax.switch(rung, branches, x)

    def _best(self, x: jax.Array, info: TokenInfo, shares: tuple[float, ...]) -> Routed:
        levels = self.levels(x, info, shares)
        losses: Losses = {}
        metrics: Metrics = {}
        tokens = jnp.sum(info.valid, dtype=jnp.float32)
        alive = tokens
        for r, level in enumerate(levels, start=1):
            mask, decisive = level.alive.valid, level.decisive[..., 0]
            if self.sampling_coeff:
                loss = foretelling_loss(decisive, level.chosen, mask)
                losses[f"recursion_{r}_sampling"] = (self.sampling_coeff * loss, alive)
            if self.routing.z_coeff:
                loss = z_loss(level.logits, mask)
                losses[f"recursion_{r}_z"] = (self.routing.z_coeff * loss, alive)
            if self.shares[r - 1] < 1:  # otherwise nothing is decided
                same = jnp.sum(((decisive > 0) == level.chosen) & mask, dtype=jnp.float32)
                metrics[f"recursion_{r}_agreement"] = same / jnp.maximum(alive, 1)
            alive = jnp.sum(level.taken, dtype=jnp.float32)
            metrics[f"recursion_{r}_load"] = alive / jnp.maximum(tokens, 1)
        x, depth = assembled(levels)
        return Routed(x, depth, None, losses, metrics)

    def levels(self, x: jax.Array, info: TokenInfo, shares: tuple[float, ...]) -> list[Level]:
        """The recursions one after the other, each over the rows that it takes and no more."""
        length = x.shape[1]
        valid = alive_count = jnp.sum(info.valid, axis=1, dtype=jnp.int32)
        memory = self._memory_of_one_call(x)
        slots = jnp.zeros(info.valid.shape, jnp.int32)
        alive, alive_share = info, 1.0
        levels = []
        for r, (router, share) in enumerate(zip(self.routers, shares, strict=True)):
            logits = router(x)
            if self.aux_routers is None:
                decisive = logits
            else:
                decisive = self.aux_routers[r](jax.lax.stop_gradient(x))
            scores = self._scores(logits)
            source, chosen, taken = None, alive.valid, alive_count
            rows = (x, scores, slots, alive)
            if share < alive_share:
                # Of a row of n tokens max(1, floor(share n)), whatever its padding.
                sizes = np.maximum(1, (share * np.arange(length + 1)).astype(np.int32))
                taken = jnp.minimum(jnp.asarray(sizes)[valid], alive_count)
                room = compact.divisible(int(sizes[-1]), x.shape[1])
                source, chosen = top_rows(scores[..., 0], taken, alive.valid, room)
                rows = compact.gather(rows, source)
            before, (x, scores, slots, of_taken) = x, rows
            if r == 0:
                slots = self._slots(of_taken.valid, memory)
            y, memory = self._recur(r, x, slots, of_taken, memory)
            x = x + (scores * y if self.routing.weighted else y).astype(x.dtype)
            levels.append(Level(before, x, alive, logits, decisive, chosen, source, taken))
            alive, alive_count, alive_share = of_taken, taken, share
        return levels

    def _causal(
        self,
        x: jax.Array,
        info: TokenInfo,
        memory: Memory | None,
        capacity: Capacity,
        *,
        decoding: bool = False,
    ) -> Routed:
        alive, slots = info.valid, None
        depth = jnp.zeros(alive.shape, jnp.int32)
        metrics: Metrics = {}
        for r, (router, share) in enumerate(zip(self.routers, self.shares, strict=True)):
            logits = router(x)
            wanted = alive
            if share < 1:
                decisive = logits if self.aux_routers is None else self.aux_routers[r](x)
                wanted = alive & (decisive[..., 0] > 0)
            y, keep, slots, memory = self._recur_over(
                r, x, slots, info, wanted, memory,
                decoding=decoding, capacity=capacity if share < 1 else None, metrics=metrics,
            )  # fmt: skip
            gated = self._scores(logits) * y if self.routing.weighted else y
            x = x + jnp.where(keep[..., None], gated, 0).astype(x.dtype)
            alive, depth = keep, depth + keep
        metrics.update(loads(depth, info, self.num_recursions))
        return Routed(x, depth, memory, {}, metrics)


def assembled(levels: list[Level]) -> tuple[jax.Array, jax.Array]:
    """(x [batch, seq_len, width], depth int32 [batch, seq_len]) after these recursions."""
    x = levels[-1].after
    depth = jnp.full(x.shape[:2], len(levels), jnp.int32)
    for r, level in reversed(list(enumerate(levels))):
        if level.source is not None:
            back = compact.scatter((x, depth), level.source, level.before.shape[1])
            x = jnp.where(level.chosen[..., None], back[0], level.before)
            depth = jnp.where(level.chosen, back[1], r)
    return x, jnp.where(levels[0].alive.valid, depth, 0)


class TokenChoice(Recursions):
    """One router tells every token its depth, from what it is before the first recursion.

    Causal as it is: the two modes differ in their capacities alone. bias: added to the scores in
    the choice, not in the gate; moved after every update by how often each depth was chosen.
    warmup: first updates at full depth.
    """

    def __init__(
        self,
        stack: RecursiveStack,
        layout: Layout,
        routing: Routing,
        dtype: Any,
        router: Router,
        *,
        balance_coeff: float,
        loss_free: bool,
        warmup: int,
        rngs: nnx.Rngs,
    ):
        super().__init__(stack, layout, routing, dtype)
        self.router, self.balance_coeff, self.warmup = router, balance_coeff, warmup
        zeros, shape = jax.nn.initializers.zeros, (layout.num_recursions,)
        # No gradient moves it. A parameter, because those are what evaluation and decoding have.
        self.bias = parameter(shape, (None,), zeros, rngs) if loss_free else None

    def __call__(self, x: jax.Array, info: TokenInfo, *, training: bool, extra: Any) -> Routed:
        memory = self._memory_of_one_call(x)
        if not training:
            return self._causal(x, info, memory, self.routing.evaluation)
        logits = self.router(x)
        choice = self._choice(logits)
        if self.warmup and extra is not None:
            full = self.num_recursions - 1
            choice = jnp.where(extra["step"] < self.warmup, full, choice)
        out = self._at_depths(x, info, logits, choice, memory, self.routing.training)
        chosen = load(choice, info.valid, self.num_recursions)
        tokens = jnp.sum(info.valid, dtype=jnp.float32)
        losses: Losses = {}
        if self.balance_coeff:
            loss = balance_loss(self._scores(logits), chosen, info.valid)
            losses["balance"] = (self.balance_coeff * loss, tokens)
        if self.routing.z_coeff:
            losses["router_z"] = (self.routing.z_coeff * z_loss(logits, info.valid), tokens)
        return out._replace(losses=losses, loads=chosen)

    def _choice(self, logits: jax.Array) -> jax.Array:
        """The last recursion (from 0) of every token, [batch, seq_len]."""
        scores = self._scores(logits)
        if self.bias is not None:
            scores = scores + jax.lax.stop_gradient(self.bias[...])
        return jnp.argmax(scores, axis=-1)

    def _causal(
        self,
        x: jax.Array,
        info: TokenInfo,
        memory: Memory | None,
        capacity: Capacity,
        *,
        decoding: bool = False,
    ) -> Routed:
        logits = self.router(x)
        choice = self._choice(logits)
        return self._at_depths(x, info, logits, choice, memory, capacity, decoding=decoding)

    def _at_depths(
        self,
        x: jax.Array,
        info: TokenInfo,
        logits: jax.Array,
        choice: jax.Array,
        memory: Memory | None,
        capacity: Capacity,
        *,
        decoding: bool = False,
    ) -> Routed:
        """What is demoted stops before its depth; its gate stays that of the depth it chose."""
        alive, slots, h = info.valid, None, x
        depth = jnp.zeros(alive.shape, jnp.int32)
        metrics: Metrics = {}
        for r in range(self.num_recursions):
            y, alive, slots, memory = self._recur_over(
                r, h, slots, info, alive & (choice >= r), memory,
                decoding=decoding, capacity=capacity if r else None, metrics=metrics,
            )  # fmt: skip
            h, depth = jnp.where(alive[..., None], y, h), depth + alive
        scores = jnp.take_along_axis(self._scores(logits), choice[..., None], axis=-1)
        gated = scores * h if self.routing.weighted else h
        x = x + jnp.where(info.valid[..., None], gated, 0).astype(x.dtype)
        metrics.update(loads(depth, info, self.num_recursions))
        return Routed(x, depth, memory, {}, metrics)
