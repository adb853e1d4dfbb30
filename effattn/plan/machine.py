"""The machines that a plan can be counted for: TPU topologies, and nodes of NVIDIA GPUs.

"h100:8x4" is 8 GPUs on a node, 4 nodes. No compiler for GPUs is at hand, so their plans are
analytic alone.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from effattn.plan.topology import KNOWN, topology_of


class Gpu(NamedTuple):
    """kind: as jax names it. bf16_tflops: dense. hbm_gb, hbm_gb_per_s, nvlink_gb_per_s (both ways
    together): in 10^9. network_gbit_per_s: of the node's network adapters, for one GPU."""

    kind: str
    bf16_tflops: float
    hbm_gb: float
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    network_gbit_per_s: float


# NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (dense bf16 without
# sparsity), and of the DGX systems around them: one adapter for each GPU, of 200 Gb/s (A100) or
# 400 Gb/s (the others).
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 312, 80, 2039, 600, 200),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 989, 80, 3350, 900, 400),
    "h200": Gpu("NVIDIA H200", 989, 141, 4800, 900, 400),
    "b200": Gpu("NVIDIA B200", 2250, 180, 8000, 1800, 400),
}
_SHAPE = re.compile(r"(\d+)(?:x(\d+))?")


@dataclass(frozen=True)
class Machine:
    """Of one jax device: peak FLOP/s in bfloat16, bytes of memory and what it moves in a second.

    links: bytes per second that it receives from devices beside it, by a collective; permute: by a
    permutation. network: from those further away. near: devices that links join, `devices` in all.
    """

    name: str
    platform: str
    kind: str
    devices: int
    near: int
    flops: float
    memory: int
    memory_speed: float
    links: float
    permute: float
    network: float


def is_gpu(topology: str) -> bool:
    return topology.split(":")[0].lower() in GPUS


def machine_of(topology: str, num_slices: int = 1) -> Machine:
    """Raises ValueError that lists what is known."""
    if is_gpu(topology):
        return _gpus(topology, num_slices)
    if topology.split(":")[0].split("-")[0].lower() not in (*KNOWN, "v5litepod"):
        shapes = "; ".join(f"{name}:{', '.join(shapes)}" for name, shapes in KNOWN.items())
        gpus = ", ".join(f"{name}:8x4" for name in GPUS)
        raise ValueError(
            f"--topology: got {topology!r}, expected one of {shapes}; or GPUs on a node x nodes, "
            f"like {gpus}"
        )
    found = topology_of(topology, num_slices)
    chip = found.chip
    return Machine(
        name=found.name,
        platform="tpu",
        kind=chip.device_kind,
        devices=found.devices,
        near=found.devices // num_slices,
        flops=chip.bf16_tflops * 1e12 / chip.devices,
        memory=int(chip.hbm_gib * 2**30 / chip.devices),
        memory_speed=chip.hbm_gb_per_s * 1e9 / chip.devices,
        # Collectives go round a torus axis both ways, a permutation takes one link one way.
        links=2 * chip.link_bytes_per_second,
        permute=chip.link_bytes_per_second,
        network=chip.network_gb_per_s * 1e9,
    )


def _gpus(topology: str, num_slices: int) -> Machine:
    name, _, shape = topology.partition(":")
    found = _SHAPE.fullmatch(shape)
    if found is None or 0 in (int(found[1]), int(found[2] or 1)):
        raise ValueError(
            f"--topology: got {topology!r}, expected GPUs on a node x nodes, like {name}:8x4"
        )
    if num_slices != 1:
        raise ValueError(
            f"--num-slices: got {num_slices}, expected 1 with GPUs: {name}:8x{num_slices} says how "
            "many nodes there are"
        )
    gpu = GPUS[name.lower()]
    near, nodes = int(found[1]), int(found[2] or 1)
    one_way = gpu.nvlink_gb_per_s * 1e9 / 2
    return Machine(
        name=f"{name.lower()}:{near}x{nodes}",
        platform="gpu",
        kind=gpu.kind,
        devices=near * nodes,
        near=near,
        flops=gpu.bf16_tflops * 1e12,
        # A GPU has 2^30 where the data sheet says GB: what that leaves out, 7 %, is room for the
        # driver, NCCL and fragmentation.
        memory=int(gpu.hbm_gb * 1e9),
        memory_speed=gpu.hbm_gb_per_s * 1e9,
        links=one_way,
        permute=one_way,
        network=gpu.network_gbit_per_s * 1e9 / 8,
    )
