"""Several row sources as one: in exact proportions, or one after another."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.data.rows import Rows, empty_batch, put_rows

Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def interleave(
    index: np.ndarray, shares: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """(source number, index within that source) of every row, both int64 [n].

    shares: from `share_of`. Source k takes floor(n a / b) of the first n rows that the sources
    before it left, evenly spread, so any stretch of rows has the stated proportions within a row
    or two, and a row's place is known without the rows before it.
    """
    source = np.full(len(index), len(shares), np.int64)
    for number, (a, b) in enumerate(shares):
        free = source == len(shares)
        before = index[free] * a // b
        taken = (index[free] + 1) * a // b > before
        source[np.flatnonzero(free)[taken]] = number
        index = index.copy()
        index[free] = np.where(taken, before, index[free] - before)
    return source, index


def share_of(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Per source but the last, its share of what the earlier ones leave, as a small fraction.

    Integers keep rows apart that floating point would merge at large indices. The denominator is
    at most 2**20, so that index * numerator stays below 2**63 for 2**43 rows.
    """
    shares = []
    for number, weight in enumerate(weights[:-1]):
        share = Fraction(weight) / sum(map(Fraction, weights[number:]))
        share = share.limit_denominator(1 << 20)
        shares.append((share.numerator, share.denominator))
    return shares


def one_after_another(index: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Like `interleave`, the sources whole and in order; rows past the end fall to the last."""
    ends = np.cumsum(sizes)
    source = np.minimum(np.searchsorted(ends, index, "right"), len(sizes) - 1)
    return source, index - (ends - np.asarray(sizes))[source]


class Combined:
    """The rows of several sources under one numbering."""

    def __init__(
        self,
        parts: Sequence[Rows],
        names: Sequence[str],
        seq_len: int,
        locate: Locate,
        num_rows: int | None,
    ) -> None:
        self._parts, self._names, self._seq_len = parts, names, seq_len
        self._locate, self.num_rows = locate, num_rows

    def batch(self, index: np.ndarray) -> Batch:
        source, inside = self._locate(index)
        batch = empty_batch(len(index), self._seq_len)
        for number, part in enumerate(self._parts):
            at = np.flatnonzero(source == number)
            if len(at):
                put_rows(batch, at, part.batch(inside[at]))
        return batch

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"source": self._names[k], **self._parts[k].where(i[None])[0]}
            for k, i in zip(*self._locate(index), strict=True)
        ]


def mixed(
    parts: Sequence[Rows], names: Sequence[str], weights: Sequence[float], seq_len: int
) -> Rows:
    """Rows without end, drawn from `parts` in proportion to `weights`."""
    return Combined(parts, names, seq_len, partial(interleave, shares=share_of(weights)), None)


def chained(parts: Sequence[Rows], names: Sequence[str], seq_len: int) -> Rows:
    """All rows of the first part, then of the second, and so on."""
    sizes = [part.num_rows for part in parts if part.num_rows is not None]
    assert len(sizes) == len(parts), "only rows that end can come one after another"
    return Combined(parts, names, seq_len, partial(one_after_another, sizes=sizes), sum(sizes))
