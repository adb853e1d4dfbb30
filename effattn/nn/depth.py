"""Recursions over a shared stack, each over some of the tokens, and what they remember.

`FullDepth` runs all of them over every token. `Recursions` is what the routers of
`depth_choice.py` have in common: one recursion over the tokens that were kept.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn import compact
from effattn.nn.compact import Capacity
from effattn.nn.mixer import State
from effattn.nn.recursion import Layout, RecursiveStack
from effattn.nn.router import score

EXACT = Capacity()
Losses = dict[str, tuple[jax.Array, jax.Array]]
Metrics = dict[str, jax.Array]


class Routing(NamedTuple):
    """score, alpha: see `router.score`. weighted: scale by the score. z_coeff: of the z loss.

    shared_keys: later recursions read the first one's keys and values; update_keys: and their own
    of the tokens that are still alive. training, evaluation: capacities of token choice, and of
    everything that is causal.
    """

    score: str
    alpha: float
    weighted: bool
    z_coeff: float
    shared_keys: bool
    update_keys: bool
    training: Capacity
    evaluation: Capacity


class Memory(NamedTuple):
    """What decoding keeps of the recursions.

    passes: a state of the stack for every recursion with keys of its own. reached: int32
    [batch, slots], how many recursions the token behind each slot of passes[0] took; None unless
    keys are updated. taken: int32 [batch, num_recursions], tokens that each recursion took.
    """

    passes: tuple[State, ...]
    reached: Any
    taken: jax.Array


class Routed(NamedTuple):
    """x [batch, seq_len, width] after the recursions. depth: int32 [batch, seq_len], how many of
    them took the token. loads: float32 [num_recursions], of the loss-free balance, or None."""

    x: jax.Array
    depth: jax.Array
    memory: Memory | None
    losses: Losses
    metrics: Metrics
    loads: Any = None


class FullDepth(nnx.Module):
    """Every recursion over every token: the recursive transformer without a router."""

    def __init__(self, stack: RecursiveStack, layout: Layout):
        self.stack, self.layout = stack, layout
        self.num_recursions = layout.num_recursions

    def __call__(self, x: jax.Array, info: TokenInfo, *, training: bool, extra: Any) -> Routed:
        x = self.stack.run(x, info, self.layout.num_recursions, self.layout.in_turn)
        return Routed(x, self._depth(info), None, {}, {})

    def init_memory(self, batch: int, max_len: int, dtype: Any) -> Memory:
        recursions = self.layout.num_recursions
        state = self.stack.init_state(batch, max_len, dtype)
        return Memory((state,) * recursions, None, jnp.zeros((batch, recursions), jnp.int32))

    def decode(self, x: jax.Array, info: TokenInfo, memory: Memory) -> Routed:
        x, passes = self.stack.decode(x, info, memory.passes, self.layout.in_turn)
        return Routed(x, self._depth(info), memory._replace(passes=passes), {}, {})

    def _depth(self, info: TokenInfo) -> jax.Array:
        return jnp.where(info.valid, self.layout.num_recursions, 0).astype(jnp.int32)


class Recursions(nnx.Module):
    """The stack, and one recursion of it over some of the tokens.

    dtype: of the keys and values that one call remembers, the compute dtype.
    """

    def __init__(self, stack: RecursiveStack, layout: Layout, routing: Routing, dtype: Any):
        self.stack, self.num_recursions = stack, layout.num_recursions
        self.routing, self.dtype = routing, dtype

    def init_memory(self, batch: int, max_len: int, dtype: Any) -> Memory:
        routing, recursions = self.routing, self.num_recursions
        own = 1 if routing.shared_keys and not routing.update_keys else recursions
        state = self.stack.init_state(batch, max_len, dtype)
        reached = jnp.zeros((batch, max_len), jnp.int32) if routing.update_keys else None
        return Memory((state,) * own, reached, jnp.zeros((batch, recursions), jnp.int32))

    def _memory_of_one_call(self, x: jax.Array) -> Memory | None:
        """Over whole rows only shared keys need be remembered, from recursion to recursion."""
        if not self.routing.shared_keys:
            return None
        return self.init_memory(x.shape[0], x.shape[1], self.dtype)

    def _scores(self, logits: jax.Array) -> jax.Array:
        return score(logits, self.routing.score, self.routing.alpha)

    def _slots(self, keep: jax.Array, memory: Memory | None) -> jax.Array:
        """[batch, seq_len]: where the first recursion's keys of each kept token will lie, the
        number of slots for the others. Zeros where nobody asks."""
        if memory is None or memory.reached is None:
            return jnp.zeros(keep.shape, jnp.int32)
        slots = memory.reached.shape[1]
        length = memory.passes[0][0].length[0]  # of every layer alike
        rank = jnp.cumsum(keep, axis=1, dtype=jnp.int32)
        return jnp.where(keep, (length[:, None] + rank - 1) % slots, slots)

    def _recur(
        self, r: int, x: jax.Array, slots: jax.Array, info: TokenInfo, memory: Memory | None
    ) -> tuple[jax.Array, Memory | None]:
        """Recursion r (from 0) of the valid rows of x [batch, rows, width]."""
        if memory is None:
            return self.stack(x, info)[0], None
        if memory.reached is not None:
            row, none = jnp.arange(len(slots))[:, None], memory.reached.shape[1]
            slots = jnp.where(info.valid, slots, none)
            reached = memory.reached.at[row, slots].set(r + 1, mode="drop")
            memory = memory._replace(reached=reached)
        passes = memory.passes
        if r > 0 and self.routing.shared_keys:
            if memory.reached is None:
                return self.stack.read(x, info, passes[0]), memory
            x, state = self.stack.read_beside(x, info, passes[0], memory.reached > r, passes[r])
        elif x.shape[1] == 1:
            one = TokenInfo(*(field[:, 0] for field in info))
            x_t, state = self.stack.step(x[:, 0], one, passes[r])
            x = x_t[:, None]
        else:
            x, state = self.stack.prefill(x, info, passes[r])
        return x, memory._replace(passes=(*passes[:r], state, *passes[r + 1 :]))

    def _recur_over(
        self,
        r: int,
        x: jax.Array,
        slots: jax.Array | None,
        info: TokenInfo,
        wanted: jax.Array,
        memory: Memory | None,
        *,
        decoding: bool,
        capacity: Capacity | None,
        metrics: Metrics,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Memory | None]:
        """Recursion r of the wanted tokens alone.

        slots: what recursion 0 returned. capacity None: every token is wanted. metrics: gets the
        counts. Returns (y, of which the rows of other tokens mean nothing; which were kept: fewer
        than wanted only in mode "demote"; slots; memory).
        """
        keep = wanted
        if capacity is not None and capacity.mode == "demote":
            before = None if memory is None else memory.taken[:, r]
            length = None if memory is None else memory.passes[0][0].positions.shape[-1]
            keep = compact.demoted(wanted, capacity, before=before, length=length)
        if slots is None:
            slots = self._slots(keep, memory)
        if memory is not None:
            taken = memory.taken.at[:, r].add(jnp.sum(keep, axis=1, dtype=jnp.int32))
            memory = memory._replace(taken=taken)

        def masked() -> tuple[jax.Array, Memory | None]:
            return self._recur(r, x, slots, info._replace(valid=keep), memory)

        if capacity is None:
            y, memory = masked()
            return y, keep, slots, memory
        if decoding and x.shape[1] == 1:
            # A step: where no row goes on, the block is not run.
            y, memory = jax.lax.cond(jnp.any(keep), masked, lambda: (x, memory))
            return y, keep, slots, memory

        def inner(given: Any, info: TokenInfo) -> tuple[jax.Array, Memory | None]:
            x, slots = given
            return self._recur(r, x, slots, info, memory)

        # Nobody reads the counts of a prompt: what could overflow has all the room it may need.
        room = EXACT if decoding and capacity.mode != "bucket" else capacity
        y, memory, report = compact.with_capacity(inner, (x, slots), info, keep, room)
        if capacity.mode == "demote":
            everyone, kept = (jnp.sum(mask, dtype=jnp.int32) for mask in (wanted, keep))
            report = report._replace(kept=everyone, overflow=everyone - kept)
        counts = report.metrics(f"recursion_{r + 1}", capacity)
        error = counts.pop("capacity_error", None)
        if error is not None:
            metrics["capacity_error"] = metrics.get("capacity_error", jnp.zeros_like(error)) + error
        metrics.update(counts)
        return y, keep, slots, memory

    def decode(self, x: jax.Array, info: TokenInfo, memory: Memory) -> Routed:
        """The causal mode from what is remembered. x: [batch, seq_len, width]."""
        return self._causal(x, info, memory, self.routing.evaluation, decoding=True)

    def _causal(
        self,
        x: jax.Array,
        info: TokenInfo,
        memory: Memory | None,
        capacity: Capacity,
        *,
        decoding: bool = False,
    ) -> Routed:
        raise NotImplementedError


def loads(depth: jax.Array, info: TokenInfo, recursions: int) -> Metrics:
    """recursion_<r>_load: the share of the tokens that each recursion took. depth: int32 [batch,
    seq_len], how many recursions took the token."""
    tokens = jnp.maximum(jnp.sum(info.valid, dtype=jnp.float32), 1)
    return {
        f"recursion_{r}_load": jnp.sum(depth >= r, dtype=jnp.float32) / tokens
        for r in range(1, recursions + 1)
    }
