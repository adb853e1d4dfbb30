"""Plans: one small step compiled for a v5e that is not here, its figures against hand counts."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.cli import main
from effattn.configs import transformer_stdlib
from effattn.plan import render
from effattn.plan.analytic import analytic_plan
from effattn.plan.compiled import _no_room, compile_plan, vocabulary
from effattn.plan.report import Plan, from_json, to_json
from effattn.plan.topology import topology_of
from effattn.static.collectives import collectives
from effattn.static.module import parse
from effattn.static.tpu import compile_for, describe_mesh
from effattn.static.work import work_of


def experiment():
    made = transformer_stdlib.get_config()
    made.model.num_layers, made.model.width, made.model.num_heads = 2, 128, 2
    made.data.batch_size, made.data.seq_len = 8, 256
    made.mesh.fsdp, made.mesh.data = 4, 1
    made.optimizer.name = "adamw"
    return made


@pytest.fixture(scope="module")
def plan():
    return compile_plan(experiment(), "v5e:2x2", name="small", command="effattn plan")


def test_memory_is_what_the_shapes_say(plan):
    memory = plan.memory
    assert plan.fits and plan.devices == 4 and plan.mesh == {"data": 1, "fsdp": 4}
    # Every parameter has an axis that four devices divide.
    assert memory.parameters == plan.parameters * 4 // 4
    assert 2 * memory.parameters <= memory.optimizer < 2 * memory.parameters + 10_000
    tokens = 8 * 256 // 4
    # tokens, targets, weights, positions and segments of four bytes, one byte of validity
    assert memory.batch == tokens * (5 * 4 + 1)
    assert memory.capacity == 16 * 2**30
    state = memory.parameters + memory.optimizer
    assert 0 <= memory.aliased - state < 2**16, "the state is donated"


def test_what_it_moves_is_named_by_axis(plan):
    by_kind = {row.kind: row for row in plan.collectives if row.axes == ("fsdp",)}
    # The forward pass gathers at least the matrices, which are all but a few parameters.
    assert by_kind["all-gather"].bytes > 0.9 * plan.parameters * 4 * 3 / 4
    assert all(set(row.axes) <= {"fsdp"} for row in plan.collectives)
    assert all(row.overlapped_bytes <= row.bytes for row in plan.collectives)


def test_the_roofline_adds_up(plan):
    line = plan.roofline
    assert line.step == pytest.approx(max(line.compute, line.memory) + line.exposed)
    assert plan.tokens_per_second == pytest.approx(8 * 256 / line.step)
    assert 0 < plan.mfu_bound < 1
    assert any("flash_forward" in name for name, _ in plan.pallas) and plan.pallas_calls >= 4


def test_it_goes_to_json_and_back(plan):
    assert from_json(to_json(plan)) == plan
    for text in ("[]", "{}", "no", '{"schema": 1}'):
        with pytest.raises(ValueError, match="not a plan that"):
            from_json(text)


def test_it_is_shown_in_every_form(plan):
    text = render.to_text(plan)
    assert "fits" in text and "all-gather" in text and "Static" in text
    assert render.to_markdown(plan).startswith("# Plan: small")
    page = render.to_html(plan)
    assert page.startswith("<!doctype html>") and "http" not in page
    assert render.to_png(plan).startswith(b"\x89PNG")
    assert render.difference(plan, plan) == "no difference"
    changed = dataclasses.replace(plan, fits=False, tokens_per_second=1.0)
    assert "fits" in render.difference(plan, changed)


def test_the_compiler_says_what_does_not_fit(plan):
    failed = dataclasses.replace(plan, memory=dataclasses.replace(plan.memory))
    for message in (
        "RESOURCE_EXHAUSTED: Ran out of memory. Used 19.88G of 15.75G hbm. Exceeded by 4.13G",
        "the total memory required for HLO temporaries (19.88G) exceeds available HBM (15.75G).",
    ):
        assert _no_room(failed, message) and failed.fits is False
        assert failed.memory.total == int(19.88 * 2**30)
        assert failed.memory.capacity == int(15.75 * 2**30)
        assert "19.88 GiB are needed" in failed.message
    assert not _no_room(failed, "INTERNAL: Mosaic failed")


def test_a_counted_plan_has_the_compilers_arguments(plan):
    counted = analytic_plan(experiment(), "v5e:2x2", name="small")
    for name in ("parameters", "optimizer", "batch"):
        assert getattr(counted.memory, name) == getattr(plan.memory, name), name
    assert (counted.parameters, counted.mesh) == (plan.parameters, plan.mesh)
    assert counted.flops_by_part == plan.flops_by_part and counted.flops == plan.flops > 0
    assert {name for name, _ in plan.pallas} == {name for name, _ in counted.pallas}


def run(*arguments):
    return main(["plan", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v9:2x2"], "--topology: got 'v9:2x2', expected one of v5e:2x2"),
        (["--topology=v5e:3x5"], "--topology: got 'v5e:3x5', expected one of v5e:2x2"),
        (["--topology=v5e-7"], "--topology: got 'v5e-7'"),
        (["--topology=v5e:2x2", "--num-slices=0"], "--num-slices: got 0"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "mesh.fsdp: got 3, expected a divisor"),
        (["--topology=v5e:2x2", "--diff=README.md"], "README.md: not a plan"),
    ],
)
def test_a_mistake_is_a_sentence_and_code_2(arguments, says, capsys):
    assert run("--config=quickstart", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_names_of_topologies():
    assert topology_of("v5p-256").name == "v5p:4x4x8"
    assert topology_of("v5e-256").name == "v5e:16x16"
    assert topology_of("v5litepod-16").name == "v5e:4x4"
    assert topology_of("v5p:8x8x8").chips == 512
    assert topology_of("tpu7x:4x4x4").devices == 128
    assert topology_of("v5e:16x16", 2).devices == 512


def test_the_vocabulary_must_be_known():
    made = experiment()
    assert vocabulary(made) == 257
    made.data.tokenizer = "some/tokenizer.json"
    with pytest.raises(ValueError, match="data.vocab_size: got None, expected the size of"):
        vocabulary(made)
    made.data.vocab_size = 5
    assert vocabulary(made) == 5


@pytest.mark.slow
def test_what_does_not_fit_is_code_3_with_values_that_would(tmp_path):
    command = [sys.executable, "-m", "effattn", "plan", "--config=transformer_stdlib"]
    command += ["--topology=v5e:2x2", "--config.data.batch_size=2048", "--config.mesh.data=1"]
    command += ["--config.mesh.fsdp=4", "--hbm-gib=4", "--config.data.seq_len=512"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "does not fit" in done.stdout and "it would fit with --config." in done.stdout


def test_products_and_loops_are_counted_as_by_hand():
    """v5e:2x2, static: a scan of 5 products over two axes of a mesh."""
    mesh = describe_mesh("v5e:2x2", {"data": 2, "tensor": 2})

    def chain(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct(
        (5, 256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, None, "tensor"))
    )
    module = parse(compile_for("v5e:2x2", chain, x, w, mesh=mesh).as_text())
    work = work_of(module)
    # However it is split, a device has at least a quarter of the products and at most all.
    whole = 5 * 2 * 512 * 256 * 256
    assert whole / 4 <= work.flops <= whole / 2
    found = collectives(module, mesh)
    assert found and {axis for c in found for axis in c.axes} == {"tensor"}


def test_a_plan_of_its_fields_alone():
    bare = Plan(
        name="x", kind="train", method="compiled", topology="v5e:2x2", num_slices=1, devices=4,
        mesh={"data": 4}, batch_size=1, seq_len=1, parameters=1, message="the compiler failed",
    )  # fmt: skip
    assert "the compiler failed" in render.to_text(bare)


LOOP = """HloModule loops
%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %arg = (s32[], f32[8]) parameter(0)
  %counter = s32[] get-tuple-element(%arg), index=0
  %value = f32[8] get-tuple-element(%arg), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%counter, %step)
  ROOT %result = (s32[], f32[8]) tuple(%next, %value)
}}
%condition (arg.1: (s32[], f32[8])) -> pred[] {{
  %arg.1 = (s32[], f32[8]) parameter(0)
  %at = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}}
ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {{
  %x = f32[8] parameter(0)
  %first = s32[] constant({first})
  %counted = s32[] copy(%first)
  %start = (s32[], f32[8]) tuple(%counted, %x)
  ROOT %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
}}
"""


@pytest.mark.parametrize(
    "first, limit, step, trips", [(0, 8, 1, 8), (0, 8, 2, 4), (0, 7, 2, 4), (1, 8, 1, 7)]
)
def test_a_loop_counts_by_its_own_step_from_its_own_start(first, limit, step, trips):
    """XLA unrolls a product that gathers by and by, and its loop then counts by two. Between slices
    it runs the first turn before the loop."""
    module = parse(LOOP.format(first=first, limit=limit, step=step))
    assert module.trips(module.computations[module.entry][-1]) == trips
