"""The pre-norm residual block: `x += mixer(norm(x)); x += mlp(norm(x))`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.mixer import SequenceMixer, State


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

    def _add_mlp(self, x: jax.Array) -> jax.Array:
        if self.mlp is None or self.mlp_norm is None:
            return x
        return x + self.mlp(self.mlp_norm(x)).astype(x.dtype)

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
