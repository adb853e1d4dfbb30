"""Block sizes of the kernels per chip, each row with the command that chose it.

All figures behind this table are static (issue cycles of compiled code, no device): batch 1,
seq_len 4096, 8 heads of 128, bfloat16, causal; libtpu 0.0.51, jax 0.12.0.1, 2026-11-21.
"""

from dataclasses import dataclass

from effattn.checks import check_multiple

LANES = 128


@dataclass(frozen=True)
class FlashTiles:
    """How a TPU flash kernel cuts its logits.

    q, kv: queries and keys that one grid step brings in. Inside a step the logits are worked on in
    pieces of `strip` queries and up to `piece` keys; what a mask empties is left out in units of
    `strip` by `strip`. pipeline: pieces whose logits are begun before the oldest one's softmax, so
    that the matrix units work through it.
    """

    q: int
    kv: int
    strip: int
    piece: int
    gathered: int
    pipeline: int

    def __post_init__(self) -> None:
        for name in ("q", "kv", "strip", "piece", "gathered"):
            check_multiple(f"FlashTiles.{name}", getattr(self, name), "lanes of a TPU", LANES)


@dataclass(frozen=True)
class FlashTuning:
    """forward, backward: the tiles of the two passes. vmem: bytes a kernel may ask for."""

    forward: FlashTiles
    backward: FlashTiles
    vmem: int


MIB = 2**20
_BACKWARD = FlashTiles(1024, 1024, 256, 512, 1024, 1)
# effattn bench --static --kernel flash --chip v5e,v5p,v6e
_FLASH = {
    "TPU v5 lite": FlashTuning(FlashTiles(1024, 1024, 256, 512, 1024, 3), _BACKWARD, 100 * MIB),
    "TPU v5": FlashTuning(FlashTiles(1024, 1024, 256, 512, 1024, 3), _BACKWARD, 52 * MIB),
    "TPU v6 lite": FlashTuning(FlashTiles(1024, 1024, 256, 512, 1024, 4), _BACKWARD, 100 * MIB),
}
# A chip that is not in the table has at least this much.
_UNKNOWN = FlashTuning(FlashTiles(1024, 1024, 256, 512, 1024, 3), _BACKWARD, 52 * MIB)


def flash_tuning(kind: str) -> FlashTuning:
    """The row of a TPU by jax's `device_kind`."""
    return _FLASH.get(kind, _UNKNOWN)


@dataclass(frozen=True)
class LinearTuning:
    """How the TPU kernels of linear attention cut their work.

    chunk: tokens of a grid step, worked on in pieces of `strip` queries. heads: value heads of a
    step, at least. pipeline: pieces that are begun before the oldest one is finished, so that the
    matrix units work on one while the vector units are at another. vmem: bytes a kernel may ask
    for.
    """

    chunk: int
    strip: int
    heads: int
    pipeline: int
    vmem: int

    def __post_init__(self) -> None:
        check_multiple("LinearTuning.chunk", self.chunk, "lanes of a TPU", LANES)


# effattn bench --static --kernel linear --chip v5e,v5p,v6e
_LINEAR = {
    "TPU v5 lite": LinearTuning(256, 128, 16, 8, 100 * MIB),
    "TPU v5": LinearTuning(256, 128, 16, 8, 52 * MIB),
    "TPU v6 lite": LinearTuning(256, 256, 16, 8, 100 * MIB),
}


def linear_tuning(kind: str) -> LinearTuning:
    """The row of a TPU by jax's `device_kind`."""
    return _LINEAR.get(kind, LinearTuning(256, 128, 16, 8, 52 * MIB))
