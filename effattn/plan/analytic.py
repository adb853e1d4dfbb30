"""The analytic half of a plan: counted from shapes and from the traced program, nothing compiled.

For machines that no compiler here knows, such as nodes of GPUs, and as a quick look before a
compilation. Parameters, optimizer state and batch are exact. Temporaries come from tracing the step
of one device's share (`effattn.plan.traced`), collectives from `effattn.plan.moves`.
"""

import copy
import datetime
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from effattn.plan.compiled import GIB, on_one_device, vocabulary
from effattn.plan.machine import Machine, machine_of
from effattn.plan.report import Memory, Plan, Traffic, count_flops

if TYPE_CHECKING:
    import jax

    from effattn.experiment import Experiment
    from effattn.plan.moves import Move
    from effattn.plan.traced import Estimate

NOTES = (
    "analytic: parameters, optimizer state and batch are exact; temporaries are estimated from the "
    "traced program: within a factor of 1.5 of compiled ones where blocks are computed again, at "
    "most 2.4 times as much where they are not, of those that we compared",
    "collectives are counted, not compiled: gathers and rings are taken to hide behind work as far "
    "as there is enough of it, on GPUs also sums of gradients",
)


@dataclass(frozen=True)
class _Device:
    """What tracing asks of a device that is not here."""

    id: int
    platform: str
    device_kind: str
    num_cores: int = 1
    process_index: int = 0
    slice_index: int = 0


def analytic_plan(
    experiment: "Experiment",
    topology: str,
    *,
    name: str,
    num_slices: int = 1,
    vocab_size: int | None = None,
    hbm_gib: float | None = None,
    command: str = "",
    overrides: list[str] | None = None,
) -> Plan:
    """The plan of a training step on any machine of `machine_of`. hbm_gib: plan for devices with no
    more than this. Raises ValueError for a user's mistake."""
    from effattn.experiment import validate
    from effattn.plan.moves import implied, spelled_out, tensor_parallel
    from effattn.train.flops import flops_by_part
    from effattn.train.program import abstract_batch, make_program
    from effattn.versions import versions

    validate(experiment)
    machine = machine_of(topology, num_slices)
    vocab_size = vocab_size or vocabulary(experiment)
    mesh = _mesh(experiment, machine)
    program = make_program(experiment, vocab_size, mesh)
    sizes = {axis: int(n) for axis, n in mesh.shape.items()}
    data, train = experiment.data, experiment.train
    capacity = machine.memory if hbm_gib is None else int(hbm_gib * GIB)
    memory = Memory(
        parameters=on_one_device(program.abstract.params),
        optimizer=on_one_device(program.abstract.opt_state),
        batch=on_one_device(abstract_batch(experiment, program.rows)),
        capacity=capacity,
    )
    plan = Plan(
        name=name,
        kind="train",
        method="analytic",
        topology=machine.name,
        num_slices=num_slices,
        devices=mesh.size,
        mesh=sizes,
        batch_size=data.batch_size,
        seq_len=data.seq_len,
        parameters=program.model.num_parameters,
        memory=memory,
        notes=list(NOTES),
        versions=versions(),
        date=datetime.date.today().isoformat(),
        command=command,
        overrides=list(overrides or []),
    )
    local = local_share(experiment, sizes)
    found = _estimate(local, vocab_size, machine, program, sizes)
    gathered = _gathered(program, sizes, train.compute_dtype)
    _fill_memory(memory, found, program, gathered)
    plan.fits = memory.total <= capacity
    if not plan.fits:
        plan.message = (
            f"does not fit: about {memory.total / GIB:.2f} GiB are needed on a device, "
            f"{capacity / GIB:.2f} are there"
        )
    parts = flops_by_part(experiment.model, vocab_size=vocab_size, seq_len=data.seq_len) or ()
    tokens = data.batch_size * data.seq_len // mesh.size
    count_flops(plan, parts, data.batch_size * data.seq_len)
    plan.compiled_flops = found.flops
    plan.pallas = [(kernel, None) for kernel in sorted(found.kernels)]
    plan.pallas_calls = sum(found.kernels.values())
    if found.kernels:  # what kernels compute is no product of the traced program
        inside = sum(part.flops for part in parts if part.part in ("pairs", "state"))
        plan.compiled_flops += 3 * inside * tokens
        plan.notes.append(
            "products of the program: what Pallas kernels compute is the model's own count"
        )
    plan.hbm_bytes = found.traffic + 2 * (memory.parameters + memory.optimizer)
    moves: list[Move] = [
        *implied(
            program.abstract.params,
            program.model.axes,
            sizes,
            compute_dtype=train.compute_dtype,
            microbatches=train.accumulation,
        ),
        *tensor_parallel(
            sum(part.layers for part in parts if part.part in ("projections", "mlp")),
            data.batch_size * data.seq_len * sizes.get("tensor", 1) // mesh.size,
            getattr(experiment.model, "width", 0),
            sizes.get("tensor", 1),
            compute_dtype=train.compute_dtype,
            passes=2 if getattr(experiment.model, "remat", "none") == "none" else 3,
        ),
    ]
    if sizes.get("sequence", 1) > 1:
        jaxpr = _trace(program.step, (program.abstract, abstract_batch(experiment, program.rows)))
        moves += spelled_out(jaxpr.jaxpr, sizes)
    _price(plan, moves, machine, tokens * mesh.size)
    return plan


def local_share(experiment: "Experiment", mesh: dict[str, int]) -> "Experiment":
    """The experiment of one device: its rows, its part of every row, its streams."""
    from effattn.parallel.mesh import MeshConfig
    from effattn.parallel.sequence import SequenceConfig

    share = copy.deepcopy(experiment)
    parts = mesh.get("sequence", 1)
    share.data.batch_size //= mesh.get("data", 1) * mesh["fsdp"]
    share.data.seq_len //= parts
    share.mesh, share.sequence = MeshConfig(), SequenceConfig()
    if share.train.loss_tile is not None:
        share.train.loss_tile = max(1, share.train.loss_tile // parts)
    if share.memory.mlp_tile is not None:
        share.memory.mlp_tile = max(1, share.memory.mlp_tile // parts)
    if mesh.get("streams", 1) > 1 and share.model.streams % mesh["streams"] == 0:
        share.model.streams //= mesh["streams"]
    return share


def _mesh(experiment: "Experiment", machine: Machine) -> "jax.sharding.Mesh":
    """The experiment's mesh of described devices, in the order of their numbers."""
    import numpy as np
    from jax.sharding import Mesh

    # Built for a machine without a torus: which device stands where changes no count here.
    found: Any = [_Device(i, "cpu", machine.kind) for i in range(machine.devices)]
    mesh = experiment.mesh.build(found)
    grid = np.empty(mesh.devices.shape, dtype=object)
    for place, device in np.ndenumerate(mesh.devices):
        grid[place] = replace(device, platform=machine.platform)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)


def _trace(step: Any, arguments: tuple[Any, ...]) -> Any:
    import jax

    mesh = jax.tree.leaves(arguments)[0].sharding.mesh.abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        return step.trace(*arguments).jaxpr


@lru_cache(maxsize=64)
def _traced_share(recorded: str, vocab_size: int, platform: str, kind: str) -> Any:
    """The step of one device as a jaxpr; a search asks for the same one again and again."""
    from effattn.config import from_dict
    from effattn.train.program import abstract_batch, make_program

    experiment = from_dict(json.loads(recorded))
    devices: Any = [_Device(0, platform, kind)]
    program = make_program(experiment, vocab_size, experiment.mesh.build(devices))
    return _trace(program.step, (program.abstract, abstract_batch(experiment, program.rows)))


def _estimate(
    local: "Experiment", vocab_size: int, machine: Machine, program: Any, mesh: dict[str, int]
) -> "Estimate":
    import jax

    from effattn.config import to_dict
    from effattn.plan.traced import estimate

    jaxpr = _traced_share(json.dumps(to_dict(local)), vocab_size, machine.platform, machine.kind)
    shards: dict[tuple[int, ...], float] = {}
    slices: dict[tuple[int, ...], float] = {}
    for leaf in jax.tree.leaves(program.abstract.params):
        shards[leaf.shape] = math.prod(leaf.shape) / math.prod(
            leaf.sharding.shard_shape(leaf.shape)
        )
        tensor = any("tensor" in _tuple(part) for part in leaf.sharding.spec)
        # Alone, and as one layer of a stack.
        for part in (leaf.shape, leaf.shape[1:]):
            slices[part] = mesh["tensor"] if tensor else 1
    ways, width = mesh.get("tensor", 1), getattr(local.model, "width", 0)
    rows = local.data.batch_size // local.train.accumulation
    tokens = rows * local.data.seq_len

    def by_tensor(shape: tuple[int, ...]) -> float:
        """Heads, MLP channels and logits are split over the tensor axis, the residual stream is
        not."""
        for known in (shape, shape[::-1]):
            if known in slices:
                return slices[known]
        each, rest = divmod(math.prod(shape), tokens)
        return ways if shape and not rest and shape[-1] != width and each % ways == 0 else 1

    def size(shape: tuple[int, ...], dtype: Any) -> float:
        return math.prod(shape) * dtype.itemsize / (shards.get(shape) or by_tensor(shape))

    return estimate(jaxpr, size, by_tensor)


def _tuple(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _gathered(program: Any, mesh: dict[str, int], compute_dtype: Any) -> int:
    """Bytes of the parameters that are computed with at once, where they are split: whole but for
    the tensor axis, in the compute dtype. Two layers of the largest block, and all that is in none.
    """
    import jax
    import jax.numpy as jnp

    items, alone = jnp.dtype(compute_dtype).itemsize, 0.0
    blocks: dict[Any, float] = {}
    axes = jax.tree.leaves(program.model.axes, is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree.leaves_with_path(program.abstract.params)
    for (path, leaf), names in zip(leaves, axes, strict=True):
        split = {a for part in leaf.sharding.spec for a in _tuple(part)} - {"tensor"}
        ways = math.prod(mesh[axis] for axis in split)
        own = math.prod(leaf.sharding.shard_shape(leaf.shape)) * min(items, leaf.dtype.itemsize)
        if ways == 1:
            continue
        if names[:1] == ("layers",):
            # A block of a stack stands under its number in a list of blocks.
            keys = [getattr(key, "key", None) for key in path]
            numbers = [i for i, key in enumerate(keys) if isinstance(key, int)]
            block = path[: numbers[-1] + 1] if numbers else path[:1]
            blocks[block] = blocks.get(block, 0.0) + own * ways / leaf.shape[0]
        else:
            alone += own * ways
    return int(alone + 2 * max(blocks.values(), default=0.0))


def _fill_memory(memory: Memory, found: "Estimate", program: Any, gathered: int) -> None:
    import jax

    parameters = {leaf.shape for leaf in jax.tree.leaves(program.abstract.params)}
    gradients = sum(size for shape, size in found.alive if shape in parameters)
    kept = sum(size for shape, size in found.alive if shape not in parameters)
    memory.temporaries = int(found.peak) + gathered
    memory.host = int(found.host)
    memory.parts = {
        "gradients": int(gradients),
        "kept for the backward pass": int(kept),
        "inside a microbatch, layer or tile": int(found.inside),
        "gathered parameters": gathered,
    }
    memory.total = memory.parameters + memory.optimizer + memory.batch + memory.temporaries


def _price(plan: Plan, moves: "Iterable[Move]", machine: Machine, tokens: int) -> None:
    strides, stride = dict[str, int](), plan.devices
    for axis, ways in plan.mesh.items():
        stride //= ways
        strides[axis] = stride
    rows: dict[Any, Traffic] = {}
    line = plan.roofline
    line.compute = max(plan.flops, plan.compiled_flops) / machine.flops
    line.memory = plan.hbm_bytes / machine.memory_speed
    hidden = 0.0
    for move in moves:
        seconds, far = _seconds(move, machine, plan.mesh, strides)
        key = move.kind, move.axes
        row = rows.setdefault(key, _no_traffic(move, far))
        row.count += move.times
        row.bytes += int(move.times * move.bytes)
        row.seconds += seconds
        if move.hides and _asynchronous(move.kind, machine):
            row.overlapped_bytes += int(move.times * move.bytes)
            hidden += seconds
        else:
            row.exposed_seconds += seconds
    # What does not fit behind the work is exposed, each in proportion.
    excess = max(0.0, 1 - max(line.compute, line.memory) / hidden) if hidden else 0.0
    for row in rows.values():
        share = row.overlapped_bytes / row.bytes if row.bytes else 0.0
        row.exposed_seconds += excess * share * row.seconds
    plan.collectives = sorted(rows.values(), key=lambda row: -row.bytes)
    line.collectives = sum(row.seconds for row in plan.collectives)
    line.exposed = sum(row.exposed_seconds for row in plan.collectives)
    line.step = max(line.compute, line.memory) + line.exposed
    terms = {"compute": line.compute, "memory": line.memory, "collectives": line.exposed}
    line.bound = max(terms, key=terms.__getitem__)
    plan.tokens_per_second = tokens / line.step if line.step else None
    plan.mfu_bound = plan.flops / (machine.flops * line.step) if line.step else None


def _seconds(
    move: "Move", machine: Machine, mesh: dict[str, int], strides: dict[str, int]
) -> tuple[float, bool]:
    """Of all that a row moves, and whether it leaves the devices that links join.

    What a node's devices all need enters it once and is then handed on: as many network adapters
    share it as the group has members there. An exchange has to cross for all members elsewhere.
    """
    members = math.prod(mesh[axis] for axis in move.axes)
    beside = math.prod(min(mesh[axis], max(1, machine.near // strides[axis])) for axis in move.axes)
    moved = move.times * move.bytes
    if beside >= members:
        speed = machine.permute if move.kind == "collective-permute" else machine.links
        return moved / speed, False
    if move.kind == "collective-permute":
        return moved / machine.network, True
    if move.kind == "all-to-all":
        return moved * (members - beside) / (members - 1) / machine.network, True
    return moved / min(machine.links, beside * machine.network), True


def _no_traffic(move: "Move", far: bool) -> Traffic:
    return Traffic(
        kind=move.kind,
        axes=move.axes,
        count=0,
        bytes=0,
        overlapped_bytes=0,
        seconds=0.0,
        exposed_seconds=0.0,
        across_slices=far,
    )


def _asynchronous(kind: str, machine: Machine) -> bool:
    """Whether compiled programs have work between its start and its end: XLA for GPUs does so for
    all; for TPUs we saw it for gathers and permutations, not for permutations on a large v5e."""
    if machine.platform == "gpu":
        return True
    if kind == "collective-permute":
        return not (machine.kind == "TPU v5 lite" and machine.near > 16)
    return kind == "all-gather"
