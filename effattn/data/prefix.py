"""Rows for models whose tokens all see the first part of their document (JRT).

There a loss for the next token would read its answers. The prefix trains on masked tokens instead,
and what comes after it on the next token. Source: Arora et al. 2024, Just read twice, section 4.2.
"""

from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.data.randomness import uniform
from effattn.data.rows import Rows


class PrefixRows:
    """`rows` with another loss in the first prefix_length tokens of every document.

    A share `masked` of these tokens becomes mask_id, drawn anew for every row number, and each of
    them is its own target; the other tokens of the prefix have no loss. A masked token weighs so
    much that, on average, those of a row weigh `weight` times as much as its tokens after the
    prefix. key: stirs the draws; None masks nothing, as for evaluation.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        prefix_length: int,
        mask_id: int,
        masked: float,
        weight: float,
        key: np.uint64 | None,
    ) -> None:
        self._rows, self._prefix_length, self._mask_id = rows, prefix_length, mask_id
        self._masked, self._weight, self._key = masked, weight, key

    @property
    def num_rows(self) -> int | None:
        return self._rows.num_rows

    def batch(self, index: np.ndarray) -> Batch:
        batch = self._rows.batch(index)
        prefix = batch.info.valid & (batch.info.positions < self._prefix_length)
        weights = np.where(prefix, np.float32(0), batch.loss_weights)
        if self._key is None:
            return batch._replace(loss_weights=weights)
        hidden = prefix & (uniform(self._key, index, prefix.shape[1]) < self._masked)
        expected = np.maximum(self._masked * prefix.sum(axis=1), 1e-9)
        each = (self._weight * weights.sum(axis=1) / expected).astype(np.float32)
        return batch._replace(
            tokens=np.where(hidden, np.int32(self._mask_id), batch.tokens),
            targets=np.where(hidden, batch.tokens, batch.targets),
            loss_weights=np.where(hidden, each[:, None], weights),
        )

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return self._rows.where(index)
