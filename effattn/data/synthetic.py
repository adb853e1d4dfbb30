"""Tasks with known answers, made by row number: recall, copying, induction, what two sets share.

loss_weights is 1 where the answer is determined and 0 elsewhere, so that accuracy over the weighted
targets is the task's own score. A task's functions take row numbers and a key and give
(tokens, targets, loss_weights), each [n, seq_len].
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.checks import check_at_least
from effattn.data.config import DataConfig
from effattn.data.randomness import integers, key_of, uniform
from effattn.data.rows import empty_batch, put_rows, whole_batch

Examples = tuple[np.ndarray, np.ndarray, np.ndarray]
DEFAULT_VOCAB_SIZE = 512


def _distinct(key: np.uint64, index: np.ndarray, count: int, high: int) -> np.ndarray:
    """[n, count] of range(high), no two alike in a row."""
    return np.argpartition(uniform(key, index, high), count - 1, axis=1)[:, :count]


def mqar(
    key: np.uint64,
    index: np.ndarray,
    *,
    seq_len: int,
    vocab_size: int,
    num_pairs: int,
    power_a: float,
) -> Examples:
    """Multi-query associative recall: `k1 v1 k2 v2 ...`, then each key once more, to be answered.

    Keys are from [1, vocab_size / 2), values from [vocab_size / 2, vocab_size), all distinct in a
    row. Key i comes back at 2 num_pairs + 2 g_i, where the gaps g_i are distinct and drawn with
    probability proportional to power_a * g^(power_a - 1), g from 1; the target there is its
    value. Everywhere else the tokens are random, and the answer is not shown.
    Source: Arora et al. 2023 (Zoology), section 4 and its `multiquery_ar`.
    """
    context = 2 * num_pairs
    if seq_len < 2 * context:
        raise ValueError(
            f"data.seq_len: got {seq_len}, but mqar with num_pairs={num_pairs} needs at least "
            f"{2 * context}: pairs in the first half, queries in the second"
        )
    if vocab_size // 2 - 1 < num_pairs:
        raise ValueError(
            f"data.vocab_size: got {vocab_size}, but mqar with num_pairs={num_pairs} needs at "
            f"least {2 * num_pairs + 2}: keys below its half, values above"
        )
    half = vocab_size // 2
    keys = 1 + _distinct(key ^ np.uint64(1), index, num_pairs, half - 1)
    values = half + _distinct(key ^ np.uint64(2), index, num_pairs, vocab_size - half)
    # The largest of log p + Gumbel noise are a draw without replacement.
    space = (seq_len - context) // 2
    noise = uniform(key ^ np.uint64(3), index, space)
    log_p = (power_a - 1) * np.log(np.arange(1, space + 1))
    score = log_p - np.log(-np.log(np.maximum(noise, 1e-300)))
    gaps = np.argsort(-score, axis=1)[:, :num_pairs]

    tokens = integers(key ^ np.uint64(4), index, seq_len, vocab_size)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    queries = context + 2 * gaps
    np.put_along_axis(tokens, queries, keys, axis=1)
    targets = _next_tokens(tokens)
    np.put_along_axis(targets, queries, values, axis=1)
    weights = np.zeros(tokens.shape, np.float32)
    np.put_along_axis(weights, queries, 1.0, axis=1)
    return tokens, targets, weights


def copy(key: np.uint64, index: np.ndarray, *, seq_len: int, vocab_size: int) -> Examples:
    """`x1 ... xn 0 x1 ... x(n-1)`: from the 0 on, say x again. n = seq_len // 2.

    Symbols are from [1, vocab_size). An odd seq_len ends with one more 0 of weight 0.
    """
    check_at_least("data.seq_len", seq_len, 2)
    check_at_least("data.vocab_size", vocab_size, 2)
    n = seq_len // 2
    symbols = 1 + integers(key, index, n, vocab_size - 1)
    tokens = np.zeros((len(index), seq_len), np.int64)
    targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    tokens[:, :n], tokens[:, n + 1 : 2 * n] = symbols, symbols[:, :-1]
    targets[:, : n - 1], targets[:, n : 2 * n] = symbols[:, 1:], symbols
    weights[:, n : 2 * n] = 1.0
    return tokens, targets, weights


def induction(key: np.uint64, index: np.ndarray, *, seq_len: int, vocab_size: int) -> Examples:
    """A 0 stands once among random symbols, and again at the end: say what followed it.

    Symbols are from [1, vocab_size). Source: Olsson et al. 2022; the form of Fu et al. 2023 (H3).
    """
    check_at_least("data.seq_len", seq_len, 3)
    check_at_least("data.vocab_size", vocab_size, 2)
    tokens = 1 + integers(key ^ np.uint64(1), index, seq_len, vocab_size - 1)
    place = integers(key ^ np.uint64(2), index, 1, seq_len - 2)
    np.put_along_axis(tokens, place, 0, axis=1)
    tokens[:, -1] = 0
    targets = _next_tokens(tokens)
    targets[:, -1] = np.take_along_axis(tokens, place + 1, axis=1)[:, 0]
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, -1] = 1.0
    return tokens, targets, weights


def set_disjointness(
    key: np.uint64,
    index: np.ndarray,
    *,
    seq_len: int,
    vocab_size: int,
    set_sizes: tuple[int, ...],
    set_halves: bool = True,
    set_times: int = 1,
) -> Examples:
    """`0 ... 1 <first set> 2 <second set> 3`: say, at the 3, the one token that both sets hold.

    set_sizes: pairs of sizes, of which a row draws one. The smaller set is drawn without
    replacement from [4, h), h = 4 + (vocab_size - 4) / 2, the larger (of equals the second) from
    [h, vocab_size); one of its tokens then gives its place to the common one. A model that reads
    once, in order, cannot know in a long first set what the second will ask for.

    With the halves a token tells by itself whose it is: the common one is that of the smaller set's
    half among tokens of the other, whichever the order. set_halves=False, ours, draws both sets
    from [4, vocab_size), so that only what was remembered of the first answers. set_times: how
    often the row says all this up to the last 3, as in `generate.read_twice`.
    Source: Arora et al. 2024, Just read twice, section 3.2 and its `non_autoreg`.
    """
    if len(set_sizes) < 2 or len(set_sizes) % 2 or min(set_sizes) < 1:
        raise ValueError(
            f"data.set_sizes: got {set_sizes}, expected pairs of sizes, each at least 1"
        )
    half, pairs = (vocab_size - 4) // 2, np.reshape(set_sizes, (-1, 2))
    check_at_least("data.set_times", set_times, 1)
    longest = set_times * (int(pairs.sum(1).max()) + 3)
    if seq_len < longest:
        raise ValueError(
            f"data.seq_len: got {seq_len}, but set_disjointness with set_sizes={set_sizes} needs "
            f"at least {longest}: both sets and three marks, data.set_times={set_times} of them"
        )
    if not set_halves and vocab_size - 4 < pairs.sum(1).max():
        raise ValueError(
            f"data.vocab_size: got {vocab_size}, but set_disjointness with set_sizes={set_sizes} "
            f"needs at least {int(pairs.sum(1).max()) + 4}: four marks, both sets"
        )
    if set_halves and half < pairs.max():
        raise ValueError(
            f"data.vocab_size: got {vocab_size}, but set_disjointness with set_sizes={set_sizes} "
            f"needs at least {2 * int(pairs.max()) + 4}: four marks, a half for each set"
        )
    tokens = np.zeros((len(index), seq_len), np.int64)
    answers = np.zeros(len(index), np.int64)
    drawn = integers(key ^ np.uint64(1), index, 1, len(pairs))[:, 0]
    for number, (first, second) in enumerate(pairs):
        rows = np.flatnonzero(drawn == number)
        mine, small, large = index[rows], min(first, second), max(first, second)
        if set_halves:
            short = 4 + _distinct(key ^ np.uint64(2), mine, small, half)
            long = 4 + half + _distinct(key ^ np.uint64(3), mine, large, half)
        else:
            both = 4 + _distinct(key ^ np.uint64(2), mine, small + large, vocab_size - 4)
            short, long = _shuffled(key ^ np.uint64(6), mine, both, small)
        common = np.take_along_axis(short, integers(key ^ np.uint64(4), mine, 1, small), axis=1)
        np.put_along_axis(long, integers(key ^ np.uint64(5), mine, 1, large), common, axis=1)
        parts = (short, long) if first <= second else (long, short)
        ones = np.ones_like(common)
        row = np.concatenate([ones, parts[0], 2 * ones, parts[1], 3 * ones] * set_times, axis=1)
        tokens[rows, seq_len - row.shape[1] :] = row
        answers[rows] = common[:, 0]
    targets, weights = _next_tokens(tokens), np.zeros(tokens.shape, np.float32)
    targets[:, -1], weights[:, -1] = answers, 1.0
    return tokens, targets, weights


def _shuffled(
    key: np.uint64, index: np.ndarray, rows: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in an order of each one's own (argpartition's is not random), cut after `first`."""
    order = np.argsort(uniform(key, index, rows.shape[1]), axis=1)
    rows = np.take_along_axis(rows, order, axis=1)
    return rows[:, :first], rows[:, first:]


def _next_tokens(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([tokens[:, 1:], np.zeros_like(tokens[:, :1])], axis=1)


_MAKERS: dict[str, Callable[..., Examples]] = {
    "mqar": mqar,
    "copy": copy,
    "induction": induction,
    "set_disjointness": set_disjointness,
}


class Task:
    """One synthetic task at the sizes that a config states."""

    def __init__(self, name: str, config: DataConfig) -> None:
        self.name, self.seq_len = name, config.seq_len
        self.vocab_size = DEFAULT_VOCAB_SIZE if config.vocab_size is None else config.vocab_size
        self.num_examples = config.validation_examples
        self._seed = config.seed
        self._make = _MAKERS[name]
        self.settings: dict[str, Any] = {"seq_len": self.seq_len, "vocab_size": self.vocab_size}
        if name == "mqar":
            self.settings |= {"num_pairs": config.num_pairs, "power_a": config.power_a}
        if name == "set_disjointness":
            self.settings["set_sizes"] = tuple(config.set_sizes)
            self.settings |= {"set_halves": config.set_halves, "set_times": config.set_times}
        self._make(np.uint64(0), np.zeros(1, np.int64), **self.settings)  # raises what cannot be

    @property
    def identity(self) -> str:
        what = [self.name, self.settings, self._seed, self.num_examples]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def num_bytes(self, split: str) -> int | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"task": self.settings, "validation_examples": self.num_examples}

    def rows(self, split: str, seed: int) -> "TaskRows":
        """train: without end. validation: num_examples rows, the same whatever the run's seed."""
        if split == "train":
            return TaskRows(self, split, key_of("train", self.name, self._seed, seed), None)
        key = key_of("validation", self.name, self._seed)
        return TaskRows(self, split, key, self.num_examples)

    def examples(self, key: np.uint64, index: np.ndarray) -> Batch:
        return whole_batch(*self._make(key, index, **self.settings))


class TaskRows:
    """A task's examples by number."""

    def __init__(self, task: Task, split: str, key: np.uint64, num_rows: int | None) -> None:
        self._task, self._split, self._key, self.num_rows = task, split, key, num_rows

    def batch(self, index: np.ndarray) -> Batch:
        if self.num_rows is None:
            return self._task.examples(self._key, index)
        batch = empty_batch(len(index), self._task.seq_len)
        inside = np.flatnonzero(index < self.num_rows)
        put_rows(batch, inside, self._task.examples(self._key, index[inside]))
        return batch

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [{"split": self._split, "example": int(row)} for row in index]
