"""What the decoders of the zoo do alike around their stack of blocks.

A model's file builds the four parts, which is where the papers differ; from tokens to logits, in
one pass or step by step, all of them go the same way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.layers import Embedding, Head, statistics_dtype
from effattn.nn.mixer import Output, State


class LanguageModel(nnx.Module):
    """embedding, stack, final_norm, head: set by the model; head None ties it to the embedding.

    The residual stream is float32 whatever the compute dtype, unless residual_dtype says otherwise,
    and starts as embedding_scale times
    the embedding.
    """

    embedding: Embedding
    stack: Any  # a Stack, or what has its four methods
    final_norm: Any
    head: Head | None
    embedding_scale: float = 1.0
    residual_dtype: str = "float32"

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        if self.residual_dtype == "float32":
            x = x.astype(statistics_dtype(x.dtype))
        else:
            x = x.astype(self.residual_dtype)
        return x if self.embedding_scale == 1 else x * self.embedding_scale

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]."""
        x, _ = self.stack(self._embed(tokens), info, key=key)
        return Output(self.final_norm(x), losses={}, metrics={}, extra=extra)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab_size]."""
        head = self.embedding if self.head is None else self.head
        return head.logits(hidden)

    def init_state(self, batch: int, max_len: int, dtype: Any = jnp.float32) -> State:
        return self.stack.init_state(batch, max_len, dtype)

    def prefill(self, tokens: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """(logits [batch, seq_len, vocab_size], state)."""
        x, state = self.stack.prefill(self._embed(tokens), info, state)
        return self.logits(self.final_norm(x)), state

    def step(self, token: jax.Array, info: TokenInfo, state: State) -> tuple[jax.Array, State]:
        """token and info's fields: [batch]. (logits [batch, vocab_size], state)."""
        x, state = self.stack.step(self._embed(token), info, state)
        return self.logits(self.final_norm(x)), state
