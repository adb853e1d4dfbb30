"""Rows by number: what the stream, the packer, the tasks and the mixture all are.

A `Rows` answers for any set of row numbers at once, so that the loader's only state is a counter.
"""

from typing import Any, Protocol

import numpy as np

from effattn.batch import Batch, TokenInfo


class Rows(Protocol):
    """num_rows: rows in an epoch; None: they never repeat.

    Rows made in order end after num_rows and give padding from there on; shuffled ones go on with
    the next epoch.
    """

    @property
    def num_rows(self) -> int | None: ...

    def batch(self, index: np.ndarray) -> Batch:
        """The rows numbered `index`, int64 [n], as numpy arrays [n, seq_len]."""
        ...

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        """Where each of these rows comes from, for people who must look at it."""
        ...


def empty_batch(num_rows: int, seq_len: int) -> Batch:
    """All padding: tokens 0, weights 0, segment 0, not valid."""

    def zeros(dtype: Any) -> np.ndarray:
        return np.zeros((num_rows, seq_len), dtype)

    info = TokenInfo(zeros(np.int32), zeros(np.int32), zeros(bool))
    return Batch(zeros(np.int32), zeros(np.int32), zeros(np.float32), info)


def whole_batch(
    tokens: np.ndarray, targets: np.ndarray, loss_weights: np.ndarray | None = None
) -> Batch:
    """A batch of rows that hold one document each, every token valid. [n, seq_len]."""
    shape = tokens.shape
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    if loss_weights is None:
        loss_weights = np.ones(shape, np.float32)
    info = TokenInfo(positions.copy(), np.ones(shape, np.int32), np.ones(shape, bool))
    return Batch(tokens.astype(np.int32), targets.astype(np.int32), loss_weights, info)


def put_rows(batch: Batch, at: np.ndarray, part: Batch) -> None:
    """Writes the rows of `part` over the rows `at` of `batch`, in place."""
    for whole, rows in zip((*batch[:3], *batch.info), (*part[:3], *part.info), strict=True):
        whole[at] = rows
