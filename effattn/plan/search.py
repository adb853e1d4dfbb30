"""Config values that make a plan fit: candidates by what they cost, counted first, then compiled.

A candidate changes how the devices are shared out (fsdp, sequence), how many microbatches a step
has, or what is kept for the backward pass. The analytic plan of each is quick; its temporaries are
corrected by what compilations have shown so far. Only a compilation says that one fits.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from effattn.plan.report import Plan

# Policies of recomputation, the least slowing first.
REMAT = ("none", "dots", "names", "full", "offload")
_SECONDS_TO_COUNT = 90
# The share of the capacity that what was counted may take.
_MARGIN = 0.95


@dataclass(frozen=True)
class Candidate:
    """changes: field -> value. cost: how much it is thought to slow the step."""

    changes: tuple[tuple[str, Any], ...]
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


@dataclass(frozen=True)
class Found:
    """What a search has to say. plan: of the candidate that fits, None where none did.

    counted, compiled: how many were tried each way.
    """

    candidate: Candidate | None
    plan: Plan | None
    counted: int
    compiled: int


def search(
    experiment: Any,
    plan: Plan,
    count: Callable[[Any], Plan],
    compile_one: Callable[[Any], Plan] | None,
    tries: int,
    seconds: float = _SECONDS_TO_COUNT,
) -> Found:
    """Values with which `plan`, the experiment's own, would fit.

    count: the analytic plan of an experiment; compile_one: the compiled one, None where there is no
    compiler: then the first that is counted to fit is the answer. tries: compilations at most.
    seconds: for counting. Both raise ValueError or RuntimeError for what does not go together.
    """
    counted = compiled = 0
    known: list[tuple[Candidate, Plan]] = []  # counted, and not compiled
    correction, deadline = _correction(experiment, plan, count), time.monotonic() + seconds
    waiting = iter(candidates(experiment, plan))
    while True:
        likely = [(c, p) for c, p in known if _needed(p, correction) <= _MARGIN]
        if len(likely) < (1 if compile_one is None else tries - compiled + 2):
            candidate = next(waiting, None) if time.monotonic() < deadline else None
            if candidate is not None:
                try:
                    known.append((candidate, count(candidate.applied(experiment))))
                    counted += 1
                except (ValueError, RuntimeError):
                    pass  # it does not fit the model or the devices
                continue
        if not likely or compiled == tries:
            return Found(None, None, counted, compiled)
        best = min(likely, key=lambda entry: (entry[1].roofline.step, entry[0].cost))
        if compile_one is None:
            return Found(*best, counted, compiled)
        known.remove(best)
        compiled += 1
        try:
            found = compile_one(best[0].applied(experiment))
        except (ValueError, RuntimeError):
            continue
        if found.fits:
            return Found(best[0], found, counted, compiled)
        correction = max(correction, _ratio(found, best[1]))


def _needed(counted: Plan, correction: float) -> float:
    """Share of the capacity, with temporaries as a compilation would have them."""
    memory = counted.memory
    return (memory.total + (correction - 1) * memory.temporaries) / (memory.capacity or 1)


def _ratio(compiled: Plan, counted: Plan) -> float:
    """Compiled temporaries over counted ones, within reason."""
    if not counted.memory.temporaries:
        return 1.0
    return min(4.0, max(0.4, compiled.memory.temporaries / counted.memory.temporaries))


def _correction(experiment: Any, plan: Plan, count: Callable[[Any], Plan]) -> float:
    """The ratio of the plan that both know; 1 where it is not compiled."""
    if plan.method == "analytic":
        return 1.0
    try:
        return _ratio(plan, count(experiment))
    except (ValueError, RuntimeError):
        return 1.0


def candidates(experiment: Any, plan: Plan) -> list[Candidate]:
    """All of them, the least slowing first."""
    return sorted(_all(experiment, plan), key=lambda c: (c.cost, len(c.changes)))


def _all(experiment: Any, plan: Plan) -> Iterator[Candidate]:
    data, train = experiment.data, experiment.train
    fsdp, parts = plan.mesh["fsdp"], plan.mesh.get("sequence", 1)
    ways = plan.mesh.get("data", 1) * fsdp
    remat_field, remat = _remat(experiment.model)
    for more in _powers(1, ways):  # devices taken from the rows for the tokens of a row
        sequence, rows = parts * more, ways // more
        if ways % more or data.seq_len % (2 * sequence) or data.batch_size % rows:
            continue
        for split in _powers(min(fsdp, rows), rows):
            if rows % split:
                continue
            for microbatches in _powers(train.accumulation, data.batch_size // rows):
                if data.batch_size % (rows * microbatches):
                    continue
                for policy in REMAT[REMAT.index(remat) :] if remat in REMAT else (remat,):
                    for long, slower in _long(experiment):
                        changes: dict[str, Any] = {}
                        if more > 1:
                            changes["mesh.sequence"] = sequence
                            if experiment.sequence.kind == "local":
                                changes["sequence.kind"] = "ring"
                        if split != fsdp:
                            changes["mesh.fsdp"] = split
                        if experiment.mesh.data not in (None, rows // split):
                            changes["mesh.data"] = rows // split
                        if microbatches != train.accumulation:
                            changes["train.accumulation"] = microbatches
                        if policy != remat:
                            changes[remat_field] = policy
                        changes |= long
                        cost = slower + 2 * math.log2(more) + abs(math.log2(split / fsdp)) / 2
                        cost += math.log2(microbatches / train.accumulation)
                        if policy != remat:
                            cost += REMAT.index(policy) - REMAT.index(remat)
                        if changes:
                            yield Candidate(tuple(changes.items()), cost)


def _remat(model: Any) -> tuple[str, Any]:
    """The field that holds the policy, and its value; a wrapper's base has it."""
    if not hasattr(model, "remat") and hasattr(model, "base"):
        return "model.base.remat", getattr(model.base, "remat", None)
    return "model.remat", getattr(model, "remat", None)


def _long(experiment: Any) -> Iterator[tuple[dict[str, Any], float]]:
    """Values of `effattn.nn.memory`, each with what it slows."""
    yield {}, 0.0
    if _remat(experiment.model)[1] not in REMAT:
        return
    memory, tile = experiment.memory, max(1, experiment.data.seq_len // 8)
    if memory.mlp_tile is None and not memory.hidden_on_host:
        yield {"memory.mlp_tile": tile}, 1.5
    if not memory.residual_on_host:
        yield {"memory.residual_on_host": True}, 2.5
        if memory.mlp_tile is None and not memory.hidden_on_host:
            yield {"memory.residual_on_host": True, "memory.mlp_tile": tile}, 4.0


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2
