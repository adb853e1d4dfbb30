"""Cross entropy in tiles, so that seq_len x vocab logits never exist at once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effattn.parallel.mesh import BATCH_AXES, STREAMS_AXIS
from effattn.parallel.tiles import on_own_tokens, own_tiles

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
    model: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    tile: int | None = None,
) -> TokenLoss:
    """Sums of the token losses of one batch.

    model: a pytree with `logits`: [..., width] -> [..., vocab]. hidden: [batch, seq_len, width];
    targets: int32 [batch, seq_len]; weights: [batch, seq_len]. tile: positions per row whose logits
    exist at once, over all devices that share it, in the forward and the backward pass; None: all.
    Softmax and sums run in float32, in float64 for float64 hidden. Each device runs over its own
    tiles, so that gradients of the head meet once, not once per tile.
    """
    seq_len = hidden.shape[1]
    tile = seq_len if tile is None else min(tile, seq_len)

    def own(model: Any, ways: int, *tokens: jax.Array) -> TokenLoss:
        length = tokens[0].shape[1]
        each = max(1, tile // ways)
        if each >= length:
            return _sums(model, *tokens)

        def add(sums: TokenLoss, xs: tuple[jax.Array, ...]) -> tuple[TokenLoss, None]:
            one = jax.checkpoint(lambda *xs: _sums(model, *xs), prevent_cse=False)
            return jax.tree.map(jnp.add, sums, one(*xs)), None

        zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
        xs = tuple(own_tiles(x, each) for x in tokens)
        sums, _ = jax.lax.scan(add, TokenLoss(zero, zero, zero, zero), xs)
        return sums

    def everywhere(model: Any, *tokens: jax.Array) -> TokenLoss:
        axes = (*BATCH_AXES, STREAMS_AXIS)
        return on_own_tokens(own, model, *tokens, row_axes=axes, sums=True)

    if tile < seq_len:
        # Its residuals are what it was given: the head, gathered, is not kept between the passes.
        everywhere = jax.checkpoint(everywhere, prevent_cse=False)
    return everywhere(model, hidden, targets, weights)


def _sums(model: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
    logits = model.logits(hidden)
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
