"""Names of TPU topologies: "v5p:4x4x8", or as clouds count them, "v5p-256" (TensorCores)."""

import math
import re
from typing import NamedTuple

from effattn.static.chips import CHIPS, Chip

# Shapes that libtpu compiles for, by chip. v5e and v6e are planes of up to 256 chips.
_PLANES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip
KNOWN = {"v5e": _PLANES, "v6e": _PLANES, "v5p": _CUBES, "tpu7x": _CUBES}
_ALIASES = {"v5litepod": "v5e"}


class Topology(NamedTuple):
    """chips, devices: over all slices."""

    name: str
    chip: Chip
    num_slices: int
    chips: int
    devices: int


def topology_of(name: str, num_slices: int = 1) -> Topology:
    """Raises ValueError that lists the known ones.

    "v5e-256" and "v6e-256" count chips, "v5p-256" TensorCores, two on a chip, "tpu7x-256" chips.
    """
    if num_slices < 1:
        raise ValueError(f"--num-slices: got {num_slices}, expected 1 or more")
    short, _, shape = name.replace(":", "-", 1).partition("-")
    short = _ALIASES.get(short.lower(), short.lower())
    if short not in KNOWN:
        raise ValueError(f"--topology: got {name!r}, expected one of {_listed()}")
    if shape.isdigit():
        chips = int(shape) // 2 if short == "v5p" else int(shape)
        fitting = [s for s in KNOWN[short] if math.prod(map(int, s.split("x"))) == chips]
        if not fitting:
            raise ValueError(f"--topology: got {name!r}, expected one of {_listed()}")
        shape = fitting[0]
    dims = CHIPS[short].dims
    if not re.fullmatch("x".join([r"\d+"] * dims), shape) or not _possible(short, shape):
        raise ValueError(f"--topology: got {name!r}, expected one of {_listed()}")
    chips = math.prod(map(int, shape.split("x"))) * num_slices
    chip = CHIPS[short]
    return Topology(f"{short}:{shape}", chip, num_slices, chips, chips * chip.devices)


def _possible(short: str, shape: str) -> bool:
    """Listed, or a cube whose sides are multiples of 4 up to 16, in rising order."""
    if shape in KNOWN[short]:
        return True
    sides = [int(n) for n in shape.split("x")]
    cube = CHIPS[short].dims == 3
    return cube and sides == sorted(sides) and all(n % 4 == 0 and 4 <= n <= 16 for n in sides)


def _listed() -> str:
    return "; ".join(f"{name}:{', '.join(shapes)}" for name, shapes in KNOWN.items())
