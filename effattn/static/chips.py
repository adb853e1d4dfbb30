"""The TPU chips that libtpu compiles for with none present, and what bounds a kernel there.

Peak bfloat16 FLOP per cycle are read off compiled code; the clock is the published peak over that.
Peaks per chip: Google's Cloud TPU documentation, pages v5e, v5p, v6e and TPU7x; the share of a
v5e in its pod's network is 6.4 Tb/s over 256. Ports: 4 in a plane, 6 in a cube (inferred).
"""

from dataclasses import dataclass

from effattn.checks import check_in


@dataclass(frozen=True)
class Chip:
    """One TensorCore of a chip, and the smallest topology that libtpu knows it in.

    num_cores: TensorCores that share the HBM. device_cores: those that one jax device spans.
    Of a whole chip: bf16_tflops; hbm_gib; links_gb_per_s, all ports and both ways, and ports;
    network_gb_per_s, to other slices. dims: of its torus.
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
    bf16_tflops: float
    hbm_gib: float
    links_gb_per_s: float
    ports: int
    network_gb_per_s: float
    dims: int

    @property
    def devices(self) -> int:
        """jax devices on a chip."""
        return self.num_cores // self.device_cores

    @property
    def link_bytes_per_second(self) -> float:
        """Of one link, one way."""
        return self.links_gb_per_s * 1e9 / 2 / self.ports

    @property
    def hbm_bytes_per_cycle(self) -> float:
        """One core's share."""
        return self.hbm_gb_per_s / self.clock_ghz / self.num_cores


# fmt: off
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", "v5e:2x2", "v5litepod-4", 1.5, 2**17, 1, 1, 819.0,
             197, 16, 400, 4, 3.125, 2),
        Chip("v5p", "TPU v5", "v5p:2x2x1", "v5p-8", 1.75, 2**17, 2, 2, 2765.0,
             459, 95, 1200, 6, 6.25, 3),
        Chip("v6e", "TPU v6 lite", "v6e:2x2", "v6e-4", 1.75, 2**19, 1, 1, 1640.0,
             918, 32, 800, 4, 12.5, 2),
        Chip("tpu7x", "TPU7x", "tpu7x:2x2x1", "tpu7x-8", 2.2, 2**19, 2, 1, 7380.0,
             2307, 192, 1200, 6, 12.5, 3),
    )
}
# fmt: on


def chip_of(name: str) -> Chip:
    """The chip of a name ("v5e") or of a topology ("v5e:2x2"). Raises ValueError if unknown."""
    short = name.split(":")[0]
    check_in("chip", short, CHIPS)
    return CHIPS[short]
