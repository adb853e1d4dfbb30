"""Which machine a call is being lowered for, as far as it can be known while tracing."""

from typing import NamedTuple

import jax


class TpuTarget(NamedTuple):
    """kind: as jax names it, "TPU v5 lite". num_cores: TensorCores that one device spans."""

    kind: str
    num_cores: int


def may_be_pallas(implementation: str) -> bool:
    """Whether an op asked for this implementation may become a Pallas kernel.

    XLA cannot split one over devices. Where the answer is yes and XLA's own operations are taken in
    the end, splitting them by hand is right too.
    """
    if implementation == "auto":
        return tpu_target() is not None
    return implementation.startswith("tpu")


class NvidiaTarget(NamedTuple):
    """kind: as jax names it, "NVIDIA H100 80GB HBM3". capability: (9, 0) there; None if unknown."""

    kind: str
    capability: tuple[int, int] | None


def tpu_target() -> TpuTarget | None:
    """The TPU that code traced now will run on; None where it is another machine.

    In order: Pallas' TPU interpreter (`pltpu.force_tpu_interpret_mode`) stands for a v5e on any
    machine; then the device of the mesh in context (`jax.set_mesh`, or the abstract mesh of an
    ahead-of-time compilation); then jax's default backend.
    """
    if _interpreting():
        return TpuTarget("TPU v5 lite", 1)
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if device.platform != "tpu":
            return None
        return TpuTarget(device.device_kind, device.num_cores)
    if jax.default_backend() != "tpu":
        return None
    first = jax.devices()[0]
    return TpuTarget(first.device_kind, int(getattr(first, "num_cores", None) or 1))


def not_a_tpu() -> str | None:
    """The sentence with which a TPU kernel refuses any other machine; None on a TPU."""
    if tpu_target() is not None:
        return None
    return f"it is a TPU kernel and this call is lowered for {_platform()}"


def nvidia_target() -> NvidiaTarget | None:
    """The NVIDIA GPU that code traced now will run on; None where it is another machine.

    The device of the mesh in context comes first, then jax's default backend. The capability of a
    device that is only described is unknown.
    """
    if _interpreting():
        return None
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and not _is_nvidia(described.platform, described.device_kind):
        return None
    held = _nvidia_device()
    if described is not None and (held is None or held.kind != described.device_kind):
        return NvidiaTarget(described.device_kind, None)
    return held


def not_an_nvidia_gpu() -> str | None:
    """The sentence with which a CUDA kernel refuses any other machine; None on an NVIDIA GPU."""
    if nvidia_target() is not None:
        return None
    return f"it is for NVIDIA GPUs and this call is lowered for {_platform()}"


def _nvidia_device() -> NvidiaTarget | None:
    if jax.default_backend() not in ("gpu", "cuda"):
        return None
    first = jax.devices()[0]
    if not _is_nvidia(first.platform, first.device_kind):
        return None
    major, _, minor = str(first.compute_capability).partition(".")
    return NvidiaTarget(first.device_kind, (int(major), int(minor)))


def _is_nvidia(platform: str, device_kind: str) -> bool:
    # An AMD GPU's platform is "gpu" too, or "rocm".
    return platform == "cuda" or (platform == "gpu" and "NVIDIA" in device_kind)


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _interpreting() -> bool:
    # The context manager is public, what it sets is not; a jax that renames it reads as "no".
    from jax._src import config

    context = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return context is not None and bool(context.value)
