"""The pre-norm residual block: `x += mixer(norm(x)); x += mlp(norm(x))`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.nn.memory import HIDDEN, Memory
from effattn.nn.mixer import SequenceMixer, State
from effattn.parallel.tiles import join_tokens, over_tiles, split_tokens


class Block(nnx.Module):
    """The residual stream stays in x's own dtype (float32), the branches run in theirs.

    mlp, mlp_norm: None where the mixer is the whole layer. arguments: what `Stack` tells the mixer
    about the layer that it stands in.
    """

    def __init__(
        self,
        mixer: SequenceMixer,
        mlp: Callable[[jax.Array], jax.Array] | None,
        mixer_norm: Callable[[jax.Array], jax.Array],
        mlp_norm: Callable[[jax.Array], jax.Array] | None,
    ):
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.memory = Memory()

    def take(self, memory: Memory) -> None:
        """Raises ValueError where the MLP has no inner activations to keep by token."""
        if memory.hidden_on_host and self.mlp is not None and not hasattr(self.mlp, "hidden"):
            raise ValueError(
                f"memory.hidden_on_host: got {memory.hidden_on_host}, expected 0 with "
                f"{type(self.mlp).__name__}, whose activations are not split by tokens"
            )
        self.memory = memory

    def _add_mlp(self, x: jax.Array) -> jax.Array:
        if self.mlp is None or self.mlp_norm is None:
            return x
        normed = self.mlp_norm(x)
        if self.memory.mlp_tile is not None and x.ndim == 3:
            y = over_tiles(self.mlp, normed, self.memory.mlp_tile)
        elif self.memory.hidden_on_host and x.ndim == 3:
            y = self._split_mlp(normed)
        else:
            y = self.mlp(normed)
        return x + y.astype(x.dtype)

    def _split_mlp(self, x: jax.Array) -> jax.Array:
        """The MLP, with the inner activations of some tokens under a name of their own."""
        mlp: Any = self.mlp
        first, rest = split_tokens(x, self.memory.hidden_on_host)
        kept = mlp.down(checkpoint_name(mlp.hidden(first), HIDDEN))
        return join_tokens(kept, mlp(rest))

    def __call__(
        self, x: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, **arguments: Any
    ) -> tuple[jax.Array, Any]:
        """(x, the mixer's aux)."""
        y, aux = self.mixer(self.mixer_norm(x), info, key=key, **arguments)
        return self._add_mlp(x + y.astype(x.dtype)), aux

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        return self.mixer.init_state(batch, max_len, dtype)

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: State, **arguments: Any
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer.prefill(self.mixer_norm(x), info, state, **arguments)
        return self._add_mlp(x + y.astype(x.dtype)), state

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: State, **arguments: Any
    ) -> tuple[jax.Array, State]:
        y, state = self.mixer.step(self.mixer_norm(x_t), info, state, **arguments)
        return self._add_mlp(x_t + y.astype(x_t.dtype)), state
