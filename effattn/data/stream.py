"""Rows as windows of the concatenated documents: the plain training of language models."""

from functools import lru_cache
from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.data.corpus import Corpus
from effattn.data.randomness import integers, permute
from effattn.data.rows import empty_batch, put_rows, whole_batch

# Starts are drawn for this many rows at once: for the 8 rows of a batch alone the draw took 0.5 ms,
# ten times the rest of the batch.
_BLOCK = 1024


class ShuffledWindows:
    """Windows in random order, without end; an epoch meets every token once, but for the edges.

    An epoch cuts the array into windows of seq_len side by side, from an offset of its own (so
    that windows differ between epochs), and visits them in an order of its own.
    """

    def __init__(self, corpus: Corpus, split: str, seq_len: int, key: np.uint64) -> None:
        self._corpus, self._split, self._seq_len, self._key = corpus, split, seq_len, key
        self._tokens = corpus.tokens[split]
        self._reach = np.arange(seq_len + 1)
        # One window less than would fit, so that any offset below seq_len leaves room.
        self.num_rows: int = max(1, (len(self._tokens) - seq_len) // seq_len)
        self._num_offsets = min(seq_len, len(self._tokens) - self.num_rows * seq_len)
        self._block = lru_cache(maxsize=4)(self._draw_block)

    def _starts(self, index: np.ndarray) -> np.ndarray:
        first, last = int(index.min()) // _BLOCK, int(index.max()) // _BLOCK
        starts = np.concatenate([self._block(block) for block in range(first, last + 1)])
        return starts[index - first * _BLOCK]

    def _draw_block(self, block: int) -> np.ndarray:
        index = np.arange(block * _BLOCK, (block + 1) * _BLOCK)
        epoch, place = np.divmod(index, self.num_rows)
        offset = integers(self._key, epoch, 1, self._num_offsets)[:, 0]
        return offset + permute(place, self.num_rows, self._key, epoch) * self._seq_len

    def batch(self, index: np.ndarray) -> Batch:
        windows = self._tokens[self._starts(index)[:, None] + self._reach]
        return whole_batch(windows[:, :-1], windows[:, 1:])

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [
            {**self._corpus.where(self._split, start), "epoch": int(row // self.num_rows)}
            for row, start in zip(index, self._starts(index), strict=True)
        ]


class WindowsInOrder:
    """The array from its first token to its last: every token but the first is a target once."""

    def __init__(self, corpus: Corpus, split: str, seq_len: int) -> None:
        self._corpus, self._split, self._seq_len = corpus, split, seq_len
        self._tokens = corpus.tokens[split]
        self.num_rows: int = -(-(len(self._tokens) - 1) // seq_len)

    def batch(self, index: np.ndarray) -> Batch:
        batch = empty_batch(len(index), self._seq_len)
        inside = np.flatnonzero(index < self.num_rows)
        place = index[inside, None] * self._seq_len + np.arange(self._seq_len)
        known = place < len(self._tokens) - 1
        place = np.where(known, place, 0)
        rows = whole_batch(
            np.where(known, self._tokens[place], 0),
            np.where(known, self._tokens[place + 1], 0),
            known.astype(np.float32),
        )
        info = rows.info._replace(segment_ids=known.astype(np.int32), valid=known)
        put_rows(batch, inside, rows._replace(info=info))
        return batch

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [self._corpus.where(self._split, int(row) * self._seq_len) for row in index]
