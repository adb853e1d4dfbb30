"""The static profiler: what it reads from the compiler's dumps, its arithmetic and its check."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from effattn import cli
from effattn.masks import Causal, Full, Window
from effattn.static.bundles import BUNDLES, SLOTS, Region, dumped_kernels, read_kernel
from effattn.static.cases import allowed_pairs, bf16
from effattn.static.chips import CHIPS
from effattn.static.estimate import Counts, estimate
from effattn.static.gpu import compile_for_gpu, read_resources
from effattn.static.hlo import pallas_calls, xla_cycles
from effattn.static.own import CASES
from effattn.static.profile import KernelReport, Report, find_case, profile
from effattn.static.report import compare, to_json, to_markdown
from effattn.static.rivals import RIVALS
from effattn.static.tpu import CompileError, compile_for

V5E = CHIPS["v5e"]


# --- reading bundles


def write_dump(folder, instructions, length):
    """A dump of `length` bundles, some with instructions, in the form that libtpu writes."""
    bundles = ["LH: loop header", ""]
    slots = ["== CAPACITY:", "MATMUL, VSTORE, VSTORE:SPILL, VLOAD:FILL", "4 1 1 3"]
    slots += ["== UTILIZATION:"]
    for number in range(length):
        text = instructions.get(number, "")
        place = "0" if number == 0 else hex(number)
        bundles.append(f" {place:>6} {'LB' if number == 4 else '  '} : > {{ {text} }}")
        slots.append(f"{text.count('vmatmul')} 0 {text.count('spill')} 0")
    (folder / f"17-effattn_flash.1-03-{BUNDLES}.txt").write_text("\n".join(bundles))
    (folder / f"17-effattn_flash.1-05-{SLOTS}.txt").write_text("\n".join(slots))


def test_regions_of_a_grid_loop_with_a_predicated_body(tmp_path):
    multiply = "%1 = vmatmul.mubr.bf16.gmra.mxu0 %v2 ;;  %3 = vmatmul.mubr.f32.gmra.mxu1 %v2"
    write_dump(
        tmp_path,
        {
            3: "%p7 = scmp.ge.s32.totalorder %s2, 10 ;; %p8 = scmp.le.s32.totalorder %s9, 0",
            5: "%4 = sbr.rel (%p8) target bundleno = 22 (0x16), region = 5",
            12: multiply,
            13: multiply,
            11: "%6 = dma.hbm_to_vmem %7",
            14: "%5 = vst [#spill] %v1",
            25: "%9 = sbr.rel (!%p7_p2) target bundleno = 4 (0x4), region = 3",
        },
        40,
    )
    kernel = read_kernel(dumped_kernels(tmp_path)["effattn_flash.1"])
    found = [(r.kind, r.start, r.end, r.cycles, r.trips, r.condition) for r in kernel.walk()]
    assert found == [
        ("kernel", 0, 40, 14, None, ""),
        ("loop", 4, 30, 14, 10, "not ge 10"),
        ("branch", 10, 22, 12, None, "le 0"),
    ]
    body = kernel.inner[0].inner[0]
    assert (body.matmuls, body.copies, body.spills, body.fills) == (4, 1, 1, 0)
    assert body.slots["MATMUL"] == pytest.approx(4 / (12 * 4))
    assert estimate(kernel, Counts(8, hot=5)).cycles == 14 + 8 * 14 + 5 * 12


def test_a_dump_of_another_form_is_refused(tmp_path):
    write_dump(tmp_path, {}, 6)
    path = tmp_path / f"17-effattn_flash.1-05-{SLOTS}.txt"
    path.write_text(path.read_text() + "\n0 0 0 0")
    with pytest.raises(RuntimeError, match="6 bundles were read, but 7 rows"):
        read_kernel(dumped_kernels(tmp_path)["effattn_flash.1"])


def test_equal_code_is_dumped_once_and_found_under_each_name(tmp_path):
    write_dump(tmp_path, {}, 6)
    twins = "key:effattn_flash.1\nordinal:1\nequivalent_hlos[size=2]:\n  effattn_flash.1\n  other.2"
    (tmp_path / "17-TLP-00-deduplication-map.txt").write_text(twins)
    files = dumped_kernels(tmp_path)
    assert files["other.2"] == files["effattn_flash.1"]


# --- the estimate


def branch(cycles, *inner, matmuls=0, condition=""):
    return Region("branch", 0, cycles, condition, inner=list(inner), cycles=cycles, matmuls=matmuls)


def loop(cycles, *inner, trips=None, matmuls=0):
    return replace(branch(cycles, *inner, matmuls=matmuls), kind="loop", trips=trips)


def kernel(*inner):
    return replace(branch(7, *inner), kind="kernel")


def two_variants():
    """A grid loop around initialise, unmasked step, masked step, finish."""
    body = branch(
        30, branch(100), branch(1000, matmuls=900), branch(1200, matmuls=900), branch(200)
    )
    return kernel(loop(20, body))


def test_every_region_counts_as_often_as_it_runs():
    found = estimate(two_variants(), Counts(36, hot=(28, 8), outer=8))
    assert found.cycles == 7 + 36 * (20 + 30) + 28 * 1000 + 8 * 1200 + 8 * (100 + 200)
    assert found.hot_cycles == (1000, 1200)


def test_an_unknown_variant_gives_a_range():
    found = estimate(two_variants(), Counts(36, hot=36, outer=8))
    rest = 7 + 36 * (20 + 30) + 8 * (100 + 200)
    assert (found.low, found.high) == (rest + 36 * 1000, rest + 36 * 1200)
    assert found.cycles == rest + 36 * 1100


def test_inner_loops_multiply_by_their_trips():
    constant = kernel(loop(5, branch(10, loop(50, trips=4, matmuls=40))))
    assert estimate(constant, Counts(8)).cycles == 7 + 8 * (5 + 10 + 4 * 50)
    dynamic = kernel(loop(5, branch(10, loop(50, matmuls=40))))
    assert estimate(dynamic, Counts(8, trips=(2.5,))).cycles == 7 + 8 * (5 + 10 + 2.5 * 50)
    with pytest.raises(RuntimeError, match="trips for 0 loops, but the code has 1"):
        estimate(dynamic, Counts(8))


def test_counts_that_do_not_fit_the_code_are_refused():
    with pytest.raises(RuntimeError, match="counts for 3 branches .* has 2 .of 1000, 1200 cycles"):
        estimate(two_variants(), Counts(36, hot=(1, 2, 3)))


def test_branches_beside_the_body_run_in_every_step_and_rare_ones_rarely():
    body = branch(30, branch(1000, matmuls=9), branch(500, loop(5, trips=4), condition="ne 9"))
    fetch = branch(40, branch(135))
    found = estimate(
        kernel(loop(20, fetch, body)), Counts(36, hot=(30,), outer=8, rare={"ne 9": 2})
    )
    assert found.cycles == 7 + 36 * (20 + 40 + 135 + 30) + 30 * 1000 + 2 * (500 + 4 * 5)


def test_a_kernel_without_matrix_work_runs_its_grid():
    assert estimate(kernel(loop(20, branch(570), trips=34)), Counts(32)).cycles == 7 + 32 * 590


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal() & Window(left=70)], ids=str)
def test_useful_work_is_that_of_the_mask(mask):
    positions = np.arange(300)
    allowed = np.asarray(mask.allowed(positions[:, None], positions[None]))
    assert allowed_pairs(mask, 300) == allowed.sum()


@pytest.mark.parametrize("name", [case.name for case in CASES if "flash" in case.name])
def test_counts_of_our_kernels_are_those_of_the_mask(name):
    case = find_case(name)
    problem = case.problem(V5E, seq_len=1024, num_heads=3, q=256, kv=128)
    mask = case.problem.keywords["mask"]
    positions = np.arange(1024)
    allowed = np.asarray(mask.allowed(positions[:, None], positions[None]))
    active = allowed.reshape(4, 256, 8, 128).any((1, 3)).sum()
    for pattern, num_rows in (("flash_forward", 4), ("flash_backward", 8)):
        counts = problem.counts[pattern]
        assert counts.steps == sum(counts.hot) == 3 * active
        assert counts.outer == 3 * num_rows


# --- the HLO text

HLO = """
%fused (p: f32[8]) -> f32[8] {
  ROOT %add = f32[8] add(), backend_config={"estimated_cycles":"999","iteration_bounds":["1"]}
}

ENTRY %main (q: bf16[8]) -> bf16[8] {
  %sum = f32[8] fusion(%q), backend_config={"window_config":{"estimated_cycles":"144","iteration_bounds":["1"]}}
  %flash.1 = bf16[8] custom-call(%q), custom_call_target="tpu_custom_call", metadata={}, backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}],"bundle_analysis_data":{"estimated_cycles":"77"}}
  %pin = bf16[8] custom-call(%q), custom_call_target="Pin", metadata={op_name="tpu_custom_call"}
}
"""  # noqa: E501


def test_pallas_calls_and_the_work_beside_them():
    (call,) = pallas_calls(HLO)
    assert (call.name, call.vmem_bytes, call.walk_cycles) == ("flash.1", 4096, 77)
    assert xla_cycles(HLO) == 144
    assert pallas_calls("") == [] and xla_cycles("") == 0


# --- reports and the check


def report(cycles, *, xla=100, own=True, chip="v5e", message=None):
    kernels = () if cycles is None else (KernelReport("flash", cycles, cycles, cycles, (5,)),)
    return Report("flash", {"q": 512}, chip, own, message, kernels, xla)


def recorded(*reports):
    return json.loads(to_json(reports, [], "effattn bench --static", "2026-01-01"))


@pytest.mark.parametrize("now, fails", [(1000, False), (1029, False), (1031, True), (900, False)])
def test_three_percent_more_static_cycles_fail(now, fails):
    failures, notes = compare(recorded(report(1000.0)), [report(float(now))])
    assert bool(failures) == fails
    if fails:
        text = "flash (q 512) on v5e: flash rose by 3.1%, from 1,000 to 1,031 static cycles"
        assert failures == [text]
    assert bool(notes) == (now == 900)


def test_the_check_sees_xla_work_and_kernels_that_broke():
    (sentence,), _ = compare(recorded(report(1000.0)), [report(1000.0, xla=120)])
    assert "XLA's work beside the kernels rose by 20.0%" in sentence
    (sentence,), _ = compare(recorded(report(1000.0)), [report(None, message="too much VMEM")])
    assert sentence.endswith("no longer compiles: too much VMEM")
    without = replace(report(1000.0), kernels=(KernelReport("flash", message="?"),))
    (sentence,), _ = compare(recorded(report(1000.0)), [without])
    assert sentence.endswith("flash has no static cycles any more")


def test_the_check_compares_only_what_can_be_compared():
    old = recorded(report(1000.0), report(10.0, own=False, chip="v6e"))
    failures, notes = compare(old, [report(1000.0), report(9000.0, chip="v6e")])
    assert not failures and notes == ["flash (q 512) on v6e: not recorded"]
    with pytest.raises(ValueError, match="none of the chosen cases"):
        compare(old, [report(1000.0, chip="v5p")])
    old["versions"]["libtpu"] = "0.0.1"
    with pytest.raises(ValueError, match=r"recorded with libtpu 0\.0\.1, but"):
        compare(old, [report(1000.0)])


def test_every_table_says_static():
    text = to_markdown([report(1000.0), report(None, message="a | b")], [], "command", "date")
    headers = [line for line in text.splitlines() if line.startswith("#")]
    assert headers and all("static" in line for line in headers)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert "static k cycles" in table[0]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1


# --- compiling


def test_a_refusal_carries_the_compilers_message():
    def body(x_ref, out_ref):
        out_ref[...] = x_ref[pl.ds(pl.program_id(0) * 3 + 1, 256), :]

    fn = pl.pallas_call(
        body,
        out_shape=bf16(256, 128),
        grid=(2,),
        in_specs=[pl.BlockSpec((1024, 128), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((256, 128), lambda i: (0, 0)),
    )
    with pytest.raises(CompileError, match="v5e: .*multiple of 8"):
        compile_for("v5e", fn, bf16(1024, 128))
    with pytest.raises(ValueError, match="chip: got 'v5x', expected one of v5e"):
        compile_for("v5x", fn, bf16(1024, 128))


def test_a_mistake_in_the_function_itself_keeps_its_error():
    with pytest.raises(TypeError, match="dot_general"):
        compile_for("v6e", lambda a, b: jnp.dot(a, b), bf16(8, 16), bf16(8, 16))


@pytest.mark.parametrize("chip", CHIPS)
def test_compiling_ahead_of_time_sees_shapes_alone(chip):
    arguments = {"a": bf16(256, 128), "b": bf16(128, 256)}
    compiled = compile_for(chip, lambda x: x["a"] @ x["b"], arguments)
    assert compiled.memory_analysis().output_size_in_bytes == 256 * 256 * 2
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    "size, fraction", [(512, 0.914), pytest.param(1024, 0.986, marks=pytest.mark.slow)]
)
def test_calibration_is_near_the_peak(size, fraction):
    """The whole chain: child, dumps, regions, estimate. The larger the product, the nearer."""
    (found,) = profile(find_case("calibration matmul"), {"size": size}, [V5E], walk=False)
    assert found.message is None
    (kernel,) = found.kernels
    assert kernel.name == "effattn_calibration_matmul"
    assert kernel.matrix_fraction == pytest.approx(fraction, abs=0.01)
    assert found.matrix_fraction == kernel.matrix_fraction
    assert kernel.vmem_bytes > 4 * size * size * 2
    assert kernel.spills > 0 and found.static_xla_cycles == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in RIVALS if case.package is None])
def test_rivals_have_an_estimate(name):
    case = find_case(name)
    (found,) = profile(case, {"block": 512}, [V5E], walk=False)
    assert found.message is None and found.static_cycles is not None
    assert 0.3 < found.matrix_fraction < 1


def test_hopper_resources_are_read():
    text = (
        "smem_scratch_bytes=165888\n"
        "ptxas info    : Compiling entry function 'attend' for 'sm_90a'\n"
        "ptxas info    : Function properties for attend\n"
        "    16 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers\n"
    )
    (kernel,) = read_resources(text)
    assert (kernel.name, kernel.registers, kernel.shared_memory_bytes) == ("attend", 168, 165888)
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (8, 24)
    with pytest.raises(ValueError, match="gpu: got 'h300'"):
        compile_for_gpu("h300", lambda x: x, bf16(8))


# --- the command


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--static: expected"),
        (["--static", "--kernel=nothing"], "'nothing' fits no case, expected one of: calibration"),
        (["--static", "--kernel=("], "is not a regular expression"),
        (["--static", "--chip=v5e,v5"], "--chip: got 'v5', expected one of"),
        (["--static", "--set=size"], "--set: got 'size', expected NAME=VALUE"),
        (["--static", "--kernel=calib", "--set=length=1"], "got 'length', expected one of size"),
        (["--static", "--check=pyproject.toml"], "is not a file that"),
        (["--static", "--check=x.json", "--rivals"], "--rivals: only our own kernels"),
        (["--static", "--json=no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, sentence):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("package, extra", [("libtpu", "test"), ("tokamax", "peers")])
def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch, package, extra):
    import importlib.util

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else object()
    )
    pattern = "--kernel=tokamax" if package == "tokamax" else "--kernel=calibration"
    assert cli.main(["bench", "--static", "--rivals", pattern]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"effattn bench: {package} is not installed")
    assert f"effattn[{extra}]" in said


def test_case_names_are_unique():
    names = [case.name for case in (*CASES, *RIVALS)]
    assert len(set(names)) == len(names)
    assert all(case.own for case in CASES) and not any(case.own for case in RIVALS)


@pytest.mark.parametrize("vendor, quiet", [("0x8086", True), ("0x1ae0", False)])
def test_a_command_without_a_tpu_starts_in_silence(tmp_path, monkeypatch, vendor, quiet):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "vendor").write_text(vendor + "\n")
    monkeypatch.setattr(cli, "_PCI_VENDORS", str(tmp_path / "*" / "vendor").lstrip("/"))
    for name in ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what the command sets is not kept
    cli.main(["--version"])
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) == quiet
