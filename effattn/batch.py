"""What a batch of tokens is: the loader makes it, models and losses read it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class TokenInfo(NamedTuple):
    """Where each token stands. [batch, seq_len], or [batch] in `step`.

    positions: int32, absolute within the token's own document; masks and rotary read these.
    segment_ids: int32, one number per document in a packed row; 0 is padding.
    valid: bool; a token with valid=False is not attended, changes no state and carries no loss.
    """

    positions: Any
    segment_ids: Any
    valid: Any

    @property
    def segments(self) -> jax.Array:
        """segment_ids with invalid tokens moved to segment 0."""
        return jnp.where(self.valid, self.segment_ids, 0)


class Batch(NamedTuple):
    """One training batch. targets[t] is the token after tokens[t], shifted before any permutation.

    tokens, targets: int32 [batch, seq_len]. loss_weights: float32 [batch, seq_len], 0 where the
    target is unknown (the end of a document, padding).
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    info: TokenInfo


def whole_rows(tokens: Array, lengths: Array | None = None, *, start: int = 0) -> TokenInfo:
    """TokenInfo of rows that hold one document each, the first `lengths` tokens of every row valid.

    tokens: [batch, seq_len, ...], read for its shape only. start: position of the first token.
    """
    batch, seq_len = tokens.shape[:2]
    index = jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), (batch, seq_len))
    valid = jnp.ones((batch, seq_len), bool)
    if lengths is not None:
        valid = index < jnp.asarray(lengths)[:, None]
    return TokenInfo(index + start, valid.astype(jnp.int32), valid)
