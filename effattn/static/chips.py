"""The TPU chips that libtpu compiles for with none present, and what bounds a kernel there.

Peak bfloat16 FLOP per cycle are read off compiled code; the clock is the published peak over that.
"""

from dataclasses import dataclass

from effattn.checks import check_in


@dataclass(frozen=True)
class Chip:
    """One TensorCore of a chip, and the smallest topology that libtpu knows it in.

    num_cores: TensorCores that share the HBM. device_cores: those that one jax device spans.
    """

    name: str
    device_kind: str
    topology: str
    accelerator_type: str
    clock_ghz: float
    flop_per_cycle: int
    num_cores: int
    device_cores: int
    hbm_gb_per_s: float

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """One core's share."""
        return self.hbm_gb_per_s / self.clock_ghz / self.num_cores


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "v5e:2x2", "v5litepod-4", 1.5, 2**17, 1, 1, 819.0),
        Chip("v5p", "TPU v5", "v5p:2x2x1", "v5p-8", 1.75, 2**17, 2, 2, 2765.0),
        Chip("v6e", "TPU v6 lite", "v6e:2x2", "v6e-4", 1.75, 2**19, 1, 1, 1640.0),
        Chip("tpu7x", "TPU7x", "tpu7x:2x2x1", "tpu7x-8", 2.2, 2**19, 2, 1, 7380.0),
    )
}


def chip_of(name: str) -> Chip:
    """The chip of a name ("v5e") or of a topology ("v5e:2x2"). Raises ValueError if unknown."""
    short = name.split(":")[0]
    check_in("chip", short, CHIPS)
    return CHIPS[short]
