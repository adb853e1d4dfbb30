"""A plan as a value: plain fields, to JSON and back. Every second in it is arithmetic, not a time
that was measured; every byte is read off the compiled program, or counted from shapes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(kw_only=True)
class Memory:
    """Bytes on one device. arguments are parameters + optimizer + batch + other; outputs that take
    the place of arguments are `aliased`. temporaries: XLA's peak beside them. capacity: what the
    compiler may use; None where it did not say. host: in the host's memory, for one device. parts:
    of the temporaries, where they are counted and not compiled.
    """

    parameters: int = 0
    optimizer: int = 0
    batch: int = 0
    other: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    host: int = 0
    total: int = 0
    capacity: int | None = None
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Traffic:
    """The collectives of one kind over the same mesh axes. bytes: received by one device in a step.

    seconds: at the published speed of the links; exposed_seconds: what no work stands beside.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    overlapped_bytes: int
    seconds: float
    exposed_seconds: float
    across_slices: bool = False


@dataclass(kw_only=True)
class Roofline:
    """Seconds of one step on one device at published peaks; step: the largest of compute and
    memory, and the exposed collectives on top. bound: the largest term."""

    compute: float = 0.0
    memory: float = 0.0
    collectives: float = 0.0
    exposed: float = 0.0
    step: float = 0.0
    bound: str = "compute"


@dataclass(kw_only=True)
class Plan:
    """kind: "train" or "decode". method: "compiled", or "analytic" for meshes that no compiler
    here knows. fits: None where the compiler failed for another reason (`message`). flops: of the
    model, forward and backward, for one device and step; compiled_flops: matrix products in the
    program, recomputation among them, Pallas calls not. flops_by_part: the model's, by kind of
    layer and part. pallas: (name, VMEM bytes). overrides: --config.x=y of the command.
    """

    name: str
    kind: str
    method: str
    topology: str
    num_slices: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    parameters: int
    fits: bool | None = None
    message: str | None = None
    memory: Memory = field(default_factory=Memory)
    collectives: list[Traffic] = field(default_factory=list)
    flops: float = 0.0
    flops_by_part: dict[str, float] = field(default_factory=dict)
    compiled_flops: float = 0.0
    hbm_bytes: float = 0.0
    roofline: Roofline = field(default_factory=Roofline)
    tokens_per_second: float | None = None
    mfu_bound: float | None = None
    pallas: list[tuple[str, int | None]] = field(default_factory=list)
    pallas_calls: int = 0
    notes: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0
    compile_host_gib: float = 0.0
    versions: dict[str, str | None] = field(default_factory=dict)
    date: str = ""
    command: str = ""
    overrides: list[str] = field(default_factory=list)


def count_flops(plan: Plan, parts: Sequence[Any], tokens: int) -> None:
    """Enters the FLOPs of a step from what one token's forward pass costs.

    parts: of `effattn.train.flops.flops_by_part`. tokens: of the step. Training counts thrice.
    """
    each = (3 if plan.kind == "train" else 1) * tokens / plan.devices
    for part in parts:
        name = f"{part.layers} x {part.layer}: {part.part}"
        plan.flops_by_part[name] = plan.flops_by_part.get(name, 0.0) + each * part.flops
    plan.flops = sum(plan.flops_by_part.values())


def to_json(plan: Plan) -> str:
    return json.dumps({"schema": SCHEMA, **asdict(plan)}, indent=1) + "\n"


def from_json(text: str, where: str = "plan") -> Plan:
    """Raises ValueError, in a sentence, where `text` is no plan."""
    try:
        found: dict[str, Any] = json.loads(text)
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise TypeError
        found["memory"] = Memory(**found["memory"])
        found["roofline"] = Roofline(**found["roofline"])
        found["collectives"] = [
            Traffic(**{**row, "axes": tuple(row["axes"])}) for row in found["collectives"]
        ]
        found["pallas"] = [(name, size) for name, size in found["pallas"]]
        return Plan(**found)
    except (json.JSONDecodeError, TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: not a plan that `effattn plan --json` wrote") from None


def read(path: Path) -> Plan:
    return from_json(path.read_text(), str(path))
