"""The device mesh and where parameters and batches lie on it.

Logical axis names on parameters become mesh axes in one place, `RULES`. Every axis is Auto: XLA
inserts the collectives, and the layers run unchanged on one device.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from effattn.checks import check_at_least

BATCH_AXES = ("data", "fsdp")
# Where a mesh has it: the streams of a model that reads its input several times at once.
STREAMS_AXIS = "streams"

# The mesh axis over which sequence parallelism lays the tokens of a row.
SEQUENCE_AXIS = "sequence"
# Heads, the inner channels of MLPs and the vocabulary.
TENSOR_AXIS = "tensor"

# Over which axes the experts of a mixture lie, by the name of the fold: axes that attention uses
# for something else. Of those that experts leave, "tensor" splits their inner channels, and the
# others their width.
FOLDS: dict[str, tuple[str, ...]] = {
    "none": (),
    "tensor": (TENSOR_AXIS,),
    "sequence": (SEQUENCE_AXIS,),
    "fsdp": ("fsdp",),
    "sequence_tensor": (SEQUENCE_AXIS, TENSOR_AXIS),
    "all": ("fsdp", SEQUENCE_AXIS, TENSOR_AXIS),
}


def experts_axis(fold: str) -> str:
    """The logical name of the axis of experts in this fold."""
    return f"experts_{fold}"


# Logical parameter axis -> the mesh axes that it is split over, as far as they divide it; a name
# that is not listed is not split. Devices that share the tokens of a row share the parameters too,
# as they would with as many rows (ALST, arXiv 2506.13996).
RULES: dict[str, tuple[str, ...]] = {
    **{experts_axis(fold): axes for fold, axes in FOLDS.items()},
    "embed": ("fsdp", SEQUENCE_AXIS),
    "streams": (STREAMS_AXIS,),
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), (TENSOR_AXIS,)),
}


@dataclass(kw_only=True)
class MeshConfig:
    """How many ways the batch (`data` x `fsdp`) and the parameters (`fsdp`) are split.

    streams: ways to split the streams of a model that has some (ParScale). sequence: the tokens of
    a row, see `SequenceConfig`. tensor: heads, the inner channels of MLPs and the vocabulary.
    """

    data: int | None = None  # None: every device that the others leave
    fsdp: int = 1
    streams: int = 1
    sequence: int = 1
    tensor: int = 1

    def build(self, devices: list[jax.Device] | None = None) -> Mesh:
        """A Mesh with Auto axes ("data", "fsdp"), and the others where they are split; `data=1` on
        a larger machine takes one device.

        Raises ValueError where the devices do not suffice or do not divide.
        """
        devices = jax.devices() if devices is None else devices
        others = {"fsdp": self.fsdp, STREAMS_AXIS: self.streams}
        others |= {SEQUENCE_AXIS: self.sequence, TENSOR_AXIS: self.tensor}
        for name, ways in others.items():
            check_at_least(f"mesh.{name}", ways, 1)
        # Always there, as specs name them; the rest where they split something.
        others = {name: ways for name, ways in others.items() if ways > 1 or name == "fsdp"}
        each = math.prod(others.values())
        if self.data is None:
            if len(devices) % each:
                raise ValueError(
                    f"{' x '.join(f'mesh.{name}' for name in others)}: got "
                    f"{' x '.join(map(str, others.values()))}, expected a divisor of the "
                    f"{len(devices)} devices"
                )
            data = len(devices) // each
        else:
            check_at_least("mesh.data", self.data, 1)
            data = self.data
        sizes = {"data": data, **others}
        wanted = data * each
        ways_text = " x ".join(f"{name}={ways}" for name, ways in sizes.items())
        if wanted > len(devices):
            raise ValueError(f"mesh: {ways_text} wants {wanted} devices, {len(devices)} are there")
        if wanted < len(devices) and jax.process_count() > 1:
            raise ValueError(
                f"mesh: {ways_text} uses {wanted} of {len(devices)} devices; "
                "with several hosts all of them must be used"
            )
        grid = _grid(devices[:wanted], tuple(sizes.values()))
        return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def compile_afresh(mesh: Mesh) -> None:
    """Turns jax's persistent compile cache off in this process, for a mesh of several CPU devices.

    In a program that XLA's CPU backend reads from there, collectives that do not depend on each
    other have lost their order: devices wait for ever for one another, each in another one
    (jaxlib 0.11.2 and 0.12.0.1). For TPUs and GPUs, of which nothing of the kind is known, it stays
    on.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether to use it is asked once in a process


def _grid(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """The devices in the shape of a mesh: of a TPU, with neighbours on an axis linked in its torus.

    Of several slices, "data", which comes first, is the axis that goes from one to the next.
    """
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(
            f"mesh.data: got {shape[0]}, expected a multiple of the {slices} slices: it is the one "
            "axis that goes from one slice to the next"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, *[1] * (len(shape) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


def parameter_specs(
    shapes: Any,
    axes: Any,
    mesh: Mesh | AbstractMesh,
    rules: dict[str, tuple[str, ...]] | None = None,
) -> tuple[Any, int]:
    """(PartitionSpec per leaf, number of leaves that a rule wanted to split but could not).

    shapes: pytree of arrays or ShapeDtypeStructs; axes: the same tree with a tuple of logical names
    (or None) per leaf. An axis whose length a mesh axis does not divide is not split over that one.
    """
    rules = RULES if rules is None else rules
    whole = 0

    def spec(leaf: Any, names: tuple[str | None, ...]) -> PartitionSpec:
        nonlocal whole
        if len(names) != len(leaf.shape):
            raise ValueError(f"axes: got names {names} for a parameter of shape {leaf.shape}")
        parts: list[tuple[str, ...] | str | None] = []
        taken: set[str] = set()
        for size, name in zip(leaf.shape, names, strict=True):
            split: tuple[str, ...] = ()
            for axis in rules.get(name, ()) if name is not None else ():
                ways = mesh.shape.get(axis, 1)
                if axis in taken or ways == 1:
                    continue
                if size % (ways * math.prod(mesh.shape[a] for a in split)):
                    whole += 1
                else:
                    split = (*split, axis)
            taken |= {*split}
            parts.append(split if len(split) > 1 else split[0] if split else None)
        return PartitionSpec(*parts)

    specs = jax.tree.map(spec, shapes, axes)
    return specs, whole


def mesh_axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """The mesh axes of every axis of an array."""
    return [() if a is None else (a,) if isinstance(a, str) else tuple(a) for a in spec]


def outer_part(array: Any, axes: tuple[str | None, ...]) -> PartitionSpec | None:
    """The layout of a parameter over the ambient mesh without the inner of two mesh axes; None
    where none of its axes lies over two, or a `shard_map` around has taken one."""
    mesh = jax.sharding.get_abstract_mesh()
    spec, _ = parameter_specs(array, axes, mesh)
    split, free = mesh_axes(spec), free_axes()
    if all(len(a) < 2 for a in split) or any(name not in free for a in split for name in a):
        return None
    return PartitionSpec(*(a[0] if a else None for a in split))


def named(mesh: Mesh, specs: Any) -> Any:
    """The tree of PartitionSpecs as NamedShardings of `mesh`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over both batch axes, tokens over "sequence" where the mesh has it."""
    return NamedSharding(mesh, _tokens_spec(mesh))


def _tokens_spec(mesh: Any) -> PartitionSpec:
    """Of arrays [batch, seq_len, ...]."""
    if SEQUENCE_AXIS in mesh.shape:
        return PartitionSpec(BATCH_AXES, SEQUENCE_AXIS)
    return PartitionSpec(BATCH_AXES)


def free_axes() -> dict[str, int]:
    """name -> size of the ambient mesh's axes, but those that a `shard_map` around has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind != AxisType.Manual}


def dividing_axes(axes: tuple[str, ...], free: dict[str, int], size: int) -> tuple[str, ...]:
    """Those of `axes` that the mesh has and that together divide `size`."""
    taken: tuple[str, ...] = ()
    ways = 1
    for axis in axes:
        if axis in free and size % (ways * free[axis]) == 0:
            taken, ways = (*taken, axis), ways * free[axis]
    return taken


def sequence_ways() -> int:
    """How many ways the ambient mesh splits the tokens of a row."""
    return jax.sharding.get_abstract_mesh().shape.get(SEQUENCE_AXIS, 1)


def constrain_tokens(x: jax.Array) -> jax.Array:
    """`x` [batch, seq_len, ...] with rows and tokens split over the ambient mesh; unchanged where
    there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _tokens_spec(mesh))


def constrain_rows(x: jax.Array) -> jax.Array:
    """`x` [batch, ...] with rows split over the ambient mesh and nothing else; unchanged without a
    mesh."""
    free = free_axes()
    if math.prod(free.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(dividing_axes(BATCH_AXES, free, len(x)))
    )


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


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch lie on this process's devices, ascending; they are what it loads.

    Where processes share the tokens or the parameters of a row, each of them loads it.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def put_batch(batch: Any, sharding: NamedSharding, rows: np.ndarray, batch_size: int) -> Any:
    """The host's numpy batch as global arrays [batch_size, ...], from the rows it has loaded."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def place(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            wanted = np.arange(batch_size)[index[0]]
            return x[np.searchsorted(rows, wanted)][:, *index[1:]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)
