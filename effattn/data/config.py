"""What a run reads: the fields of `--config.data`. The reading itself begins in `pipeline.py`."""

import os
from dataclasses import dataclass
from pathlib import Path

from effattn.checks import check_at_least, check_in, check_same_length

TASKS = ("mqar", "copy", "induction", "set_disjointness")
IMAGES = ("digits",)
PACKINGS = ("stream", "documents")
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32")


@dataclass(kw_only=True)
class DataConfig:
    """A corpus or a synthetic task, and how it is cut into batches.

    source: "stdlib" (the running Python's standard library), a file, a folder, a glob, the same
      at `gs://` or `s3://`, or a synthetic task: "mqar", "copy", "induction", "set_disjointness",
      or the images "digits" of scikit-learn. By its ending a file is JSON lines (.jsonl), a token
      array (.npy, .bin), ArrayRecord (.array_record), else text.
    packing: "stream" takes windows of the concatenated documents; "documents" packs whole
      documents (cut at seq_len) into rows, with positions and segment ids of their own.
    mixture: sources that take the place of `source`; a batch's rows are drawn from them in the
      proportions of mixture_weights (None of them: equal parts).
    """

    source: str = "stdlib"
    mixture: tuple[str, ...] = ()
    mixture_weights: tuple[float, ...] = ()
    batch_size: int = 8  # rows, over all hosts
    seq_len: int = 256
    packing: str = "stream"
    validation_fraction: float = 0.03  # of a corpus's bytes
    seed: int = 0  # stirred into the training order; alone sets the synthetic validation set
    cache_dir: str | None = None  # None: $EFFATTN_CACHE, else ~/.cache/effattn
    prefetch: int = 4  # batches made ahead by one thread; 0 makes them when asked

    tokenizer: str = "bytes"  # or "utf8", or a file of the `tokenizers` package (tokenizer.json)
    field: str | None = None  # JSON lines: the field that holds the text
    token_dtype: str | None = None  # .bin: must be stated; ArrayRecord: None means text
    end_of_document: int | None = None  # token arrays: the id that ends a document, where one does

    # Corpora: first tokens of a document without a loss for the next token, of which a share is
    # masked by an id beyond the vocabulary and to be found; they weigh so much beside the others.
    prefix_length: int = 0
    prefix_masked: float = 0.15
    prefix_weight: float = 0.25

    vocab_size: int | None = None  # None: 512 for a task; for token arrays, what they need
    num_pairs: int = 16  # mqar
    power_a: float = 0.01  # mqar: the smaller, the closer the queries stand behind the pairs
    # set_disjointness: sizes of the first and the second set, or of several pairs, one after
    # another, from which every row draws one; whether each set has tokens of its own but for the
    # common one; and how often a row shows both, in this order, before the answer
    set_sizes: tuple[int, ...] = (8, 32)
    set_halves: bool = True
    set_times: int = 1
    validation_examples: int = 1000  # tasks and images

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.mixture) if self.mixture else (self.source,)

    @property
    def weights(self) -> tuple[float, ...]:
        """One weight per entry of `sources`."""
        return tuple(self.mixture_weights) if self.mixture_weights else (1.0,) * len(self.sources)

    @property
    def cache_path(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        fallback = Path.home() / ".cache" / "effattn"
        return Path(os.environ.get("EFFATTN_CACHE", fallback)).expanduser()

    def check(self) -> None:
        """Raises ValueError where a field cannot hold, naming it as the command line does."""
        check_in("data.packing", self.packing, PACKINGS)
        for name, least in (("batch_size", 1), ("seq_len", 1), ("prefetch", 0), ("num_pairs", 1)):
            check_at_least(f"data.{name}", getattr(self, name), least)
        check_at_least("data.validation_examples", self.validation_examples, 1)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction: got {self.validation_fraction}, expected a share "
                "above 0 and below 1"
            )
        if not 0 <= self.prefix_length < self.seq_len:
            raise ValueError(
                f"data.prefix_length: got {self.prefix_length}, expected at least 0 and less than "
                f"data.seq_len={self.seq_len}: what comes after the prefix is what is scored"
            )
        if not 0 < self.prefix_masked < 1 or not self.prefix_weight >= 0:
            raise ValueError(
                f"data.prefix_masked, data.prefix_weight: got {self.prefix_masked} and "
                f"{self.prefix_weight}, expected a share above 0 and below 1, and at least 0"
            )
        if self.token_dtype is not None:
            check_in("data.token_dtype", self.token_dtype, TOKEN_DTYPES)
        if self.mixture_weights:
            check_same_length(
                "data.mixture_weights", self.mixture_weights, len(self.sources), "data.mixture"
            )
        if any(not weight > 0 for weight in self.weights):
            raise ValueError(f"data.mixture_weights: got {self.weights}, expected all above 0")
        images = [source for source in self.sources if source in IMAGES]
        if images and len(self.sources) > 1:
            raise ValueError(f"data.mixture: {images[0]!r} are images, which stand alone")
        tasks = [source for source in self.sources if source in TASKS]
        if self.prefix_length and (tasks or images):
            raise ValueError(
                f"data.prefix_length: got {self.prefix_length}, but {self.sources[0]!r} says by "
                "itself where its answers are; expected 0"
            )
        if tasks and len(tasks) < len(self.sources):
            raise ValueError(
                f"data.mixture: {tasks[0]!r} is a synthetic task, whose ids mean something else "
                "than text; mix tasks with tasks and corpora with corpora"
            )
