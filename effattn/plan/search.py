"""Config values that make a plan fit: candidates by what they free, the best of them compiled.

The needs of a candidate are told from the plan that did not fit: parameters and optimizer state go
by the ways in which they are split, temporaries by the tokens of a microbatch and by what the
backward pass keeps. That ranks; only a compilation says that one fits.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from effattn.plan.report import Plan

# The share of a layer's temporaries that stays under each policy, as a rank alone.
_KEPT = {"none": 1.0, "dots": 0.6, "names": 0.3, "full": 0.2, "offload": 0.18}


@dataclass(frozen=True)
class Candidate:
    """changes: field -> value. bytes: what it is thought to need. cost: how much it slows."""

    changes: tuple[tuple[str, Any], ...]
    bytes: float
    cost: float

    def flags(self) -> list[str]:
        return [f"--config.{name}={value}" for name, value in self.changes]

    def applied(self, experiment: Any) -> Any:
        changed = copy.deepcopy(experiment)
        for name, value in self.changes:
            *path, last = name.split(".")
            owner = changed
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, last, value)
        return changed


def candidates(experiment: Any, plan: Plan) -> list[Candidate]:
    """Those that may fit by the estimate, the least slowing first; then the smallest others."""
    capacity = plan.memory.capacity or 0
    found = list(_all(experiment, plan))
    fitting = sorted((c for c in found if c.bytes <= capacity), key=lambda c: (c.cost, c.bytes))
    others = sorted((c for c in found if c.bytes > capacity), key=lambda c: c.bytes)
    return fitting + others


def _all(experiment: Any, plan: Plan) -> Iterator[Candidate]:
    memory, mesh = plan.memory, experiment.mesh
    state, work = memory.parameters + memory.optimizer, memory.temporaries
    others = math.prod(plan.mesh.values()) // (plan.mesh.get("data", 1) * plan.mesh["fsdp"])
    batch_ways = plan.mesh.get("data", 1) * plan.mesh["fsdp"]
    rows = experiment.data.batch_size
    remat = getattr(experiment.model, "remat", None)
    for fsdp in _powers(plan.mesh["fsdp"], batch_ways):
        for more in _powers(1, 16):  # devices taken from the batch for the sequence
            sequence = mesh.sequence * more
            ways = batch_ways // more
            if batch_ways % more or ways < fsdp or rows % ways or others % mesh.sequence:
                continue
            if more > 1 and (
                mesh.sequence == 1 or experiment.data.seq_len % (2 * sequence) or fsdp > ways
            ):
                continue
            for accumulation in _powers(experiment.train.accumulation, rows // ways):
                for policy in _policies(remat):
                    changes: dict[str, Any] = {}
                    if fsdp != plan.mesh["fsdp"]:
                        changes["mesh.fsdp"] = fsdp
                    if more > 1:
                        changes["mesh.sequence"] = sequence
                    if accumulation != experiment.train.accumulation:
                        changes["train.accumulation"] = accumulation
                    if policy != remat:
                        changes["model.remat"] = policy
                    if not changes:
                        continue
                    split = experiment.train.accumulation / accumulation
                    kept = 1.0
                    if policy is not None and remat is not None:
                        kept = _KEPT[policy] / _KEPT[remat]
                    size = state * plan.mesh["fsdp"] / fsdp + work * split * kept
                    cost = math.log2(accumulation) + 2 * math.log2(more)
                    if policy is not None and policy != remat:
                        cost += list(_KEPT).index(policy)
                    cost += 0.5 * math.log2(fsdp / plan.mesh["fsdp"])
                    yield Candidate(tuple(changes.items()), size, cost)


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _policies(remat: str | None) -> tuple[str | None, ...]:
    if remat is None:
        return (None,)
    known = list(_KEPT)
    return tuple(known[known.index(remat) :]) if remat in known else (remat,)


def search(
    experiment: Any, plan: Plan, compile_one: Callable[[Any], Plan], tries: int
) -> tuple[Candidate, Plan] | None:
    """The first candidate that a compilation confirms; None after `tries` that it does not."""
    for candidate in candidates(experiment, plan)[:tries]:
        try:
            found = compile_one(candidate.applied(experiment))
        except (ValueError, RuntimeError):
            continue  # it fits the devices' memory but not the model
        if found.fits:
            return candidate, found
    return None
