"""`Plan`: what one step of an experiment takes of every chip, as plain values that JSON keeps.

A plan is compiled (`effattn.plan.compiled`: the compiler's own buffers, collectives and work) or
analytic (`effattn.plan.analytic`: counted from the config and from the traced program). Both fill
the same object; what a method cannot know is None. Bytes and seconds are those of one chip and one
step; nothing here is a measurement on a chip.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
METHODS = ("compiled", "analytic")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip.

    parameters, optimizer, batch, other: what the step is given (decode: `other` has the states).
    outputs: what it returns, of which `aliased` lie where arguments lay. temporaries: the rest that
    is alive at the worst moment; `parts` says of what, where it is counted and not compiled. code:
    of the program. capacity: usable by one program. host: bytes in the host's memory, per chip.
    """

    parameters: int
    optimizer: int
    batch: int
    other: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    capacity: int
    host: int = 0
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.other

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Collectives of one kind over the same mesh axes.

    kind: all-gather | reduce-scatter | all-reduce | all-to-all | collective-permute. count: how
    often one runs in a step. bytes: received by one chip, of which `overlapped` while it computes.
    seconds: at the published peak of `network`; exposed: those that no work hides.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    overlapped: int
    seconds: float
    exposed: float
    network: str


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """As `effattn.train.flops.Part`: forward, per token, all layers of a kind together."""

    layer: str
    layers: int
    part: str
    flops: float


@dataclass(frozen=True, kw_only=True)
class PallasCall:
    """One kernel of the program. vmem: bytes it allots on its core."""

    name: str
    count: int
    vmem: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """kind: train | decode. overrides: config values that differ from the config's own.

    peak_flops: of one chip per second. model_flops: of one chip and step, forward and backward;
    recomputed_flops: forward passes done again for the backward pass. hlo_flops, hbm_bytes: what
    the compiled program computes outside Pallas, and moves to and from memory. roofline: seconds by
    term ("compute", "memory", and the exposed part of collectives over each network).
    """

    method: str
    kind: str
    config: str
    overrides: tuple[str, ...]
    topology: str
    chip: str
    chips: int
    num_slices: int
    mesh: dict[str, int]
    num_parameters: int
    tokens: int
    memory: Memory
    collectives: tuple[Moved, ...]
    flops: tuple[LayerFlops, ...]
    peak_flops: float
    model_flops: float | None
    recomputed_flops: float | None
    hlo_flops: float | None
    hbm_bytes: float | None
    roofline: dict[str, float]
    pallas: tuple[PallasCall, ...]
    compile_seconds: float | None
    compile_host_bytes: int | None
    versions: dict[str, str]
    date: str
    command: str
    notes: tuple[str, ...] = ()

    @property
    def largest_term(self) -> str:
        """The term of the roofline that bounds the step."""
        return max(self.roofline, key=lambda term: self.roofline[term])

    @property
    def step_seconds(self) -> float:
        """No step is quicker: work and memory overlap each other, exposed collectives nothing."""
        hidden = [self.roofline[term] for term in ("compute", "memory") if term in self.roofline]
        shown = [s for term, s in self.roofline.items() if term not in ("compute", "memory")]
        return max(hidden, default=0.0) + sum(shown)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all chips, at most."""
        return self.tokens / self.step_seconds if self.step_seconds > 0 else None

    @property
    def mfu_bound(self) -> float | None:
        """The share of the chips' peak that model FLOPs can reach; recomputation is no model's."""
        if self.model_flops is None or self.step_seconds <= 0:
            return None
        return self.model_flops / self.peak_flops / self.step_seconds

    def to_json(self) -> str:
        """All fields, and under "derived" what follows from them."""
        derived = {
            "arguments": self.memory.arguments,
            "total": self.memory.total,
            "fits": self.memory.fits,
            "largest_term": self.largest_term,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu_bound": self.mfu_bound,
        }
        values = {"format": FORMAT, **dataclasses.asdict(self), "derived": derived}
        return json.dumps(values, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> "Plan":
        """The plan that `to_json` wrote. Raises ValueError that begins with `where` for others."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: got no JSON ({error}), expected a plan") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{where}: got format {found}, expected a plan of format {FORMAT}, as "
                "`effattn plan --json` writes it"
            )
        try:
            return _from_values(cls, {k: v for k, v in values.items() if k != "format"})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: a field of the plan is missing or wrong: {error}") from None


def read_plan(path: Path, where: str) -> Plan:
    """The plan in a file. where: how the caller names it in an error."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: cannot read {path}: {error}") from None
    return Plan.from_json(text, where=f"{where}: {path}")


def _from_values(cls: type[Plan], values: Mapping[str, Any]) -> Plan:
    given = {f.name: values[f.name] for f in dataclasses.fields(cls)}
    given["memory"] = Memory(**given["memory"])
    for name, row in (("collectives", Moved), ("flops", LayerFlops), ("pallas", PallasCall)):
        given[name] = tuple(row(**entry) for entry in given[name])
    moved = (dataclasses.replace(m, axes=tuple(m.axes)) for m in given["collectives"])
    given["collectives"] = tuple(moved)
    for name in ("overrides", "notes"):
        given[name] = tuple(given[name])
    plan = cls(**given)
    if plan.method not in METHODS or not math.isfinite(plan.step_seconds):
        raise TypeError(f"method {plan.method!r}, step of {plan.step_seconds} s")
    return plan
