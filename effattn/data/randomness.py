"""Random numbers by counter: the n-th is found without the n - 1 before it.

That is what makes a loader's state one integer: every draw is a hash of (key, index), so any
batch can be made again, on any host, in any order.
"""

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=256)
def key_of(*parts: int | str) -> np.uint64:
    """A 64-bit key that names a stream of draws; other parts, an unrelated stream."""
    return np.uint64(int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big"))


def _mix(x: Any) -> Any:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), a bijection of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(key: np.uint64, index: np.ndarray, count: int) -> np.ndarray:
    """uint64 [len(index), count]: `count` draws for every index, each row SplitMix64 of its own."""
    with np.errstate(over="ignore"):
        start = _mix(key + _mix(index.astype(np.uint64) * _GOLDEN))
        return _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def uniform(key: np.uint64, index: np.ndarray, count: int) -> np.ndarray:
    """float64 [len(index), count] in [0, 1)."""
    return (bits(key, index, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(key: np.uint64, index: np.ndarray, count: int, high: int) -> np.ndarray:
    """int64 [len(index), count] in [0, high), high <= 2**31."""
    draws = bits(key, index, count) >> np.uint64(32)
    return ((draws * np.uint64(high)) >> np.uint64(32)).astype(np.int64)


def permute(index: np.ndarray, size: int, key: np.uint64, epoch: np.ndarray) -> np.ndarray:
    """int64 like `index`: where a random order of range(size) puts each index; one per epoch.

    index, epoch: int64 [n], index < size. A Feistel network over the next power of two, walked
    on while it leaves the range (Black and Rogaway 2002): no table, whatever the size.
    """
    width = max(1, (size - 1).bit_length())
    low_width = np.uint64((width + 1) // 2)
    low_mask = np.uint64((1 << int(low_width)) - 1)
    high_mask = np.uint64((1 << (width - int(low_width))) - 1)
    result = index.astype(np.uint64)
    outside = np.ones(len(index), bool)
    with np.errstate(over="ignore"):
        keys = _mix(key + epoch.astype(np.uint64) * _GOLDEN)
        while outside.any():
            high, low = result[outside] >> low_width, result[outside] & low_mask
            round_key = keys[outside]
            for _ in range(3):
                round_key = round_key + _GOLDEN
                high = high ^ (_mix(round_key + low) & high_mask)
                round_key = round_key + _GOLDEN
                low = low ^ (_mix(round_key ^ (high << np.uint64(32))) & low_mask)
            result[outside] = (high << low_width) | low
            outside = result >= size
    return result.astype(np.int64)
