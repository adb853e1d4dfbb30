"""How well a model predicts a whole split: every target once, whatever the batch size.

Sums are kept per row and added exactly on the host, so the order and the grouping of rows into
batches leave the figures alone.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from effattn.batch import Batch
from effattn.parallel.mesh import constrain_tokens
from effattn.parallel.tiles import token_tiles
from effattn.train.loss import tile_length


class Evaluation(NamedTuple):
    """loss: nats per token; perplexity: e ** loss; accuracy: share of targets that the model finds
    most likely; bits_per_byte: None where tokens stand for no bytes (synthetic tasks).
    tokens: targets that were scored.
    """

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float | None
    tokens: int


class Split(Protocol):
    """What is read of a dataset (see effattn.data)."""

    vocab_size: int

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterable[Batch]: ...

    def num_bytes(self, split: str) -> int | None: ...


def evaluate(
    model: Any,
    dataset: Split,
    split: str = "validation",
    *,
    batch_size: int | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Evaluation:
    """The model's figures over all of `split`.

    model: an nnx.Module with the Model protocol. batch_size None: that of the data config.
    on_tokens is called with the number of targets scored so far.
    Raises ValueError where the split holds no target, FloatingPointError where a loss is not
    finite.
    """
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    parts: list[_RowSums] = []
    scored = 0.0

    def collect(sums: _RowSums) -> None:
        nonlocal scored
        parts.append(jax.device_get(sums))
        scored += float(parts[-1].weight.sum())
        if on_tokens is not None:
            on_tokens(round(scored))

    pending = None
    for batch in dataset.evaluation_batches(split, batch_size):
        rows, seq_len = batch.tokens.shape
        tile = tile_length(batch=rows, seq_len=seq_len, vocab_size=dataset.vocab_size)
        sums = _row_sums(graphdef, params, batch, tile=tile)
        # Read one batch late: the device works on the next one meanwhile.
        if pending is not None:
            collect(pending)
        pending = sums
    if pending is not None:
        collect(pending)
    losses, weights, correct = (
        [value for part in parts for value in getattr(part, name).tolist()]
        for name in _RowSums._fields
    )
    weight, loss = math.fsum(weights), math.fsum(losses)
    if weight == 0:
        raise ValueError(f"split: {split!r} holds no target to score")
    if not math.isfinite(loss):
        row = next(index for index, value in enumerate(losses) if not math.isfinite(value))
        raise FloatingPointError(
            f"evaluation: the loss of row {row} of the {split} split is not finite"
        )
    num_bytes = dataset.num_bytes(split)
    return Evaluation(
        loss=loss / weight,
        perplexity=math.exp(min(loss / weight, 700.0)),
        accuracy=math.fsum(correct) / weight,
        bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None,
        tokens=round(weight),
    )


class _RowSums(NamedTuple):
    """Of every row, [batch]: weighted nats, weight, weight of the targets found most likely."""

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


@partial(jax.jit, static_argnames=("graphdef", "tile"))
def _row_sums(graphdef: nnx.GraphDef, params: Any, batch: Batch, *, tile: int) -> _RowSums:
    """tile: positions per row whose logits exist at once."""
    model = nnx.merge(graphdef, params)
    hidden = constrain_tokens(model(batch.tokens, batch.info).hidden)
    rows = len(hidden)

    def add(sums: _RowSums, xs: tuple[jax.Array, ...]) -> tuple[_RowSums, None]:
        hidden, targets, weights = jax.tree.map(constrain_tokens, xs)
        logits = model.logits(hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        weights = weights.astype(logits.dtype)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
        right = jnp.argmax(logits, axis=-1) == targets
        new = _RowSums(
            jnp.sum(nats * weights, axis=1), jnp.sum(weights, axis=1), jnp.sum(right * weights, 1)
        )
        return jax.tree.map(jnp.add, sums, new), None

    zero = jnp.zeros((rows,), jnp.promote_types(hidden.dtype, jnp.float32))
    xs = tuple(token_tiles(x, tile) for x in (hidden, batch.targets, batch.loss_weights))
    sums, _ = jax.lax.scan(add, _RowSums(zero, zero, zero), xs)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return sums
    # On every device, so that every host can read them.
    return jax.lax.with_sharding_constraint(sums, PartitionSpec())
