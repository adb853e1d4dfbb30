"""The search for values that fit: what it tries, in which order, and what it believes."""

import dataclasses

import pytest

from effattn.config import load_config
from effattn.plan.report import Memory, Plan, Roofline
from effattn.plan.search import candidates, search

CAPACITY = 1000


def plan(temporaries, *, method="compiled", state=300, mesh=None, step=1.0):
    memory = Memory(
        parameters=state // 3,
        optimizer=state - state // 3,
        temporaries=temporaries,
        total=state + temporaries,
        capacity=CAPACITY,
    )
    return Plan(
        name="fake",
        kind="train",
        method=method,
        topology="v5e:2x4",
        num_slices=1,
        devices=8,
        mesh={"data": 4, "fsdp": 2} if mesh is None else mesh,
        batch_size=32,
        seq_len=512,
        parameters=1,
        fits=memory.total <= CAPACITY,
        memory=memory,
        roofline=Roofline(step=step),
    )


def experiment(**values):
    overrides = {"data.batch_size": 32, "data.seq_len": 512, "mesh.fsdp": 2, "model.remat": "none"}
    overrides |= values
    return load_config("transformer_stdlib", [f"--config.{k}={v}" for k, v in overrides.items()])


def by_microbatches(run):
    """Temporaries of 1200, shared out among the microbatches."""
    return plan(1200 // run.train.accumulation, method="analytic", step=run.train.accumulation)


def test_every_candidate_goes_together_with_the_batch_and_the_devices():
    run, own = experiment(), plan(2000)
    found = candidates(run, own)
    assert len(found) > 50 and len({c.changes for c in found}) == len(found)
    assert [c.cost for c in found] == sorted(c.cost for c in found)
    for candidate in found:
        changed = candidate.applied(run)
        changed.mesh.data = None
        ways = 8 // changed.mesh.sequence
        assert changed.data.batch_size % (ways * changed.train.accumulation) == 0
        assert ways % changed.mesh.fsdp == 0
        assert changed.mesh.sequence == 1 or changed.sequence.kind != "local"
    fields = {name for c in found for name, _ in c.changes}
    assert {
        "mesh.fsdp",
        "mesh.sequence",
        "train.accumulation",
        "model.remat",
        "memory.mlp_tile",
        "memory.residual_on_host",
    } <= fields


def test_where_the_rows_are_fixed_they_stay_with_the_devices():
    run = experiment(**{"mesh.data": 4})
    for candidate in candidates(run, plan(2000)):
        mesh = candidate.applied(run).mesh
        assert mesh.data * mesh.fsdp * mesh.sequence == 8


def test_a_wrapper_says_what_its_base_recomputes():
    run = load_config("parscale_stdlib", ["--config.data.batch_size=32"])
    names = {name for c in candidates(run, plan(2000)) for name, _ in c.changes}
    assert "model.base.remat" in names and "model.remat" not in names


def test_counting_ranks_and_compiling_decides():
    compiled = []

    def compile_one(run):
        compiled.append(run.train.accumulation)
        # The compiler needs more than was counted: two microbatches do not fit after all.
        return plan(1800 // run.train.accumulation, step=run.train.accumulation)

    found = search(experiment(), plan(1200), by_microbatches, compile_one, 3)
    assert found.candidate is not None and found.plan.fits
    assert dict(found.candidate.changes)["train.accumulation"] == 4
    assert compiled == sorted(compiled) and found.compiled == len(compiled) <= 3


def test_what_compiling_has_shown_corrects_what_is_counted():
    """Twice the counted temporaries: two microbatches would need 300 + 2 x 600."""
    found = search(experiment(), plan(2400), by_microbatches, lambda run: plan(0), 1)
    assert dict(found.candidate.changes)["train.accumulation"] == 4


def test_without_a_compiler_the_first_that_fits_is_the_answer():
    own = plan(1200, method="analytic")
    found = search(experiment(), own, by_microbatches, None, 3)
    assert found.compiled == 0 and found.plan.method == "analytic"
    assert found.candidate.flags() == ["--config.train.accumulation=2"]


def test_nothing_found_is_said():
    never = search(experiment(), plan(5000), lambda run: plan(5000), None, 3)
    assert never.candidate is None and never.plan is None and never.counted > 50


@pytest.mark.parametrize("error", [ValueError("does not divide"), RuntimeError("gave up")])
def test_values_that_do_not_go_together_are_passed_over(error):
    def count(run):
        if run.model.remat != "full":
            raise error
        return plan(100)

    found = search(experiment(), plan(5000), count, None, 3)
    assert dict(found.candidate.changes)["model.remat"] == "full"


def test_counting_ends_with_its_time():
    found = search(experiment(), plan(5000), lambda run: plan(5000), None, 3, seconds=0.0)
    assert found.counted <= 1 and found.candidate is None


def test_a_candidate_leaves_the_experiment_as_it_was():
    run = experiment()
    before = dataclasses.replace(run.train)
    changed = candidates(run, plan(2000))[-1].applied(run)
    assert run.train == before and changed != run
