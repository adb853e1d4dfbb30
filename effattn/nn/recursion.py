"""Layers that are run several times: which ones share parameters, and whose keys they read.

A recursive transformer of n layers has the parameters of fewer: `Layout` says of which. A
`RecursiveStack` holds the shared ones. What one pass over it writes into its caches another pass
may read, instead of or beside its own keys and values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.mixer import State
from effattn.nn.mixers.attention import KVCache

SHARING = ("cycle", "sequence", "middle_cycle", "middle_sequence")


class Layout(NamedTuple):
    """base_depth shared layers, each run num_recursions times.

    in_turn: one after the other ("cycle"), or each of them num_recursions times in a row
    ("sequence"). private: a first and a last layer of their own ("middle").
    """

    base_depth: int
    num_recursions: int
    in_turn: bool
    private: bool

    @property
    def num_layers(self) -> int:
        """Layers that a token goes through when it is run to full depth."""
        return self.base_depth * self.num_recursions + 2 * self.private

    @property
    def tied(self) -> tuple[tuple[int, ...], ...]:
        """For every shared layer, which of the num_layers it is."""
        depth, times, first = self.base_depth, self.num_recursions, int(self.private)
        if self.in_turn:
            return tuple(tuple(first + j + r * depth for r in range(times)) for j in range(depth))
        return tuple(tuple(first + j * times + r for r in range(times)) for j in range(depth))


def layout(num_layers: int, num_recursions: int, sharing: str) -> Layout:
    """The layout of a stack of num_layers, or of as many fewer as divide into the recursions.

    sharing: cycle | sequence | middle_cycle | middle_sequence. Raises ValueError where nothing is
    left to share. Source: Bae et al. 2025 (arXiv 2507.10524), section 2.
    """
    check_in("sharing", sharing, SHARING)
    check_at_least("num_recursions", num_recursions, 1)
    private = sharing.startswith("middle_")
    base_depth = (num_layers - 2 * private) // num_recursions
    if base_depth < 1:
        raise ValueError(
            f"num_layers: got {num_layers}, expected at least {num_recursions + 2 * private} for "
            f"num_recursions={num_recursions} and sharing={sharing!r}"
        )
    return Layout(base_depth, num_recursions, sharing.endswith("cycle"), private)


class RecursiveStack(Stack):
    """A stack of `Attention` blocks, of which `times` passes are one run of a recursive model.

    A state of a run is one state of the stack per pass.
    """

    def run(self, x: jax.Array, info: TokenInfo, times: int, in_turn: bool) -> jax.Array:
        """All passes. x: [batch, seq_len, width]."""
        if in_turn:
            for _ in range(times):
                x, _ = self(x, info)
            return x

        def repeated(block: Block, x: jax.Array, _: Any, args: Any) -> tuple[jax.Array, None]:
            for _ in range(times):
                x, _ = block(x, info, **args)
            return x, None

        return self._walk(x, repeated, [None] * len(self.blocks))[0]

    def decode(
        self, x: jax.Array, info: TokenInfo, states: Sequence[State], in_turn: bool
    ) -> tuple[jax.Array, tuple[State, ...]]:
        """All passes from given states, one per pass; x: [batch, seq_len, width] or, as a step,
        [batch, width]."""
        move = "prefill" if x.ndim == 3 else "step"
        if in_turn:
            new = []
            for state in states:
                x, state = getattr(self, move)(x, info, state)
                new.append(state)
            return x, tuple(new)

        def repeated(block: Block, x: jax.Array, states: Any, args: Any) -> tuple[jax.Array, Any]:
            new = []
            for state in states:
                x, state = getattr(block, move)(x, info, state, **args)
                new.append(state)
            return x, tuple(new)

        x, by_block = self._walk(x, repeated, tuple(zip(*states, strict=True)))
        return x, tuple(zip(*by_block, strict=True))

    def read(self, x: jax.Array, info: TokenInfo, shared: State) -> jax.Array:
        """A pass whose attention reads the keys and values of another pass, and makes none."""

        def apply(block: Any, x: jax.Array, cache: KVCache, _: Any) -> tuple[jax.Array, None]:
            query, _, _ = block.mixer._project(block.mixer_norm(x), info)
            return _attended(block, x, query, info, cache), None

        return self._walk(x, apply, shared)[0]

    def read_beside(
        self, x: jax.Array, info: TokenInfo, shared: State, hidden: jax.Array, own: State
    ) -> tuple[jax.Array, State]:
        """A pass that reads its own keys and values, and those of another pass of other tokens.

        hidden: bool [batch, slots], the slots of `shared` that are not read. own: the state of this
        pass, returned with x's keys and values in it.
        """

        def apply(block: Any, x: jax.Array, caches: Any, _: Any) -> tuple[jax.Array, KVCache]:
            theirs, mine = caches
            query, key, value = block.mixer._project(block.mixer_norm(x), info)
            mine = mine.append(key, value, info)
            theirs = theirs._replace(segments=jnp.where(hidden, 0, theirs.segments))
            rows = [
                jnp.concatenate(pair, axis=1) for pair in zip(theirs[:4], mine[:4], strict=True)
            ]
            both = KVCache(rows[0], rows[1], rows[2], rows[3], mine.length)
            return _attended(block, x, query, info, both), mine

        return self._walk(x, apply, tuple(zip(shared, own, strict=True)))


def _attended(
    block: Any, x: jax.Array, query: jax.Array, info: TokenInfo, cache: KVCache
) -> jax.Array:
    """x after the block whose attention has these queries over this cache."""
    mixer = block.mixer
    y = mixer.sequence.attention(
        query,
        cache.key.astype(query.dtype),
        cache.value.astype(query.dtype),
        mask=mixer.mask,
        q_positions=info.positions,
        kv_positions=cache.positions,
        q_segment_ids=info.segments,
        kv_segment_ids=cache.segments,
        logit_soft_cap=mixer.soft_cap,
    )
    y = mixer.out(y.reshape(*y.shape[:2], -1))
    return block._add_mlp(x + y.astype(x.dtype))
