"""Whole runs: what they leave behind, and that stopping, killing and resuming change no number."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_setup import corpus, experiment, losses, stop_at

from effattn.config import from_dict, to_dict
from effattn.experiment import Experiment
from effattn.export import export_weights
from effattn.models.based import BasedModelConfig
from effattn.train import loop
from effattn.train.checkpoint import Checkpoints, UnreadableCheckpoint, load_run
from effattn.train.loop import train
from effattn.train.metrics import NonFiniteLoss

STEPS = 10
PLAN = {"steps": STEPS, "checkpoint_every": 2, "eval_every": 4, "keep_last": 2}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A finished run. Tests that change it take a copy."""
    workdir = tmp_path_factory.mktemp("run") / "unbroken"
    train(experiment(**PLAN), workdir)
    return workdir


@pytest.fixture
def copy(unbroken, tmp_path) -> Path:
    return Path(shutil.copytree(unbroken, tmp_path / "copy"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exact(workdir: Path) -> list[tuple]:
    """What must be equal bit for bit: step, loss, gradient norm, learning rate of every line."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(line[key] for key in keys) for line in lines(workdir / "metrics.jsonl")]


# ---- what a run leaves behind


def test_every_step_has_a_line_with_exact_numbers(unbroken):
    found = lines(unbroken / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line in found:
        assert float(np.float32(line["loss"])) == line["loss"]
        assert line["grad_norm"] > 0 and line["learning_rate"] > 0
    assert found[0]["tokens_per_second"] is None  # compilation is no throughput
    timed = [line for line in found if line["tokens_per_second"] is not None]
    assert timed
    for line in timed:
        assert line["model_flops_per_second"] > line["tokens_per_second"] > 0
    assert found[-1]["loss"] < found[0]["loss"]


def test_evaluations_reports_and_plots_are_there(unbroken):
    evaluations = lines(unbroken / "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [4, 8, 10]
    result = json.loads((unbroken / "result.json").read_text())
    assert result["status"] == "finished" and result["step"] == STEPS
    assert result["loss"] == exact(unbroken)[-1][1]
    assert result["validation"]["loss"] == evaluations[-1]["loss"]
    assert result["validation"]["bits_per_byte"] > 0
    assert result["parameters"] > 0 and result["flops_per_token"] > 0
    assert result["versions"]["jax"] == jax.__version__ and result["data"]["identity"]
    summary = (unbroken / "summary.md").read_text()
    assert result["data"]["identity"] in summary and "plots/loss.png" in summary
    for plot in ("loss", "throughput"):
        assert (unbroken / "plots" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_config_comes_back_and_the_run_can_be_loaded(unbroken):
    recorded = json.loads((unbroken / "config.json").read_text())
    assert from_dict(recorded) == experiment(**PLAN)
    run = load_run(unbroken)
    assert run.step == STEPS and isinstance(run.experiment, Experiment)
    best = min(lines(unbroken / "evaluations.jsonl"), key=lambda line: line["loss"])
    assert load_run(unbroken, "best").step == best["step"]
    with pytest.raises(ValueError, match="step: got 3"):
        load_run(unbroken, 3)


def test_a_finished_run_says_so_and_more_steps_go_on(copy, capsys):
    before = exact(copy)
    result = train(experiment(**PLAN), copy)
    assert "finished at step 10; nothing to do" in capsys.readouterr().out
    assert result == json.loads((copy / "result.json").read_text())
    assert exact(copy) == before
    train(experiment(**PLAN | {"steps": STEPS + 2}), copy)
    assert exact(copy)[:STEPS] == before and len(exact(copy)) == STEPS + 2


def test_a_run_cut_off_before_its_report_writes_it(copy):
    (copy / "result.json").unlink()
    result = train(experiment(**PLAN), copy)
    assert result["step"] == STEPS and result["loss"] == exact(copy)[-1][1]
    assert (copy / "result.json").exists()


# ---- stopping and being killed


def test_sigterm_and_ctrl_c_save_within_a_step_and_resume_exactly(unbroken, tmp_path, monkeypatch):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    for number, at in ((signal.SIGTERM, 2), (signal.SIGINT, 5)):
        asked, there = False, stop_at(monkeypatch, at)

        def stop(number=number, there=there):
            """Asks for nothing itself; lets the signal come when step `at` was looked at."""
            nonlocal asked
            if not asked and there():
                asked = True
                signal.raise_signal(number)
            return False

        result = train(experiment(**PLAN), tmp_path / "run", stop=stop)
        assert result == {"status": "stopped", "step": at + 1}
        assert exact(tmp_path / "run") == exact(unbroken)[: at + 1]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(experiment(**PLAN), tmp_path / "run")
    assert exact(tmp_path / "run") == exact(unbroken)


def test_an_interruption_cuts_an_evaluation_short(unbroken, tmp_path, monkeypatch):
    evaluating = False
    evaluate = loop.evaluate

    def slow(*args):
        nonlocal evaluating
        evaluating = True
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", slow)
    result = train(experiment(**PLAN), tmp_path / "run", stop=lambda: evaluating)
    assert result == {"status": "stopped", "step": 4}
    assert lines(tmp_path / "run" / "evaluations.jsonl") == []
    assert exact(tmp_path / "run") == exact(unbroken)[:4]


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import conftest
from train_setup import experiment
from effattn.train.checkpoint import Checkpoints
from effattn.train.loop import train
kill_at = {kill_at!r}
save = Checkpoints.save
def save_and_die(self, step, *rest):
    save(self, step, *rest)
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
train(experiment(**{plan!r}), {workdir!r})
"""


def child(workdir: Path, kill_at: int | None) -> subprocess.Popen:
    tests = Path(__file__).parent
    code = CHILD.format(tests=str(tests), kill_at=kill_at, plan=PLAN, workdir=str(workdir))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": str(tests.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def test_a_killed_run_resumed_equals_an_unbroken_one(unbroken, tmp_path):
    workdir = tmp_path / "run"
    # The moment a save of step 4 begins: nothing of it is on disk yet, or half of it.
    process = child(workdir, kill_at=4)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    # Somewhere past step 6, wherever that finds it.
    process = child(workdir, kill_at=None)
    deadline = time.monotonic() + 250
    while max(losses_if_any(workdir), default=0) < 7 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    # A line that was being written when the power went.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    train(experiment(**PLAN), workdir)
    assert exact(workdir) == exact(unbroken)
    assert lines(workdir / "evaluations.jsonl") == lines(unbroken / "evaluations.jsonl")


def losses_if_any(workdir: Path) -> list[int]:
    try:
        return list(losses(workdir))
    except (OSError, json.JSONDecodeError):
        return []


# ---- what ends a run with an error


def test_a_loss_that_is_not_finite_names_step_batch_and_checkpoint(tmp_path):
    run = experiment(**PLAN, optimizer="lion")
    # Sign updates of 1e30 overflow in the next forward pass.
    run.optimizer.learning_rate, run.optimizer.warmup_steps = 1e30, 0
    with pytest.raises(NonFiniteLoss) as caught:
        train(run, tmp_path)
    step = caught.value.step
    message = str(caught.value)
    assert f"step {step}: " in message and f"batch {step - 1} of seed 0" in message
    assert "no checkpoint was saved before it" in message and "sha256" in message
    written = lines(tmp_path / "metrics.jsonl")
    assert written[-1]["step"] == step and not np.isfinite(written[-1]["grad_norm"])
    assert Checkpoints(tmp_path, read_only=True).steps() == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda run: setattr(run.model, "num_layers", 4),
            r"another model: model\.num_layers is 4, was 2",
        ),
        (
            lambda run: setattr(run.model, "feature_dim", 8),
            r"another model: model\.feature_dim is 8, was 4",
        ),
        (lambda run: setattr(run.optimizer, "name", "lamb"), "optimizer.name is 'lamb', was"),
        (lambda run: setattr(run.train, "seed", 5), "train.seed is 5, was 0"),
        (
            lambda run: setattr(run.data, "seq_len", 8),
            r"other data: data\.seq_len is 8, was 16.*train\.allow_data_change",
        ),
        (
            lambda run: setattr(run.data, "source", "copy"),
            "trained with a vocabulary of 257, the data has 512",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another(copy, change, match):
    run = experiment(**PLAN)
    change(run)
    with pytest.raises(ValueError, match=match):
        train(run, copy)


def test_other_text_is_refused_until_it_is_allowed(unbroken, copy, tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"{number} other words " * 20)
    other = {"source": str(tmp_path / "*.txt"), "seq_len": 16, "validation_fraction": 0.2}
    with pytest.raises(ValueError, match="the content's identity is"):
        train(experiment(data=other, **PLAN), copy)
    shutil.rmtree(copy / "checkpoints" / "10")  # leaves step 8, so that there is something to do
    train(experiment(data=other, allow_data_change=True, **PLAN), copy)
    assert exact(copy)[:8] == exact(unbroken)[:8]
    assert exact(copy)[8] != exact(unbroken)[8] and len(exact(copy)) == STEPS


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"workdir: cannot write to .*file/run: Not a directory"):
        train(experiment(), tmp_path / "file" / "run")


def test_foreign_checkpoints_are_named(tmp_path):
    (tmp_path / "checkpoints" / "7" / "model").mkdir(parents=True)
    with pytest.raises(UnreadableCheckpoint, match=r"checkpoints/7: cannot be read"):
        train(experiment(), tmp_path)


# ---- where parameters come from


def test_init_from_a_run_or_a_weights_file(unbroken, tmp_path):
    run = load_run(unbroken)
    export_weights(tmp_path / "weights.safetensors", run.params, to_dict(run.experiment))
    first = {}
    for source in (unbroken, tmp_path / "weights.safetensors"):
        name = source.name
        workdir = tmp_path / f"from_{name}"
        train(experiment(**PLAN, init_from=str(source)), workdir, stop=lambda: True)
        first[name] = losses(tmp_path / f"from_{name}")[1]
    assert len(set(first.values())) == 1
    assert first["unbroken"] < losses(unbroken)[1] - 0.5


def test_init_from_a_source_that_does_not_fit_is_refused(unbroken, tmp_path):
    wide = BasedModelConfig(num_layers=2, width=32, num_heads=2, pattern=("conv", "linear"))
    with pytest.raises(ValueError, match=r"train\.init_from: .*unbroken: parameter .* is of shape"):
        train(experiment(model=wide, init_from=str(unbroken)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"train\.init_from: .*nowhere"):
        train(experiment(init_from=str(tmp_path / "nowhere")), tmp_path / "b")


def test_nan_in_parameters_is_told(unbroken, tmp_path):
    run = load_run(unbroken)
    run.params["final_norm"]["scale"] = run.params["final_norm"]["scale"].at[3].set(jnp.nan)
    path = tmp_path / "weights.safetensors"
    export_weights(path, run.params, to_dict(run.experiment))
    with pytest.raises(ValueError, match=r"weights.safetensors: parameter final_norm.scale holds"):
        train(experiment(init_from=str(path)), tmp_path / "run")


# ---- the rest


def test_a_profile_is_written_and_sparse_logging_keeps_the_steps_asked_for(unbroken, tmp_path):
    run = experiment(**PLAN, profile_steps=(1, 2), log_every=3)
    train(run, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list(losses(tmp_path / "run")) == [3, 6, 9, STEPS]
    assert losses(tmp_path / "run")[9] == losses(unbroken)[9]


def test_a_broken_line_in_the_middle_of_the_metrics_is_named(copy):
    text = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([text[0], "{", *text[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a line of metrics"):
        train(experiment(**PLAN | {"steps": STEPS + 1}), copy)


def test_bad_values_name_their_field(tmp_path):
    for fields, match in (
        ({"steps": 0}, r"train\.steps: got 0, expected at least 1"),
        ({"accumulation": 3}, r"data\.batch_size: got 8, expected a multiple of"),
        ({"compute_dtype": "float16"}, r"train\.compute_dtype: got 'float16'"),
        ({"profile_steps": (3, 2)}, r"train\.profile_steps: got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            train(experiment(**fields), tmp_path)
    run = experiment()
    run.optimizer.b2 = 1.0
    with pytest.raises(ValueError, match=r"optimizer\.b2: got 1\.0, expected 0 <= b2 < 1"):
        train(run, tmp_path)


def test_the_corpus_is_small(unbroken):
    """A guard for the other tests: the whole validation split stays a few batches."""
    result = json.loads((unbroken / "result.json").read_text())
    assert result["validation"]["tokens"] < 5000 and Path(corpus()).parent.exists()
