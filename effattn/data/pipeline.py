"""`open_dataset`: from a DataConfig to batches.

A batch is a function of (config, seed, its number); the iterator's state is that number, so a run
resumes exactly, in any epoch, and any batch can be made again to be looked at.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.checks import check_at_least, check_in
from effattn.data.config import IMAGES, TASKS, DataConfig
from effattn.data.corpus import SPLITS, Corpus, open_corpus
from effattn.data.digits import Digits
from effattn.data.mixture import chained, mixed
from effattn.data.packing import PackedDocuments
from effattn.data.prefix import PrefixRows
from effattn.data.randomness import key_of
from effattn.data.rows import Rows
from effattn.data.stream import ShuffledWindows, WindowsInOrder
from effattn.data.synthetic import Task
from effattn.data.tokenizer import Tokenizer, load_tokenizer


class Dataset:
    """What `open_dataset` gives.

    vocab_size: ids are below it. identity: a hash of the content (files, split, tokenizer), the
    same on every machine that has the same text. tokenizer: None for tasks, and for token arrays
    whose tokenizer was not stated. parts: one Corpus, Task or Digits per source.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: Sequence[Corpus | Task | Digits],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.tokenizer = tokenizer
        self.vocab_size: int = max(part.vocab_size for part in parts)
        self._mask_id = self.vocab_size  # where a prefix is masked
        self.vocab_size += config.prefix_length > 0
        identities = [part.identity for part in parts]
        self.identity: str = identities[0]
        if len(parts) > 1:
            mix = json.dumps([identities, list(config.weights)])
            self.identity = hashlib.sha256(mix.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Plain values for a run's summary: every source's files, bytes, tokens, split, sha256."""
        sources = [
            {"source": name, "sha256": part.identity, **part.describe()}
            for name, part in zip(self.config.sources, self.parts, strict=True)
        ]
        return {
            "identity": self.identity,
            "vocab_size": self.vocab_size,
            "weights": list(self.config.weights),
            "sources": sources,
        }

    def num_bytes(self, split: str) -> int | None:
        """Bytes of text in `split`; None where ids are not text, the text is not known or a prefix
        is not scored.

        Bits per byte are nats / ln 2 / num_bytes, the nats summed over every weighted target of
        `evaluation_batches`, ends of documents among them.
        """
        check_in("split", split, SPLITS)
        if self.config.prefix_length:
            return None
        counts = [part.num_bytes(split) for part in self.parts]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def bytes_per_token(self, split: str) -> float | None:
        """num_bytes over the number of targets; None where num_bytes is."""
        num_bytes = self.num_bytes(split)
        if num_bytes is None:
            return None
        # An array opens with an end of document, which is nobody's target.
        targets = [len(part.tokens[split]) - 1 for part in self.parts if isinstance(part, Corpus)]
        return num_bytes / sum(targets)

    @property
    def batches_per_epoch(self) -> float | None:
        """Batches until every source that can end was seen once; None for tasks."""
        total, longest = sum(self.config.weights), 0.0
        for part, weight in zip(self.parts, self.config.weights, strict=True):
            num_rows = self._part_rows(part, "train", 0).num_rows
            if num_rows is None:
                return None
            longest = max(longest, num_rows * total / weight)
        return longest / self.config.batch_size

    def _part_rows(self, part: Corpus | Task | Digits, split: str, seed: int | None) -> Rows:
        """seed: None gives the rows in order, once."""
        if isinstance(part, Task):
            return part.rows(split, 0 if seed is None else seed)
        if isinstance(part, Digits):
            return part.rows(split, seed)
        key = None if seed is None else key_of("train", part.identity, self.config.seed, seed)
        rows = self._corpus_rows(part, split, key)
        if not self.config.prefix_length:
            return rows
        return PrefixRows(
            rows,
            prefix_length=self.config.prefix_length,
            mask_id=self._mask_id,
            masked=self.config.prefix_masked,
            weight=self.config.prefix_weight,
            key=None if key is None else key_of("masks", int(key)),
        )

    def _corpus_rows(self, part: Corpus, split: str, key: np.uint64 | None) -> Rows:
        seq_len = self.config.seq_len
        if self.config.packing == "documents":
            return PackedDocuments(part, split, seq_len, key)
        if key is None:
            return WindowsInOrder(part, split, seq_len)
        return ShuffledWindows(part, split, seq_len, key)

    def training_rows(self, seed: int) -> Rows:
        """The rows of training under one numbering: batch i is rows i * batch_size and on."""
        rows = [self._part_rows(part, "train", seed) for part in self.parts]
        if len(rows) == 1:
            return rows[0]
        return mixed(rows, self.config.sources, self.config.weights, self.config.seq_len)

    def train_iterator(self, seed: int, *, rows: np.ndarray | None = None) -> Any:
        """A grain iterator of numpy Batches [batch_size, seq_len], without end.

        rows: which rows of every batch are wanted, [n] ascending; None: all. Batches have only
        these then. `get_state()` is a small dict that fits JSON; `set_state()` goes on from it
        exactly, whatever the rows. `close()` it after use.
        """
        import grain

        source = _Batches(self.training_rows(seed), self.config, rows)
        options = grain.ReadOptions(
            num_threads=min(1, self.config.prefetch), prefetch_buffer_size=self.config.prefetch
        )
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def batch_identity(self, index: int, seed: int) -> dict[str, Any]:
        """Where training batch `index` comes from, row by row, and a hash of its tokens.

        index: counts from 0; `get_state()["next_index"] - 1` is the batch that came last.
        """
        rows = self.training_rows(seed)
        numbers = np.arange(self.config.batch_size) + index * self.config.batch_size
        digest = hashlib.sha256(np.ascontiguousarray(rows.batch(numbers).tokens)).hexdigest()
        return {"index": index, "seed": seed, "sha256": digest, "rows": rows.where(numbers)}

    def evaluation_batches(
        self,
        split: str,
        batch_size: int | None = None,
        *,
        rows: np.ndarray | None = None,
    ) -> "EvaluationBatches":
        """The whole of `split` in a fixed order, every target once.

        batch_size: None takes the config's. rows: as in `train_iterator`. The last batch is filled
        up with rows of weight 0. The train split of a task has no end, hence no evaluation.
        """
        check_in("split", split, SPLITS)
        parts = [self._part_rows(part, split, None) for part in self.parts]
        num_rows = [part.num_rows for part in parts if part.num_rows is not None]
        if len(num_rows) < len(parts):
            raise ValueError(f"split: {self.config.source} has no end in {split!r}; use validation")
        whole = parts[0]
        if len(parts) > 1:
            whole = chained(parts, self.config.sources, self.config.seq_len)
        size = self.config.batch_size if batch_size is None else batch_size
        check_at_least("batch_size", size, 1)
        return EvaluationBatches(whole, sum(num_rows), size, rows)


class _Batches:
    """Random access to training batches, as grain wants it."""

    def __init__(self, rows: Rows, config: DataConfig, wanted: np.ndarray | None) -> None:
        self._rows, self._batch_size = rows, config.batch_size
        self._wanted = _wanted_rows(config.batch_size, wanted)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Batch:
        return self._rows.batch(self._wanted + int(index) * self._batch_size)

    def __repr__(self) -> str:  # grain prints its sources
        return f"{type(self._rows).__name__} of {self._batch_size} rows"


def _wanted_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Raises ValueError where a row is none of the batch."""
    if rows is None:
        return np.arange(batch_size, dtype=np.int64)
    if rows.size == 0 or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows: got {rows}, expected some of the {batch_size} rows of a batch")
    return rows.astype(np.int64)


class EvaluationBatches:
    """Batches of a split, from the first row to the last; may be walked more than once."""

    def __init__(
        self, rows: Rows, num_rows: int, batch_size: int, wanted: np.ndarray | None
    ) -> None:
        self._rows, self._num_rows, self._batch_size = rows, num_rows, batch_size
        self._wanted = _wanted_rows(batch_size, wanted)

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self._rows.batch(self._wanted + index * self._batch_size)


def open_dataset(config: DataConfig) -> Dataset:
    """Opens what `config` names, building its cache where there is none yet.

    Raises ValueError, in a sentence that names the field: a file that is missing, a corpus that is
    empty, a sequence longer than a split, and what `DataConfig.check` refuses.
    """
    config.check()
    if config.sources[0] in TASKS:
        return Dataset(config, [Task(name, config) for name in config.sources], None)
    if config.sources[0] in IMAGES:
        return Dataset(config, [Digits(config)], None)
    tokenizer = load_tokenizer(config.tokenizer)
    parts = [open_corpus(source, config, tokenizer) for source in config.sources]
    for source, part in zip(config.sources, parts, strict=True):
        for split in SPLITS:
            if len(part.tokens[split]) < config.seq_len + 1:
                raise ValueError(
                    f"data.seq_len: got {config.seq_len}, but the {split} split of {source!r} has "
                    f"only {len(part.tokens[split])} tokens; a shorter seq_len, more text or "
                    "another validation_fraction is wanted"
                )
    if any(part.manifest["tokenizer"] is None for part in parts):
        return Dataset(config, parts, None)
    return Dataset(config, parts, tokenizer)
