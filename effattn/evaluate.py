"""How well a model predicts a whole split: every target once, whatever the batch size.

Sums are kept per row and added exactly on the host, so the order and the grouping of rows into
batches leave the figures alone.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from effattn.batch import Batch
from effattn.train.loss import TokenLoss, cross_entropy, tile_length


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
    Raises ValueError where the split holds no target or a loss is not finite.
    """
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    losses: list[float] = []
    weights: list[float] = []
    correct: list[float] = []
    scored = 0.0
    for batch in dataset.evaluation_batches(split, batch_size):
        rows, seq_len = batch.tokens.shape
        tile = tile_length(batch=rows, seq_len=seq_len, vocab_size=dataset.vocab_size)
        sums = jax.device_get(_row_sums(graphdef, params, batch, tile=tile))
        losses += sums.loss.tolist()
        weights += sums.weight.tolist()
        correct += sums.correct.tolist()
        scored += float(sums.weight.sum())
        if on_tokens is not None:
            on_tokens(round(scored))
    weight, loss = math.fsum(weights), math.fsum(losses)
    if weight == 0:
        raise ValueError(f"split: {split!r} holds no target to score")
    if not math.isfinite(loss):
        row = next(index for index, value in enumerate(losses) if not math.isfinite(value))
        raise ValueError(f"evaluation: the loss of row {row} of split {split!r} is not finite")
    num_bytes = dataset.num_bytes(split)
    return Evaluation(
        loss=loss / weight,
        perplexity=math.exp(min(loss / weight, 700.0)),
        accuracy=math.fsum(correct) / weight,
        bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None,
        tokens=round(weight),
    )


@partial(jax.jit, static_argnames=("graphdef", "tile"))
def _row_sums(graphdef: nnx.GraphDef, params: Any, batch: Batch, *, tile: int) -> TokenLoss:
    """The batch's TokenLoss with every sum [batch]."""
    model = nnx.merge(graphdef, params)
    hidden = model(batch.tokens, batch.info).hidden

    def row(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> TokenLoss:
        return cross_entropy(model.logits, hidden[None], targets[None], weights[None], tile=tile)

    return jax.vmap(row)(hidden, batch.targets, batch.loss_weights)
