"""Which machine a call is being lowered for, as far as it can be known while tracing."""

from typing import NamedTuple

import jax


class TpuTarget(NamedTuple):
    """kind: as jax names it, "TPU v5 lite". num_cores: TensorCores that one device spans."""

    kind: str
    num_cores: int


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
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return f"it is a TPU kernel and this call is lowered for {platform}"


def _interpreting() -> bool:
    # The context manager is public, what it sets is not; a jax that renames it reads as "no".
    from jax._src import config

    context = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return context is not None and bool(context.value)
