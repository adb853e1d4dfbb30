"""A stack of blocks, scanned over the repeating pattern of its layers.

A hybrid of 27 layers compiles as 6 blocks: `plan_groups` finds the pattern, the parameters of
equal positions are stacked along a leading axis named "layers", and `jax.lax.scan` walks it.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_in, check_same_length
from effattn.nn.block import Block
from effattn.nn.memory import HIDDEN, MIXER, RESIDUAL, Memory
from effattn.nn.mixer import State
from effattn.nn.param import prepend_axis
from effattn.pallas_kernels.target import tpu_target

# Per block of a stack, what its mixer gets by name.
Arguments = Sequence[dict[str, Any]]

REMAT = ("none", "dots", "names", "full", "offload")
# Groups of up to so many layers are unrolled, but not for TPUs: the residuals of a scan are copied
# into and out of stacked buffers, which costs a small model on CPU a quarter of its step (6 layers,
# width 128). A TPU's compiler takes as much longer as there are layers.
UNROLLED_LAYERS = 8


class Group(NamedTuple):
    """`pattern`, the kinds of consecutive layers, occurring `repeats` times in a row."""

    pattern: tuple[Hashable, ...]
    repeats: int


def plan_groups(layers: Sequence[Hashable]) -> tuple[Group, ...]:
    """Cuts `layers` into repeated patterns with the fewest distinct positions, then groups.

    >>> plan_groups("abcabcc")
    (Group(pattern=('a', 'b', 'c'), repeats=2), Group(pattern=('c',), repeats=1))
    """
    layers = tuple(layers)
    # best[end]: (distinct positions, groups, plan) of layers[:end].
    best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())]
    for end in range(1, len(layers) + 1):
        candidates = []
        for start in range(end):
            length = end - start
            for period in range(1, length + 1):
                part = layers[start:end]
                if length % period == 0 and part == part[:period] * (length // period):
                    group = Group(part[:period], length // period)
                    positions, groups, plan = best[start]
                    candidates.append((positions + period, groups + 1, (*plan, group)))
                    break
        best.append(min(candidates, key=lambda candidate: candidate[:2]))
    return best[-1][2]


def _remat(name: str, unrolled: bool, memory: Memory) -> Callable[[Callable], Callable]:
    """Rewrites the body of a scan to save less for the backward pass.

    none: keep everything. dots: keep the products with weights. names: keep each mixer's output.
    full: keep only the block's input. offload: as names, kept in host memory. memory adds to what
    is kept there.
    """
    if name == "none":
        return lambda body: body
    policies = jax.checkpoint_policies
    saved = [MIXER] if name == "names" else []
    on_host = [MIXER] if name == "offload" else []
    on_host += [RESIDUAL] if memory.residual_on_host else []
    on_host += [HIDDEN] if memory.hidden_on_host else []
    if name == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    elif on_host:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=on_host,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*saved) if saved else policies.nothing_saveable
    # In a loop the recomputation stands apart from the first computation; unrolled, XLA would merge
    # the two again and keep everything.
    return lambda body: jax.checkpoint(body, policy=policy, prevent_cse=unrolled)


class Stack(nnx.Module):
    """Blocks in order; `make(kind, rngs)` builds the block of one layer.

    layers: one hashable kind per layer. blocks: one block per distinct position of the plan, its
    parameters stacked [repeats, ...]. arguments: per layer, numbers that its mixer gets by name, so
    that layers whose mixers differ in no more than these can be of one kind, which must
    have the same names. They are no parameters: nothing trains or saves them. Raises ValueError
    for an unknown `remat` or where `arguments` does not fit `layers`.
    """

    def __init__(
        self,
        layers: Sequence[Hashable],
        make: Callable[[Any, nnx.Rngs], Block],
        *,
        remat: str = "none",
        arguments: Sequence[Mapping[str, float]] | None = None,
        rngs: nnx.Rngs,
    ):
        check_in("remat", remat, REMAT)
        self.plan, self.remat = plan_groups(layers), remat
        self.memory = Memory()
        arguments = [{}] * len(layers) if arguments is None else arguments
        check_same_length("arguments", arguments, len(layers), "layers")
        # Tuples, because they are a part of the program, not of the parameters.
        self.arguments = tuple(tuple(numbers.items()) for numbers in arguments)
        self.blocks: nnx.List[Block] = nnx.List()
        for group in self.plan:
            for kind in group.pattern:
                keys = jax.random.split(rngs.params(), group.repeats)
                block = jax.vmap(lambda key, kind=kind: make(kind, nnx.Rngs(params=key)))(keys)
                prepend_axis(block, "layers")
                self.blocks.append(block)

    def take(self, memory: Memory) -> None:
        """Raises ValueError where `remat` keeps on the device what should wait on the host."""
        for name in ("residual_on_host", "hidden_on_host"):
            if getattr(memory, name) and self.remat in ("none", "dots"):
                raise ValueError(
                    f"memory.{name}: got {getattr(memory, name)} beside remat={self.remat!r}, "
                    "expected remat names, full or offload: nothing else is computed again"
                )
        self.memory = memory

    def _arguments_of(self, group: Group, start: int) -> tuple[dict[str, jax.Array], ...]:
        """Per block of a group that begins with layer `start`, arrays of [repeats]."""
        period = len(group.pattern)
        stop = start + period * group.repeats
        of_block = (map(dict, self.arguments[i:stop:period]) for i in range(start, start + period))
        return tuple(jax.tree.map(lambda *n: jnp.asarray(n), *layers) for layers in of_block)

    def _walk(
        self,
        x: jax.Array,
        apply: Callable[[Block, jax.Array, Any, dict[str, Any]], tuple[jax.Array, Any]],
        given: Sequence[Any],
        more: Arguments | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """x through every block. given, and what comes back: one entry per block, stacked."""
        first, layer, results = 0, 0, []
        more = ({},) * len(self.blocks) if more is None else more
        for group in self.plan:
            last = first + len(group.pattern)
            fixed = self._arguments_of(group, layer)
            arguments = tuple({**a, **b} for a, b in zip(fixed, more[first:last], strict=True))

            def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
                outs = []
                if self.memory.residual_on_host:
                    x = checkpoint_name(x, RESIDUAL)
                for block, entry, args in zip(*scanned, strict=True):
                    x, out = apply(block, x, entry, args)
                    outs.append(out)
                return x, tuple(outs)

            scanned = tuple(self.blocks[first:last]), tuple(given[first:last]), arguments
            few = len(group.pattern) * group.repeats <= UNROLLED_LAYERS
            unroll = few and tpu_target() is None
            remat = _remat(self.remat, unroll, self.memory)
            x, outs = jax.lax.scan(remat(body), x, scanned, unroll=unroll)
            results += outs
            first, layer = last, layer + len(group.pattern) * group.repeats
        return x, tuple(results)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        key: jax.Array | None = None,
        arguments: Arguments | None = None,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """x: [batch, seq_len, width]. Returns (x, the mixers' aux: per block, stacked).

        arguments, in all three calls: per block, trees of arrays [repeats, ...] that its mixer gets
        by name, besides those of the stack.
        """
        keys: list[Any] = [None] * len(self.blocks)
        if key is not None:
            repeats = [group.repeats for group in self.plan for _ in group.pattern]
            per_block = jax.random.split(key, len(repeats))
            keys = [jax.random.split(k, n) for k, n in zip(per_block, repeats, strict=True)]
        return self._walk(
            x,
            lambda block, x, key, args: block(x, info, key=key, **args),
            keys,
            arguments,
        )

    def init_state(self, batch: int, max_len: int, dtype: Any) -> tuple[State, ...]:
        """One state per block of the plan, each leaf [repeats, ...]."""
        states, blocks = [], iter(self.blocks)
        for group in self.plan:
            for _ in group.pattern:
                state = next(blocks).init_state(batch, max_len, dtype)
                stacked = jax.tree.map(
                    lambda s, n=group.repeats: jnp.broadcast_to(s, (n, *s.shape)), state
                )
                states.append(stacked)
        return tuple(states)

    def prefill(
        self,
        x: jax.Array,
        info: TokenInfo,
        state: tuple[State, ...],
        *,
        arguments: Arguments | None = None,
    ) -> tuple[jax.Array, tuple[State, ...]]:
        return self._walk(
            x,
            lambda block, x, s, args: block.prefill(x, info, s, **args),
            state,
            arguments,
        )

    def step(
        self,
        x_t: jax.Array,
        info: TokenInfo,
        state: tuple[State, ...],
        *,
        arguments: Arguments | None = None,
    ) -> tuple[jax.Array, tuple[State, ...]]:
        return self._walk(
            x_t,
            lambda block, x, s, args: block.step(x, info, s, **args),
            state,
            arguments,
        )
