"""Cross entropy in tiles, so that seq_len x vocab logits never exist at once."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from effattn.parallel.mesh import constrain_tokens
from effattn.parallel.tiles import token_tiles

# Logits per device and tile: below this one tile costs nothing; above, at least MIN_TOKENS rows
# keep the head's matmul efficient.
MAX_LOGITS = 2**22
MIN_TOKENS = 1024


class TokenLoss(NamedTuple):
    """Sums over tokens; every one is a scalar of the loss's float type.

    loss: cross entropy in nats, times its weight. weight: sum of loss weights. correct: weight of
    the targets that are the most likely token. z: squared log-normaliser, times its weight.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    z: jax.Array


def tile_length(*, batch: int, seq_len: int, vocab_size: int, shards: int = 1) -> int:
    """Positions per row and tile, for `batch` rows split over `shards` devices."""
    tokens = max(MIN_TOKENS, MAX_LOGITS // vocab_size)
    return min(seq_len, max(1, tokens * shards // batch))


def cross_entropy(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    tile: int | None = None,
) -> TokenLoss:
    """Sums of the token losses of one batch.

    logits_of: [..., width] -> [..., vocab], differentiated through its closure. hidden: [batch,
    seq_len, width]; targets: int32 [batch, seq_len]; weights: [batch, seq_len]. tile: positions per
    row whose logits exist at once, in the forward and the backward pass; None: all.
    Softmax and sums run in float32, in float64 for float64 hidden.
    """
    batch, seq_len, _ = hidden.shape
    tile = seq_len if tile is None else min(tile, seq_len)

    def one_tile(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
        logits = logits_of(hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))  # [b, tile, vocab]
        weights = weights.astype(logits.dtype)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        right = jnp.argmax(logits, axis=-1) == targets
        return TokenLoss(
            loss=jnp.sum((normalizer - picked) * weights),
            weight=jnp.sum(weights),
            correct=jnp.sum(right * weights),
            z=jnp.sum(jnp.square(normalizer) * weights),
        )

    if tile == seq_len:
        return one_tile(hidden, targets, weights)

    def add(sums: TokenLoss, xs: tuple[jax.Array, ...]) -> tuple[TokenLoss, None]:
        xs = jax.tree.map(constrain_tokens, xs)
        return jax.tree.map(jnp.add, sums, jax.checkpoint(one_tile, prevent_cse=False)(*xs)), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    xs = tuple(token_tiles(x, tile) for x in (hidden, targets, weights))
    sums, _ = jax.lax.scan(add, TokenLoss(zero, zero, zero, zero), xs)
    return sums
