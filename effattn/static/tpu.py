"""Compiling for a TPU that is not here: libtpu's compiler, a named topology, and no device."""

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from effattn.static.chips import Chip, chip_of


class CompileError(RuntimeError):
    """The TPU compiler, or Pallas on the way to it, refused; the message is theirs."""


def compile_for(
    topology: str, fn: Callable[..., Any], *shapes: Any, mesh: jax.sharding.Mesh | None = None
) -> jax.stages.Compiled:
    """`jax.jit(fn)` compiled ahead of time for one device of a TPU, or a mesh, in this process.

    topology: a chip ("v5e", "v5p", "v6e", "tpu7x") or one of its topologies ("v5e:4x4").
    shapes: one argument of fn each, arrays or pytrees of them; only shape and dtype count.
    mesh: from `describe_mesh`. The arguments lie on it as their `sharding` says.

    The result answers `as_text`, `memory_analysis` and the like, and cannot be run. Raises
    ValueError for an unknown chip, CompileError with the compiler's message where fn does not
    compile, RuntimeError where libtpu is not installed.
    """
    chip = chip_of(topology)
    if mesh is None:
        device = describe_device(chip, topology if ":" in topology else chip.topology)
        sharding = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
        )
    # Pallas asks the abstract device for the kind of TPU while it traces.
    abstract = jax.sharding.AbstractDevice(
        device_kind=chip.device_kind, num_cores=chip.device_cores, platform="tpu"
    )
    # Auto, as on a device without a mesh: Explicit axes would be checked in every operation.
    context = jax.sharding.AbstractMesh(
        (1,), ("device",), (jax.sharding.AxisType.Auto,), abstract_device=abstract
    )
    if mesh is not None:
        context = mesh.abstract_mesh  # whose device libtpu has described
    traced: Any = None
    try:
        with jax.sharding.use_abstract_mesh(context):
            traced = jax.jit(fn).trace(*shapes)
            lowered = traced.lower(lowering_platforms=("tpu",))
        with _without_persistent_cache():
            return lowered.compile()
    except Exception as error:
        if traced is None:  # fn itself failed: its own error says it better
            raise
        raise CompileError(f"{chip.name}: {error}") from error


def compile_step(
    chip: Chip, step: Any, arguments: tuple[Any, ...], mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """A function that is jitted already, compiled for a mesh of described devices.

    arguments: pytrees of ShapeDtypeStructs with shardings on `mesh`. Raises as `compile_for`.
    """
    traced: Any = None
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = step.trace(*arguments)
            lowered = traced.lower(lowering_platforms=("tpu",))
        with _without_persistent_cache():
            return lowered.compile()
    except Exception as error:
        if traced is None:
            raise
        raise CompileError(f"{chip.name}: {error}") from error


@contextlib.contextmanager
def _without_persistent_cache() -> Iterator[None]:
    """jax would write what is compiled for a described device, and then fail to read it."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            yield
    finally:
        jax.config.update(name, before)


def describe_mesh(topology: str, axes: dict[str, int]) -> jax.sharding.Mesh:
    """A mesh of Auto axes over the first devices of a topology, for `compile_for`.

    topology: one with as many devices as the axes have places, like "v5e:2x4".
    """
    devices = describe_devices(chip_of(topology), topology)
    shape = tuple(axes.values())
    if math.prod(shape) > len(devices):
        raise ValueError(f"axes: got {axes}, {topology} has {len(devices)} devices")
    grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.sharding.Mesh(grid, tuple(axes), axis_types=kinds)


def describe_device(chip: Chip, topology: str) -> Any:
    """The first device of a topology, as libtpu describes it. RuntimeError without libtpu."""
    return describe_devices(chip, topology)[0]


def describe_devices(chip: Chip, topology: str, num_slices: int = 1) -> list[Any]:
    """The devices of a topology. Raises RuntimeError without libtpu.

    The environment is set for a host that has no TPU: nothing is asked of a metadata server, and
    several processes may hold libtpu at once.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError(
            "libtpu, the compiler for a TPU, is not installed: pip install 'effattn[test]'"
        )
    for name, value in environment(chip).items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    return topologies.get_topology_desc(topology, platform="tpu", **slices).devices


def environment(chip: Chip) -> dict[str, str]:
    """What libtpu must find when it is loaded on a host without a TPU."""
    return {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": chip.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Its log speaks of the missing device; the compiler's errors come as exceptions.
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
