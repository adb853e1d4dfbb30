"""Prints what a batch costs to make and to wait for, per kind of data, and where it was measured.

Usage: python scripts/data_throughput.py [batch_size] [seq_len]
"""

import platform
import sys
import time
from collections.abc import Callable

import numpy as np

from effattn.data.config import DataConfig
from effattn.data.pipeline import open_dataset

KINDS = {
    "stream": {},
    "documents": {"packing": "documents"},
    "mixture": {"mixture": ("stdlib", "stdlib"), "mixture_weights": (0.7, 0.3)},
    "mqar": {"source": "mqar"},
    "copy": {"source": "copy"},
}
COUNT = 300


def median_us(call: Callable[[int], object], pause: float = 0.0) -> float:
    times = []
    for index in range(COUNT):
        time.sleep(pause)  # as a train step would, so that the thread reads ahead
        start = time.perf_counter()
        call(index)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


def main() -> None:
    batch_size, seq_len = (*map(int, sys.argv[1:]), *(8, 256)[len(sys.argv) - 1 :])
    print(f"{platform.machine()}, numpy {np.__version__}, batch {batch_size} x {seq_len}")
    for name, fields in KINDS.items():
        dataset = open_dataset(DataConfig(batch_size=batch_size, seq_len=seq_len, **fields))
        rows, numbers = dataset.training_rows(0), np.arange(batch_size)
        make = median_us(lambda i, r=rows, n=numbers: r.batch(n + i * batch_size))
        iterator = dataset.train_iterator(0)
        wait = median_us(lambda _, it=iterator: next(it), pause=0.005)
        iterator.close()
        print(f"{name:10} make {make:6.0f} us, wait {wait:6.0f} us")


if __name__ == "__main__":
    main()
