"""n-gram baselines against a slow dictionary implementation; compressors; the kept result."""

import lzma
import math
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from effattn.data.baselines import baselines, compressor_bits_per_byte, n_gram_bits_per_byte
from effattn.data.config import DataConfig
from effattn.data.pipeline import open_dataset


def slow_witten_bell(train: list[int], validation: list[int], order: int) -> float:
    """The definition, one symbol at a time."""
    counts = defaultdict(Counter)
    for length in range(order + 1):
        for i in range(length, len(train)):
            counts[tuple(train[i - length : i])][train[i]] += 1

    def probability(context: tuple[int, ...], symbol: int) -> float:
        shorter = probability(context[1:], symbol) if context else 1 / 257
        if context not in counts:
            return shorter
        seen = counts[context]
        return (seen[symbol] + len(seen) * shorter) / (seen.total() + len(seen))

    bits = 0.0
    for i in range(int(validation[0] == 256), len(validation)):
        context = tuple(validation[max(0, i - order) : i])
        bits -= math.log2(probability(context, validation[i]))
    return bits / sum(symbol < 256 for symbol in validation)


def text(seed: int, size: int, ends: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = [rng.integers(97, 105, rng.integers(1, 5)) for _ in range(12)]
    symbols = np.concatenate([np.append(words[i], 32) for i in rng.integers(0, 12, size)])
    if ends:
        symbols[rng.random(len(symbols)) < 0.02] = 256
        symbols[0] = symbols[-1] = 256
    # Symbols that the other text lacks, at the top of the alphabet as well.
    symbols[5 + seed] = 255 - seed
    return symbols.astype(np.uint16)


@pytest.mark.parametrize("ends", [False, True])
def test_n_grams_equal_the_slow_definition(ends):
    train, validation = text(0, 300, ends), text(1, 60, ends)
    validation = np.concatenate([validation, train[-40:]])
    result = n_gram_bits_per_byte(train, validation)
    assert list(result) == [0, 1, 2, 3, 4, 5]
    for order, value in result.items():
        slow = slow_witten_bell(train.tolist(), validation.tolist(), order)
        assert value == pytest.approx(slow, rel=1e-12)


def test_orders_do_not_depend_on_which_others_are_asked():
    train, validation = text(0, 200, True), text(1, 50, True)
    every = n_gram_bits_per_byte(train, validation)
    assert n_gram_bits_per_byte(train, validation, [2]) == pytest.approx({2: every[2]})
    assert n_gram_bits_per_byte(train, validation, [0, 4]).keys() == {0, 4}


@pytest.mark.parametrize("train, validation", [(b"a", b"b"), (b"ab", b"a"), (b"abc" * 5, b"\xff")])
def test_tiny_texts(train, validation):
    for order, value in n_gram_bits_per_byte(train, validation).items():
        assert value == pytest.approx(slow_witten_bell(list(train), list(validation), order))


def test_bad_texts_are_refused():
    with pytest.raises(ValueError, match="train: got no bytes"):
        n_gram_bits_per_byte(b"", b"x")
    with pytest.raises(ValueError, match="validation: got symbols"):
        n_gram_bits_per_byte(b"x", np.asarray([1, 300]))
    with pytest.raises(ValueError, match="orders: got 6"):
        n_gram_bits_per_byte(b"x", b"x", [6])


def test_compressors_see_the_text_alone():
    content = b"to be or not to be " * 50
    figures = compressor_bits_per_byte(content)
    assert zlib.decompress(zlib.compress(content, 9)) == content
    assert figures["zlib -9"] == 8 * len(zlib.compress(content, 9)) / len(content)
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    assert figures["lzma -9e"] == 8 * len(packed) / len(content)


def test_baselines_of_a_dataset_are_kept(tmp_path, monkeypatch):
    for number in range(40):
        words = text(number, 150, False)
        (tmp_path / f"{number}.txt").write_bytes(words.astype(np.uint8).tobytes())
    config = DataConfig(
        source=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2
    )
    dataset = open_dataset(config)
    first = baselines(dataset)
    assert first.validation_bytes == dataset.num_bytes("validation")
    assert first.train_bytes == dataset.num_bytes("train")
    tokens = dataset.parts[0].tokens
    slow = slow_witten_bell(tokens["train"].tolist(), tokens["validation"].tolist(), 2)
    assert first.bits_per_byte["n-gram, order 2"] == pytest.approx(slow)
    assert len(first.bits_per_byte) == 8 == len(first.table().splitlines())

    def must_not_count(*args):
        raise AssertionError("counted again")

    monkeypatch.setattr("effattn.data.baselines.n_gram_bits_per_byte", must_not_count)
    assert baselines(open_dataset(config)) == first


def test_what_is_not_bytes_has_no_baselines(tmp_path):
    assert baselines(open_dataset(DataConfig(source="copy"))) is None
    np.save(tmp_path / "x.npy", np.arange(3000))
    config = DataConfig(source=str(tmp_path / "x.npy"), cache_dir=str(tmp_path), seq_len=16)
    assert baselines(open_dataset(config)) is None
