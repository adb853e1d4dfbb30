"""Rows as packed documents: several in a row, each its own segment with positions from 0.

The rows of an epoch are planned from the lengths alone: best fit, longest first, over the
histogram of lengths (Krell et al. 2021, "Efficient sequence packing without cross-contamination"),
so the plan costs as much as there are lengths, not documents, and every epoch has as many rows.
Which document takes which place of its length is drawn anew for each epoch.
"""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from effattn.batch import Batch, TokenInfo
from effattn.data.corpus import Corpus
from effattn.data.rows import empty_batch

Recipe = tuple[tuple[int, int], ...]  # (length, how many of it), longest first


def plan_rows(lengths: np.ndarray, seq_len: int) -> list[tuple[Recipe, int]]:
    """How to fill rows of seq_len with pieces of these lengths: [(recipe, number of rows)].

    lengths: int [n], each 1..seq_len. Each goes where it leaves the least room.
    """
    count_of = np.bincount(lengths, minlength=seq_len + 1)
    open_rows: dict[int, list[tuple[Recipe, int]]] = {}  # room left -> rows
    for length in np.flatnonzero(count_of)[::-1].tolist():
        left = int(count_of[length])
        for room in sorted(room for room in open_rows if room >= length):
            fit = room // length
            waiting = open_rows.pop(room)
            while waiting and left:
                recipe, rows = waiting.pop()
                full = min(rows, left // fit)
                if full:
                    _add(open_rows, room - fit * length, (*recipe, (length, fit)), full)
                    rows, left = rows - full, left - full * fit
                if rows and left:  # fewer than `fit` are left: one more row takes them
                    _add(open_rows, room - left * length, (*recipe, (length, left)), 1)
                    rows, left = rows - 1, 0
                if rows:
                    waiting.append((recipe, rows))
                    break
            for recipe, rows in waiting:
                _add(open_rows, room, recipe, rows)
            if not left:
                break
        fit = seq_len // length
        if left // fit:
            _add(open_rows, seq_len - fit * length, ((length, fit),), left // fit)
        if left % fit:
            _add(open_rows, seq_len - left % fit * length, ((length, left % fit),), 1)
    return [row for room in sorted(open_rows) for row in open_rows[room]]


def _add(open_rows: dict[int, list], room: int, recipe: Recipe, rows: int) -> None:
    open_rows.setdefault(room, []).append((recipe, rows))


class PackedDocuments:
    """Documents, cut into pieces of seq_len at most, packed into rows.

    A piece's last token predicts the next token of its document, its end included. Where a token
    array keeps no ends, what follows a document is unknown: weight 0. key: None packs the pieces
    in their own order, once; a key shuffles every epoch.
    """

    def __init__(self, corpus: Corpus, split: str, seq_len: int, key: np.uint64 | None) -> None:
        self._corpus, self._split, self._seq_len, self._key = corpus, split, seq_len, key
        self._tokens = corpus.tokens[split]
        self._ends_kept = corpus.separator is not None
        starts = corpus.documents[split][:, 0]
        ends = np.append(starts[1:], len(self._tokens) - int(self._ends_kept))
        pieces = -(-(ends - starts) // seq_len)
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        number = np.arange(pieces.sum()) - first
        self._start = np.repeat(starts, pieces) + number * seq_len
        self._document_end = np.repeat(ends, pieces)
        self._length = np.minimum(seq_len, self._document_end - self._start)

        place_length, place_row = [], []
        self.num_rows: int = 0
        for recipe, rows in plan_rows(self._length, seq_len):
            row_lengths = np.repeat(*np.asarray(recipe, np.int64).T)
            place_length.append(np.tile(row_lengths, rows))
            place_row.append(self.num_rows + np.repeat(np.arange(rows), len(row_lengths)))
            self.num_rows += rows
        self._place_row = np.concatenate(place_row)  # rising
        self._by_length = np.argsort(np.concatenate(place_length), kind="stable")
        self._bounds = np.searchsorted(self._place_row, np.arange(self.num_rows + 1))
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # the evaluating and the prefetching thread both ask

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the piece at each place, the order in which rows come) of one epoch."""
        with self._lock:
            if epoch not in self._epochs:
                order, tie = np.arange(self.num_rows), np.arange(len(self._length))
                if self._key is not None:
                    rng = np.random.Generator(np.random.Philox(key=[int(self._key), epoch]))
                    order, tie = rng.permutation(order), rng.permutation(tie)
                piece_at = np.empty_like(tie)
                piece_at[self._by_length] = np.lexsort((tie, self._length))
                self._epochs[epoch] = piece_at, order
                if len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _pieces(self, index: np.ndarray) -> list[np.ndarray]:
        """The pieces in each of these rows, in their order; none after the end."""
        result = []
        for row in index.tolist():
            epoch, place = divmod(row, self.num_rows)
            if self._key is None and epoch:
                result.append(np.zeros(0, np.int64))
                continue
            piece_at, order = self._epoch(epoch)
            source = order[place]
            result.append(piece_at[self._bounds[source] : self._bounds[source + 1]])
        return result

    def batch(self, index: np.ndarray) -> Batch:
        pieces_of_row = self._pieces(index)
        num_pieces = np.asarray([len(pieces) for pieces in pieces_of_row], np.int64)
        batch = empty_batch(len(index), self._seq_len)
        if not num_pieces.any():
            return batch
        pieces = np.concatenate(pieces_of_row)
        length = self._length[pieces]
        row = np.repeat(np.arange(len(index)), num_pieces)
        before = np.cumsum(length) - length  # tokens in the pieces before, over the whole batch
        first_piece = np.cumsum(num_pieces) - num_pieces
        row_start = np.append(before, length.sum())[first_piece]
        segment = np.arange(len(pieces)) - np.repeat(first_piece, num_pieces) + 1

        position = np.arange(length.sum()) - np.repeat(before, length)
        source = np.repeat(self._start[pieces], length) + position
        column = np.repeat(before - row_start[row], length) + position
        at = np.repeat(row, length), column
        known = source + 1 < len(self._tokens)
        if not self._ends_kept:
            known &= source + 1 < np.repeat(self._document_end[pieces], length)
        batch.tokens[at] = self._tokens[source]
        batch.targets[at] = np.where(known, self._tokens[np.where(known, source + 1, 0)], 0)
        batch.loss_weights[at] = known
        info: TokenInfo = batch.info
        info.positions[at] = position
        info.segment_ids[at] = np.repeat(segment, length)
        info.valid[at] = True
        return batch

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        result = []
        for row, pieces in zip(index.tolist(), self._pieces(index), strict=True):
            places = [self._corpus.where(self._split, int(self._start[i])) for i in pieces[:8]]
            result.append(
                {
                    "split": self._split,
                    "epoch": row // self.num_rows,
                    "num_documents": len(pieces),
                    "documents": places,  # the first eight
                }
            )
        return result
