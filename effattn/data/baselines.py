"""What simpler predictors reach on the same held-out bytes: n-grams, zlib, lzma."""

import json
import lzma
import os
import uuid
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from effattn.checks import check_in
from effattn.data.corpus import Corpus
from effattn.data.pipeline import Dataset
from effattn.data.tokenizer import ByteTokenizer

MAX_ORDER = 5
_ALPHABET = 257  # the bytes and the end of a document
_WIDTH = 9  # bits of a symbol inside a packed n-gram
_NOBODY = (1 << _WIDTH) - 1  # stands after the last symbol, and is none
_TRAIN_LIMIT = 1 << 26
_FORMAT = 1


@dataclass(frozen=True)
class Baselines:
    """bits_per_byte: name -> figure, on `validation_bytes` held-out bytes.

    The n-grams are counted on train_bytes bytes of the train split and, like the model, pay for
    the ends of documents; the compressors see the held-out text alone, joined.
    """

    train_bytes: int
    validation_bytes: int
    bits_per_byte: dict[str, float]

    def table(self) -> str:
        """The figures as lines of text, one a line, names aligned."""
        width = max(map(len, self.bits_per_byte))
        return "\n".join(f"{k:{width}}  {v:.3f}" for k, v in self.bits_per_byte.items())


def n_gram_bits_per_byte(
    train: bytes | np.ndarray,
    validation: bytes | np.ndarray,
    orders: Iterable[int] = range(MAX_ORDER + 1),
) -> dict[int, float]:
    """Bits per byte of `validation` under n-gram models counted on `train`, by order.

    train, validation: bytes, or integer arrays of bytes and 256 (the end of a document), [n]. A 256
    that opens `validation` is context only; every other symbol is predicted, ends too, and the
    bits are divided by the number of bytes alone.

    Interpolated Witten-Bell smoothing (Witten and Bell 1991, method C). With c(h w) the count of
    symbol w after context h of `order` symbols, c(h) their sum and T(h) the number of different w:

        p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),    h' = h less its oldest symbol,

    down to the uniform 1 / 257; where c(h) = 0, p(w | h) = p(w | h'). Contexts run over the ends
    of documents; a symbol with fewer than `order` before it uses what there is.
    """
    orders = list(orders)
    for order in orders:
        check_in("orders", order, range(MAX_ORDER + 1))
    train, validation = _symbols("train", train), _symbols("validation", validation)
    targets = np.arange(int(validation[0] == 256), len(validation))
    longest = max(orders, default=0) + 1

    # Packed with the oldest symbol highest, the sorted n-grams are sorted by every prefix too:
    # this one sort serves all orders.
    grams = np.sort(_pack(train, longest))
    probability = np.full(len(targets), 1 / _ALPHABET)
    result = {}
    for order in range(longest):
        shorter = grams >> (_WIDTH * (longest - 1 - order))
        first_of_kind = np.append(True, shorter[1:] != shorter[:-1])
        kinds = shorter[first_of_kind]
        kinds = kinds[(kinds & _NOBODY) < _ALPHABET]

        inside = targets >= order
        wanted = _pack(validation, order + 1)[targets[inside] - order]
        context = wanted >> _WIDTH << _WIDTH
        count = _below(shorter, wanted + 1) - _below(shorter, wanted)
        total = _below(shorter, context + _ALPHABET) - _below(shorter, context)
        different = _below(kinds, context + _ALPHABET) - _below(kinds, context)
        backed_off = probability[inside]
        probability[inside] = np.where(
            total > 0,
            (count + different * backed_off) / np.maximum(total + different, 1),
            backed_off,
        )
        if order in orders:
            result[order] = float(-np.log2(probability).sum() / (validation < 256).sum())
    return result


def _symbols(name: str, text: bytes | np.ndarray) -> np.ndarray:
    symbols = np.frombuffer(text, np.uint8) if isinstance(text, bytes) else text.reshape(-1)
    if not len(symbols) or not (symbols < 256).any():
        raise ValueError(f"{name}: got no bytes, expected at least one")
    if symbols.min() < 0 or symbols.max() >= _ALPHABET:
        raise ValueError(
            f"{name}: got symbols {symbols.min()}..{symbols.max()}, expected bytes and 256"
        )
    return symbols


def _pack(symbols: np.ndarray, length: int) -> np.ndarray:
    """int64 [n]: the `length` symbols from each place on, the first in the highest bits."""
    padded = np.append(symbols.astype(np.int64), np.full(length - 1, _NOBODY))
    packed = np.zeros(len(symbols), np.int64)
    for ahead in range(length):
        packed <<= _WIDTH
        packed |= padded[ahead : ahead + len(symbols)]
    return packed


def _below(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many of `rising` are below each value."""
    return np.searchsorted(rising, values, "left")


def compressor_bits_per_byte(text: bytes) -> dict[str, float]:
    """zlib at level 9 and lzma at preset 9 | EXTREME (the .xz format), headers included."""
    packed = {
        "zlib -9": zlib.compress(text, 9),
        "lzma -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}


def baselines(dataset: Dataset) -> Baselines | None:
    """The figures for a dataset's validation split; None unless its tokens are bytes.

    At most the first 64 Mi tokens of train are counted. Kept beside the corpus, by the dataset's
    identity, so that a second run only reads them.
    """
    parts = [part for part in dataset.parts if isinstance(part, Corpus)]
    is_bytes = isinstance(dataset.tokenizer, ByteTokenizer)
    if not parts or not is_bytes or dataset.num_bytes("validation") is None:
        return None
    kept = dataset.config.cache_path / f"baselines-{_FORMAT}-{dataset.identity[:16]}.json"
    with suppress(OSError, ValueError, TypeError):
        return Baselines(**json.loads(kept.read_text()))
    train = np.concatenate([part.tokens["train"][:_TRAIN_LIMIT] for part in parts])[:_TRAIN_LIMIT]
    validation = np.concatenate([part.tokens["validation"] for part in parts])
    text = validation[validation < 256].astype(np.uint8).tobytes()
    figures = {
        f"n-gram, order {order}": value
        for order, value in n_gram_bits_per_byte(train, validation).items()
    }
    figures |= compressor_bits_per_byte(text)
    result = Baselines(int((train < 256).sum()), len(text), figures)
    _keep(result, kept)
    return result


def _keep(result: Baselines, path: Path) -> None:
    # Not being able to keep it only costs the next run its seconds.
    with suppress(OSError):
        written = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        written.write_text(json.dumps(asdict(result), indent=1))
        os.replace(written, path)
