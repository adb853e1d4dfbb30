"""The compiled half of a plan: the step of an experiment, compiled for a TPU that is not here.

Each compilation has a process of its own, because a compiler that fails a check of its own aborts
the process it is in: `python -m effattn.plan.compiled`, a request on stdin, a plan on stdout.
"""

import datetime
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import effattn
from effattn.plan.report import Memory, Plan, Traffic, count_flops, from_json, to_json
from effattn.plan.topology import Topology, topology_of

if TYPE_CHECKING:
    import jax

    from effattn.experiment import Experiment

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Both forms in which the compiler says so.
_NO_ROOM = re.compile(
    r"(?:Used|HLO temporaries \() ?([\d.]+)([KMGT]?)\)?(?: of| exceeds available HBM \() ?"
    r"([\d.]+)([KMGT]?)"
)


class CompilerFailed(RuntimeError):
    """The compiler gave up, for another reason than memory."""


def compile_plan(
    experiment: "Experiment",
    topology: str,
    *,
    name: str,
    num_slices: int = 1,
    vocab_size: int | None = None,
    decode: int | None = None,
    hbm_gib: float | None = None,
    timeout_seconds: int = 900,
    command: str = "",
    overrides: list[str] | None = None,
) -> Plan:
    """The plan of a training step, or of a decoding step against a context of `decode` tokens.

    topology: see `topology_of`. vocab_size: None takes `vocabulary`. hbm_gib: plan for chips that
    have no more than this; the compiler itself still takes the chip's. Raises ValueError for a
    user's mistake and CompilerFailed.
    """
    from effattn.config import to_dict

    topology_of(topology, num_slices)
    request = {
        "experiment": to_dict(experiment),
        "topology": topology,
        "name": name,
        "num_slices": num_slices,
        "vocab_size": vocab_size,
        "decode": decode,
        "hbm_gib": hbm_gib,
    }
    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    ours = [str(Path(effattn.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, ours))
    environment.pop("XLA_FLAGS", None)  # simulated devices would only cost memory here
    try:
        done = subprocess.run(
            # -P: from this package, not from one that lies in the working directory.
            [sys.executable, "-P", "-m", "effattn.plan.compiled"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise CompilerFailed(
            f"the compilation for {topology} took more than {timeout_seconds} s; --timeout gives "
            "it longer"
        ) from None
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # Of an abort, the address at which a stack trace can be read comes last.
        lines = [s for s in lines if "symbolize" not in s] or [f"exit code {done.returncode}"]
        told = next((s for s in lines if "Check failed" in s or "Error" in s), lines[-1])
        raise CompilerFailed(f"the compiler for {topology} failed: {told[:500]}")
    plan = from_json(done.stdout)
    plan.command, plan.overrides = command, list(overrides or [])
    return plan


def vocabulary(experiment: "Experiment") -> int:
    """The size of the vocabulary, without opening the data. Raises ValueError where only that would
    tell."""
    from effattn.data.tokenizer import load_tokenizer

    data = experiment.data
    if data.vocab_size is not None:
        return data.vocab_size
    if data.tokenizer in ("bytes", "utf8"):
        return load_tokenizer(data.tokenizer).vocab_size
    raise ValueError(
        f"data.vocab_size: got None, expected the size of {data.tokenizer!r}'s vocabulary: a plan "
        "opens no data (--vocab-size gives it too)"
    )


def _make(request: dict[str, Any]) -> Plan:
    from effattn.config import from_dict
    from effattn.experiment import validate
    from effattn.static.tpu import CompileError, compile_step, describe_devices
    from effattn.train.program import abstract_batch, make_program
    from effattn.versions import version_of, versions

    experiment = from_dict(request["experiment"])
    validate(experiment)
    topology = topology_of(request["topology"], request["num_slices"])
    vocab_size = request["vocab_size"] or vocabulary(experiment)
    devices = describe_devices(topology.chip, topology.name, topology.num_slices)
    mesh = experiment.mesh.build(devices)
    if request["decode"] is None:
        program = make_program(experiment, vocab_size, mesh)
        step, arguments = program.step, (program.abstract, abstract_batch(experiment, program.rows))
        parameters = program.model.num_parameters
        parts = {
            "parameters": program.abstract.params,
            "optimizer": program.abstract.opt_state,
            "batch": arguments[1],
        }
    else:
        from effattn.plan.decode import decode_step

        step, arguments, parts, parameters = decode_step(
            experiment, vocab_size, mesh, request["decode"]
        )
    plan = Plan(
        name=request["name"],
        kind="train" if request["decode"] is None else "decode",
        method="compiled",
        topology=topology.name,
        num_slices=topology.num_slices,
        devices=mesh.size,
        mesh={name: int(size) for name, size in mesh.shape.items()},
        batch_size=experiment.data.batch_size,
        seq_len=experiment.data.seq_len if request["decode"] is None else request["decode"],
        parameters=parameters,
        memory=Memory(
            parameters=on_one_device(parts["parameters"]),
            optimizer=on_one_device(parts["optimizer"]),
            batch=on_one_device(parts["batch"]),
        ),
        versions={**versions(), "libtpu": version_of("libtpu")},
        date=datetime.date.today().isoformat(),
    )
    began = time.monotonic()
    try:
        compiled = compile_step(topology.chip, step, arguments, mesh)
    except CompileError as error:
        plan.compile_seconds = round(time.monotonic() - began, 1)
        if not _no_room(plan, str(error), request["hbm_gib"]):
            raise
        return plan
    plan.compile_seconds = round(time.monotonic() - began, 1)
    _read_memory(plan, compiled.memory_analysis(), topology, request["hbm_gib"])
    _read_program(plan, compiled.as_text() or "", mesh, topology)
    _price(plan, experiment, vocab_size, topology)
    plan.compile_host_gib = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return plan


def on_one_device(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs, each device's part by its sharding; keys left out."""
    import jax
    import numpy as np

    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += int(np.prod(shape)) * leaf.dtype.itemsize
    return total


def _no_room(plan: Plan, message: str, hbm_gib: float | None = None) -> bool:
    found = _NO_ROOM.search(message)
    if found is None:
        return False
    used, capacity = (int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3))
    if hbm_gib is not None:
        capacity = min(capacity, int(hbm_gib * GIB))
    plan.fits, plan.memory.total, plan.memory.capacity = False, used, capacity
    memory = plan.memory
    memory.temporaries = used - memory.parameters - memory.optimizer - memory.batch
    plan.message = (
        f"does not fit: {used / GIB:.2f} GiB are needed on a device, {capacity / GIB:.2f} are there"
    )
    return True


def _read_memory(plan: Plan, analysis: Any, topology: Topology, hbm_gib: float | None) -> None:
    memory = plan.memory
    told = memory.parameters + memory.optimizer + memory.batch
    memory.other = int(analysis.argument_size_in_bytes) - told
    memory.outputs = int(analysis.output_size_in_bytes)
    memory.aliased = int(analysis.alias_size_in_bytes)
    memory.temporaries = int(analysis.temp_size_in_bytes)
    memory.code = int(analysis.generated_code_size_in_bytes)
    memory.host = int(analysis.host_temp_size_in_bytes)
    memory.total = int(analysis.argument_size_in_bytes) + memory.outputs - memory.aliased
    memory.total += memory.temporaries + memory.code
    chip = topology.chip
    memory.capacity = int(chip.hbm_gib * GIB / chip.devices)
    plan.fits = True  # what does not fit, the compiler refuses
    if hbm_gib is not None:
        memory.capacity = int(hbm_gib * GIB)
        plan.fits = memory.total <= memory.capacity
        if not plan.fits:
            plan.message = (
                f"does not fit: {memory.total / GIB:.2f} GiB are needed on a device, "
                f"{hbm_gib:g} are allowed (--hbm-gib)"
            )


def _read_program(plan: Plan, hlo: str, mesh: "jax.sharding.Mesh", topology: Topology) -> None:
    from effattn.static.collectives import collectives
    from effattn.static.hlo import pallas_calls
    from effattn.static.module import parse
    from effattn.static.work import work_of

    module = parse(hlo)
    work = work_of(module)
    plan.compiled_flops, plan.hbm_bytes = work.flops, work.hbm_bytes
    plan.pallas_calls = work.pallas_calls
    plan.pallas = sorted({(_kernel(c.name), c.vmem_bytes) for c in pallas_calls(hlo)}, key=str)
    chip = topology.chip
    rows: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
    for found in collectives(module, mesh):
        key = found.kind, found.axes, found.across_slices
        row = rows.setdefault(
            key,
            Traffic(
                kind=found.kind,
                axes=found.axes,
                count=0,
                bytes=0,
                overlapped_bytes=0,
                seconds=0.0,
                exposed_seconds=0.0,
                across_slices=found.across_slices,
            ),
        )
        # A permute takes one link one way; the others go round a torus axis both ways.
        speed = chip.link_bytes_per_second * (1 if found.kind == "collective-permute" else 2)
        if found.across_slices:
            speed = chip.network_gb_per_s * 1e9
        seconds = found.bytes / speed
        covered = found.cycles_between / (chip.clock_ghz * 1e9)
        if found.calls_between:
            covered = seconds  # the text does not say how long a Pallas call takes
        row.count += found.times
        row.bytes += found.bytes * found.times
        row.seconds += seconds * found.times
        if found.overlapped:
            row.overlapped_bytes += found.bytes * found.times
            row.exposed_seconds += max(0.0, seconds - covered) * found.times
        else:
            row.exposed_seconds += seconds * found.times
    plan.collectives = sorted(rows.values(), key=lambda row: -row.bytes)
    if any(row.overlapped_bytes for row in plan.collectives) and plan.pallas_calls:
        plan.notes.append("a collective beside a Pallas call counts as covered by it")


def _kernel(name: str) -> str:
    """Without what XLA adds to tell instructions apart ("effattn_flash_delta.1.refs_5_")."""
    return name.split(".")[0]


def _price(plan: Plan, experiment: "Experiment", vocab_size: int, topology: Topology) -> None:
    from effattn.train.flops import flops_by_part

    chip = topology.chip
    peak = chip.bf16_tflops * 1e12 / chip.devices
    tokens = plan.batch_size * (plan.seq_len if plan.kind == "train" else 1)
    parts = flops_by_part(experiment.model, vocab_size=vocab_size, seq_len=plan.seq_len)
    count_flops(plan, parts or (), tokens)
    if parts is None:
        plan.notes.append("nobody has counted this model's FLOPs: MFU and compute are of the code")
    executed = plan.compiled_flops
    if plan.flops > executed:
        executed = plan.flops  # products inside Pallas calls are not in the text
        plan.notes.append(
            "compute is that of the model's own count: most products stand in Pallas calls, and "
            "what they compute again is not in it"
        )
    line = plan.roofline
    line.compute = executed / peak
    line.memory = plan.hbm_bytes / (chip.hbm_gb_per_s * 1e9 / chip.devices)
    line.collectives = sum(row.seconds for row in plan.collectives)
    line.exposed = sum(row.exposed_seconds for row in plan.collectives)
    line.step = max(line.compute, line.memory) + line.exposed
    terms = {"compute": line.compute, "memory": line.memory, "collectives": line.exposed}
    line.bound = max(terms, key=terms.__getitem__)
    if line.step > 0:
        plan.tokens_per_second = tokens / line.step
        plan.mfu_bound = plan.flops / (peak * line.step) if parts is not None else None


def main() -> int:
    from effattn.static.tpu import CompileError

    request = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # what compilers print is not the answer
    try:
        plan = _make(request)
    except (CompileError, RuntimeError) as error:
        print(f"Error: {' '.join(str(error).split())[:2000]}", file=sys.stderr)
        return 1
    except ValueError as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        ours = frame is not None and "effattn" in frame.tb_frame.f_globals.get("__name__", "")
        if not ours and frame is not None and frame.tb_frame.f_globals["__name__"] != "__main__":
            raise
        print(error, file=sys.stderr)
        return 2
    with os.fdopen(out, "w") as answer:
        answer.write(to_json(plan))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
