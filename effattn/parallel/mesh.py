"""The device mesh and where parameters and batches lie on it.

Logical axis names on parameters become mesh axes in one place, `RULES`. Every axis is Auto: XLA
inserts the collectives, and the layers run unchanged on one device.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effattn.checks import check_at_least

BATCH_AXES = ("data", "fsdp")
# Where a mesh has it: the streams of a model that reads its input several times at once.
STREAMS_AXIS = "streams"

# Logical parameter axis -> mesh axis; a name that is not listed is not split.
RULES = {"embed": "fsdp", "streams": STREAMS_AXIS}


@dataclass(kw_only=True)
class MeshConfig:
    """How many ways the batch (`data` x `fsdp`) and the parameters (`fsdp`) are split.

    streams: ways to split the streams of a model that has some (ParScale).
    """

    data: int | None = None  # None: every device that the others leave
    fsdp: int = 1
    streams: int = 1

    def build(self, devices: list[jax.Device] | None = None) -> Mesh:
        """A Mesh with Auto axes ("data", "fsdp"), and "streams" where it is split; `data=1` on a
        larger machine takes one device.

        Raises ValueError where the devices do not suffice or do not divide.
        """
        devices = jax.devices() if devices is None else devices
        check_at_least("mesh.fsdp", self.fsdp, 1)
        check_at_least("mesh.streams", self.streams, 1)
        others = self.fsdp * self.streams
        if self.data is None:
            if len(devices) % others:
                name, got = "mesh.fsdp", f"{self.fsdp}"
                if self.streams > 1:
                    name, got = f"{name} x mesh.streams", f"{got} x {self.streams}"
                raise ValueError(
                    f"{name}: got {got}, expected a divisor of the {len(devices)} devices"
                )
            data = len(devices) // others
        else:
            check_at_least("mesh.data", self.data, 1)
            data = self.data
        wanted = data * others
        ways = f"data={data} x fsdp={self.fsdp}"
        ways += f" x streams={self.streams}" if self.streams > 1 else ""
        if wanted > len(devices):
            raise ValueError(f"mesh: {ways} wants {wanted} devices, {len(devices)} are there")
        if wanted < len(devices) and jax.process_count() > 1:
            raise ValueError(
                f"mesh: {ways} uses {wanted} of {len(devices)} devices; "
                "with several hosts all of them must be used"
            )
        shape: tuple[int, ...] = (data, self.fsdp)
        axes: tuple[str, ...] = BATCH_AXES
        if self.streams > 1:
            shape, axes = (*shape, self.streams), (*axes, STREAMS_AXIS)
        grid = np.asarray(devices[:wanted]).reshape(shape)
        return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def parameter_specs(
    shapes: Any, axes: Any, mesh: Mesh, rules: dict[str, str] | None = None
) -> tuple[Any, int]:
    """(PartitionSpec per leaf, number of leaves that a rule wanted to split but could not).

    shapes: pytree of arrays or ShapeDtypeStructs; axes: the same tree with a tuple of logical names
    (or None) per leaf. An axis whose length the mesh axis does not divide stays whole.
    """
    rules = RULES if rules is None else rules
    whole = 0

    def spec(leaf: Any, names: tuple[str | None, ...]) -> PartitionSpec:
        nonlocal whole
        if len(names) != len(leaf.shape):
            raise ValueError(f"axes: got names {names} for a parameter of shape {leaf.shape}")
        parts: list[str | None] = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = rules.get(name) if name is not None else None
            if axis in parts or axis is None or mesh.shape.get(axis, 1) == 1:
                axis = None
            elif size % mesh.shape[axis]:
                whole += 1
                axis = None
            parts.append(axis)
        return PartitionSpec(*parts)

    specs = jax.tree.map(spec, shapes, axes)
    return specs, whole


def named(mesh: Mesh, specs: Any) -> Any:
    """The tree of PartitionSpecs as NamedShardings of `mesh`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over both mesh axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain_rows(x: jax.Array) -> jax.Array:
    """`x` with its first axis split over the ambient mesh; unchanged where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def constrain_streams(x: jax.Array) -> jax.Array:
    """x [streams, batch, ...] with both axes split over the ambient mesh, where it has "streams";
    unchanged where it has none, or does not divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = mesh.shape.get(STREAMS_AXIS, 1)
    if ways == 1 or x.shape[0] % ways:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(STREAMS_AXIS, BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """The host's numpy batch as global arrays: each process gives the rows that it loaded."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
