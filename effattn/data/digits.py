"""scikit-learn's copy of the handwritten digits of UCI: 1,797 images of 8 x 8, read offline.

A row is an image: 64 tokens, the intensities 0..16 row by row. Its class is the target at the last
place, the only one that carries a loss weight, so that a causal model too has seen the whole image.
Source: Alpaydin and Kaynak 1998, doi 10.24432/C50P49.
"""

import functools
import hashlib
from typing import Any

import numpy as np

from effattn.batch import Batch
from effattn.checks import check_in
from effattn.data.config import DataConfig
from effattn.data.randomness import key_of, permute
from effattn.data.rows import empty_batch, put_rows, whole_batch

SIDE = 8
INTENSITIES = 17
SPLITS = ("train", "validation")


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [1797, 64], classes int32 [1797])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data.source: got 'digits', which scikit-learn holds, but scikit-learn is not "
            "installed; install effattn[vision]"
        ) from error
    digits = load_digits()
    return digits.data.astype(np.int32), digits.target.astype(np.int32)


class Digits:
    """The digits cut into training and held-out images.

    `validation_examples` images, drawn by `data.seed` alone, are held out; the others come in a new
    order in every epoch. Raises ValueError for a seq_len, a vocab_size or a number of held-out
    images that does not fit, and where scikit-learn is missing.
    """

    vocab_size = INTENSITIES

    def __init__(self, config: DataConfig) -> None:
        tokens, classes = _load()
        check_in("data.seq_len", config.seq_len, [SIDE * SIDE])
        check_in("data.vocab_size", config.vocab_size, [None, INTENSITIES])
        held_out = config.validation_examples
        if held_out >= len(tokens):
            raise ValueError(
                f"data.validation_examples: got {held_out}, expected fewer than the "
                f"{len(tokens)} digits there are"
            )
        index = np.arange(len(tokens))
        order = permute(index, len(index), key_of("digits", config.seed), np.zeros_like(index))
        self.images = {"validation": order[:held_out], "train": order[held_out:]}
        self._tokens, self._classes, self._seed = tokens, classes, config.seed

    @property
    def identity(self) -> str:
        digest = hashlib.sha256(self._tokens.tobytes() + self._classes.tobytes())
        digest.update(self.images["validation"].astype("<i8").tobytes())
        return digest.hexdigest()

    def num_bytes(self, split: str) -> int | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {"images": {split: len(self.images[split]) for split in SPLITS}}

    def rows(self, split: str, seed: int | None) -> "DigitRows":
        """seed: None gives the images in order, once; else epochs of shuffled images."""
        key = None if seed is None else key_of("digits", split, self._seed, seed)
        return DigitRows(self, split, key)

    def batch(self, images: np.ndarray) -> Batch:
        """The images of these numbers, in the order of scikit-learn."""
        tokens = self._tokens[images]
        targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        targets[:, -1], weights[:, -1] = self._classes[images], 1.0
        return whole_batch(tokens, targets, weights)


class DigitRows:
    """The images of a split by row number."""

    def __init__(self, digits: Digits, split: str, key: np.uint64 | None) -> None:
        self._digits, self._split, self._key = digits, split, key
        self._images = digits.images[split]
        self.num_rows = len(self._images)

    def _numbers(self, index: np.ndarray) -> np.ndarray:
        if self._key is None:
            return self._images[index]
        epoch, place = np.divmod(index, self.num_rows)
        return self._images[permute(place, self.num_rows, self._key, epoch)]

    def batch(self, index: np.ndarray) -> Batch:
        if self._key is not None:
            return self._digits.batch(self._numbers(index))
        batch = empty_batch(len(index), SIDE * SIDE)
        inside = np.flatnonzero(index < self.num_rows)
        put_rows(batch, inside, self._digits.batch(self._numbers(index[inside])))
        return batch

    def where(self, index: np.ndarray) -> list[dict[str, Any]]:
        return [{"split": self._split, "image": int(image)} for image in self._numbers(index)]
