"""Kernels for an NVIDIA Hopper GPU that is not here: lowered, and compiled where that can be done.

jax's CUDA plugin compiles for a described GPU: lowering, LLVM, ptxas. It needs no device and no
CUDA libraries, but jax-cuda13-plugin and jax-cuda13-pjrt (or the same for CUDA 12) of jax's own
version, and `ptxas` on PATH. Without them a kernel is lowered, which already refuses bad tiles and
too much shared memory. Nothing here is a time: it says what a kernel takes of a multiprocessor.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from effattn.checks import check_in

TIMEOUT = 600.0


@dataclass(frozen=True)
class Gpu:
    """A Hopper GPU as the compiler wants it described."""

    name: str
    device_kind: str
    memory_bytes: int
    bytes_per_s: int

    def target_config(self) -> str:
        """The fields of XLA's GpuTargetConfigProto, as text."""
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.device_kind}"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 13 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
              core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
              threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              shared_memory_per_core: 233472  shared_memory_per_block: 49152
              shared_memory_per_block_optin: 232448
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              l2_cache_size: 52428800
              device_memory_size: {self.memory_bytes}
              memory_bandwidth: {self.bytes_per_s}
            }}"""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "NVIDIA H100", 84978434048, 3352320000000),
        Gpu("h200", "NVIDIA H200", 149000000000, 4800000000000),
    )
}


@dataclass(frozen=True)
class GpuKernel:
    """What ptxas says of one kernel; spills in bytes."""

    name: str
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_memory_bytes: int | None


@dataclass(frozen=True)
class GpuReport:
    """stage: "compiled", "lowered" (why no further in message) or "refused" (the message)."""

    case: str
    gpu: str
    stage: str
    message: str | None = None
    kernels: tuple[GpuKernel, ...] = ()


def missing_for_compilation() -> str | None:
    """A sentence on what must be installed to go beyond lowering, or None."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        return (
            f"not compiled: pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}"
        )
    if shutil.which("ptxas") is None:
        return "not compiled: ptxas is not on PATH (it is in nvidia-cuda-nvcc)"
    return None


def compile_for_gpu(name: str, fn: Callable[..., Any], *shapes: Any) -> Any:
    """`jax.jit(fn)` for a Hopper GPU: jax.stages.Compiled, or Lowered where that is the end.

    name: "h100" or "h200". shapes: one argument of fn each. Raises ValueError for another name,
    and whatever the lowering and the compiler raise.
    """
    check_in("gpu", name, GPUS)
    gpu = GPUS[name]
    _stand_in_for_cuda_version()
    abstract = jax.sharding.AbstractDevice(
        device_kind=gpu.device_kind, num_cores=132, platform="cuda"
    )
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=abstract)
    only_lower = missing_for_compilation() is not None
    arguments: Any = shapes
    if not only_lower:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(
            name, platform="cuda", target_config=gpu.target_config(), topology="1x1x1"
        )
        sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(fn).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered if only_lower else lowered.compile()


def _stand_in_for_cuda_version() -> None:
    # Some kernels ask for the version of CUDA while they are traced; without CUDA there is none.
    import jax._src.lib as lib

    if lib.cuda_versions is None:
        version = types.SimpleNamespace(cuda_runtime_get_version=lambda: 13000)
        lib.cuda_versions = version  # type: ignore[assignment]


def jax_attention(*, seq_len: int = 1024, block_q: int = 64, block_kv: int = 128) -> Any:
    """jax's own Mosaic GPU attention; it takes float16 alone."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as module

    config = module.TuningConfig(block_q=block_q, block_kv=block_kv, max_concurrent_steps=2)
    shape = jax.ShapeDtypeStruct((1, seq_len, 8, 128), jax.numpy.float16)
    return (lambda q, k, v: module.attention(q, k, v, config)), (shape,) * 3


# name -> function of no required argument that returns (fn, its argument shapes)
GPU_CASES: Mapping[str, Callable[..., Any]] = {"jax attention, forward": jax_attention}


def profile_gpu(case: str, gpu: str) -> GpuReport:
    """Compiles a case in a process of its own, whose output is what ptxas says."""
    check_in("case", case, GPU_CASES)
    settings = dict(
        os.environ,
        MOSAIC_GPU_DUMP_PTXAS="1",
        MOSAIC_GPU_DUMP_RESOURCES="1",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        JAX_ENABLE_COMPILATION_CACHE="false",
        JAX_TRACEBACK_FILTERING="off",  # so that the last line is the error
    )
    settings.pop("JAX_PLATFORMS", None)  # it would keep the CUDA plugin from being found
    command = [sys.executable, "-m", "effattn.static.gpu", json.dumps([case, gpu])]
    done = subprocess.run(
        command,
        env=settings,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return GpuReport(case, gpu, "refused", lines[-1] if lines else f"code {done.returncode}")
    kernels = read_resources(done.stdout + "\n" + done.stderr)
    message = missing_for_compilation()
    return GpuReport(case, gpu, "lowered" if message else "compiled", message, kernels)


_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '\w+'"
    r"(?:.|\n)*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\n.*?Used (\d+) registers"
)


def read_resources(text: str) -> tuple[GpuKernel, ...]:
    """The kernels in what `ptxas -v` and Mosaic GPU's resource dump print."""
    shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", text)]
    entries = _ENTRY.findall(text)
    known = len(shared) == len(entries)
    return tuple(
        GpuKernel(name, int(registers), int(store), int(load), shared[i] if known else None)
        for i, (name, store, load, registers) in enumerate(entries)
    )


if __name__ == "__main__":
    chosen_case, chosen_gpu = json.loads(sys.argv[1])
    _stand_in_for_cuda_version()  # before a case's module is imported: it keeps what it finds
    function, argument_shapes = GPU_CASES[chosen_case]()
    compile_for_gpu(chosen_gpu, function, *argument_shapes)
