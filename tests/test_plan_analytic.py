"""Plans that are counted: against the compiler where it is exact, and against formulas."""

import dataclasses
import math

import pytest

from effattn import cli
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, TrainConfig
from effattn.models.based import BasedModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig
from effattn.plan import render
from effattn.plan.analytic import analytic_plan
from effattn.plan.compiled import compile_plan
from effattn.plan.machine import machine_of
from effattn.plan.picture import memory_slices, to_png
from effattn.plan.report import Roofline

VOCAB = 512


def experiment(
    *, mesh=None, sequence=None, batch_size=16, seq_len=256, remat="none", accumulation=1
):
    """Two layers of width 256, four heads of 64, 0.9 M parameters each."""
    return Experiment(
        model=TransformerConfig(
            num_layers=2, width=256, num_heads=4, num_kv_heads=2, mlp_width=768, remat=remat
        ),
        data=DataConfig(batch_size=batch_size, seq_len=seq_len, vocab_size=VOCAB),
        train=TrainConfig(compute_dtype="bfloat16", accumulation=accumulation),
        mesh=MeshConfig() if mesh is None else mesh,
        sequence=SequenceConfig() if sequence is None else sequence,
    )


def moved(plan, kind, axes):
    return sum(row.bytes for row in plan.collectives if (row.kind, row.axes) == (kind, axes))


ZIGZAG = {"kind": "ring", "zigzag": True}


# A minute of compilation each; `test_plan.py` has the arguments of one more.
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, sequence, model",
    [
        ({"fsdp": 4}, {}, "conv"),
        ({"fsdp": 4}, {}, "transformer"),
        ({"fsdp": 2, "tensor": 2}, {}, "transformer"),
        ({"fsdp": 2, "sequence": 2}, ZIGZAG, "transformer"),
    ],
)
def test_a_counted_plan_has_the_compilers_arguments_and_about_its_temporaries(
    mesh, sequence, model
):
    run = experiment(
        # Long enough that a v5e does not hold its arrays in the 128 MiB of VMEM.
        mesh=MeshConfig(**mesh),
        sequence=SequenceConfig(**sequence),
        seq_len=8192,
        remat="full",
    )
    if model == "conv":  # without Pallas kernels, whose products are not in the compiled text
        run.model = BasedModelConfig(num_layers=2, width=256, pattern=("conv",), remat="full")
    counted = analytic_plan(run, "v5e:2x2", name="tiny")
    compiled = compile_plan(run, "v5e:2x2", name="tiny", timeout_seconds=300)
    for name in ("parameters", "optimizer", "batch"):
        assert getattr(counted.memory, name) == getattr(compiled.memory, name), name
    assert counted.parameters == compiled.parameters
    assert counted.flops == compiled.flops > 0
    assert counted.flops_by_part == compiled.flops_by_part
    if model == "conv":
        assert counted.compiled_flops == pytest.approx(compiled.compiled_flops, rel=0.01)
    # The program is not compiled: fusion, padding and the schedule are the rest.
    ratio = counted.memory.temporaries / compiled.memory.temporaries
    assert 1 / 1.5 < ratio < 1.5
    assert set(counted.memory.parts) and not compiled.memory.parts
    assert sum(counted.memory.parts.values()) == pytest.approx(counted.memory.temporaries, abs=4)


def test_bytes_of_a_ring_are_those_of_its_formula():
    ways, batch, seq_len = 4, 16, 256
    sequence = SequenceConfig(kind="ring", zigzag=True)
    mesh = MeshConfig(fsdp=2, sequence=ways)
    plan = analytic_plan(experiment(mesh=mesh, sequence=sequence), "h100:8x1", name="ring")
    tokens = batch // 2 * seq_len // ways
    keys = 2 * tokens * 2 * 64 * 2  # keys and values of 2 heads of 64 in bfloat16
    ids = 2 * tokens * 4  # positions and documents
    hops = ways - 1
    forward = hops * (keys + ids)
    backward = hops * (keys + ids) + ways * 2 * keys  # gradients in float32 go all the way round
    permuted = moved(plan, "collective-permute", ("sequence",))
    # Not every hop needs both ids.
    assert 2 * (forward + backward) - 4 * hops * ids <= permuted <= 2 * (forward + backward)


def test_parameters_are_gathered_twice_and_their_gradients_scattered_once():
    plan = analytic_plan(
        experiment(mesh=MeshConfig(fsdp=8), accumulation=2), "h100:8x1", name="fsdp"
    )
    matrices = 2 * (256 * 256 * 3 + 3 * 256 * 768) + VOCAB * 256  # query, out; key and value
    norms = 2 * 2 * 256 + 256
    share = 7 / 8
    gathered = 2 * 2 * share * (2 * matrices + 4 * norms)
    assert moved(plan, "all-gather", ("fsdp",)) == pytest.approx(gathered, rel=1e-6)
    scattered = 2 * share * 4 * (matrices + norms)
    assert moved(plan, "reduce-scatter", ("fsdp",)) == pytest.approx(scattered, rel=1e-6)
    assert moved(plan, "all-reduce", ("data",)) == 0


def test_tensor_parallel_layers_sum_each_half_of_a_block_both_ways():
    plan = analytic_plan(experiment(mesh=MeshConfig(tensor=4, data=2)), "h100:8x1", name="tensor")
    tokens = 16 // 2 * 256
    each = 2 * tokens * 256 * 2 * 3 / 4
    assert moved(plan, "all-reduce", ("tensor",)) == 2 * 2 * 2 * each  # layers, halves, passes


def test_products_of_a_step_are_those_of_the_model_and_of_what_is_computed_again():
    whole, again = (
        analytic_plan(experiment(remat=remat), "a100:1", name="one", vocab_size=VOCAB)
        for remat in ("none", "full")
    )
    pairs = sum(v for name, v in whole.flops_by_part.items() if name.endswith("pairs"))
    # XLA's attention computes whole blocks of pairs, of which the mask lets some through.
    assert whole.flops - pairs < whole.compiled_flops < whole.flops + 2 * pairs
    layers = sum(v for n, v in whole.flops_by_part.items() if "head" not in n) + pairs
    assert whole.compiled_flops < again.compiled_flops <= whole.compiled_flops + layers / 3


def test_less_is_kept_by_smaller_microbatches_and_by_recomputation():
    def temporaries(**options):
        plan = analytic_plan(experiment(seq_len=1024, **options), "h100:1", name="one")
        return plan.memory.temporaries

    whole = temporaries()
    assert temporaries(accumulation=4) < 0.5 * whole
    assert temporaries(remat="full") < 0.7 * whole


def test_a_row_over_devices_leaves_each_its_part():
    run = experiment(seq_len=2048, remat="full")
    one = analytic_plan(run, "h100:1", name="one").memory
    run.mesh.sequence, run.sequence.kind = 8, "ring"
    eight = analytic_plan(run, "h100:8x1", name="eight").memory
    assert eight.batch == one.batch / 8
    assert eight.parts["kept for the backward pass"] == pytest.approx(
        one.parts["kept for the backward pass"] / 8, rel=0.1
    )


def test_what_crosses_nodes_takes_their_adapters():
    """One member on each of 4 nodes: each has its own adapter. 8 on each: they share what comes."""
    within = analytic_plan(experiment(mesh=MeshConfig(fsdp=8)), "h100:8x1", name="n")
    apart = analytic_plan(experiment(mesh=MeshConfig(fsdp=4, data=1)), "h100:1x4", name="n")
    both = analytic_plan(experiment(mesh=MeshConfig(fsdp=32), batch_size=32), "h100:8x4", name="n")
    for plan, speed in ((within, 450e9), (apart, 50e9), (both, 400e9)):
        row = next(r for r in plan.collectives if r.kind == "all-gather")
        assert row.seconds == pytest.approx(row.bytes / speed, rel=1e-6)
        assert row.across_slices == (plan is not within)
        assert row.exposed_seconds <= row.seconds
    line = both.roofline
    assert line.step == pytest.approx(max(line.compute, line.memory) + line.exposed)


def test_hosts_hold_what_waits_there():
    run = experiment(remat="full")
    run.model.num_layers = 12  # more than are unrolled
    run.memory.residual_on_host = True
    found = analytic_plan(run, "h100:1", name="host").memory
    assert found.host == 12 * 16 * 256 * 256 * 4


@pytest.mark.parametrize(
    "topology, says",
    [
        ("h100", "expected GPUs on a node x nodes"),
        ("h100:0x2", "expected GPUs on a node x nodes"),
        ("k80:8x1", "expected one of v5e:2x2"),
        ("v5e:3x5", "expected one of v5e:2x2"),
    ],
)
def test_unknown_machines_are_refused_with_the_known_ones(topology, says):
    with pytest.raises(ValueError, match=says):
        machine_of(topology)


def test_gpus_have_nodes_instead_of_slices():
    assert machine_of("H100:8x4").devices == 32
    with pytest.raises(ValueError, match="--num-slices: got 2"):
        machine_of("h100:8", num_slices=2)


def test_the_command_counts_for_gpus_and_names_what_would_fit(capsys, tmp_path):
    page = tmp_path / "plan.html"
    arguments = ["plan", "--config=quickstart", "--topology=h100:8x1", f"--html={page}"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "analytic" in said and "head: logits" in said and "fits" in said
    assert "http" not in page.read_text().split("<style>")[0]

    small = [*arguments, "--hbm-gib=0.015"]
    assert cli.main(small) == 3
    said = capsys.readouterr().out
    flags = next(s for s in said.splitlines() if "it would fit with" in s)
    flags = [word for word in flags.split() if word.startswith("--config.")]
    assert "it would fit with" in page.read_text()
    assert flags and cli.main([*small, *flags]) == 0
    capsys.readouterr()


def test_a_picture_shows_all_of_the_memory_and_needs_no_roofline():
    plan = analytic_plan(experiment(mesh=MeshConfig(fsdp=8)), "h100:8x1", name="picture")
    slices = memory_slices(plan)
    assert sum(size for _, size in slices) == plan.memory.total
    whole = to_png(plan)
    bare = dataclasses.replace(plan, roofline=Roofline(), collectives=[], fits=False)
    for picture in (whole, to_png(bare)):
        assert picture.startswith(b"\x89PNG")
    height = [int.from_bytes(picture[20:24]) for picture in (whole, to_png(bare))]
    assert height[1] < height[0]


def test_two_plans_are_compared_by_what_changed():
    before, after = (
        analytic_plan(experiment(mesh=MeshConfig(fsdp=n)), "h100:8x1", name="x") for n in (4, 8)
    )
    said = render.difference(before, after)
    assert "memory: parameters, GiB" in said and "-50.0%" in said
    assert "all-reduce over data, MiB" in said and "gone" in said
    assert "memory: batch" not in said  # as it was


def test_a_decoding_step_is_not_counted(capsys):
    arguments = ["plan", "--config=quickstart", "--topology=h100:8x1", "--decode=64"]
    assert cli.main(arguments) == 2
    assert "--decode" in capsys.readouterr().err


def test_bytes_are_whole_numbers_of_devices():
    plan = analytic_plan(experiment(mesh=MeshConfig(fsdp=4)), "a100:4x2", name="whole")
    assert plan.mesh == {"data": 2, "fsdp": 4}
    assert math.prod(plan.mesh.values()) == plan.devices == 8
    assert plan.memory.parameters < 4 * plan.parameters / 3.9
