"""Metrics by themselves: lines, their lag, throughput, the writers, the progress line."""

import io
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from effattn.plots import plot_run
from effattn.train import metrics as module
from effattn.train.checkpoint import as_path
from effattn.train.metrics import LAG, JsonLines, Metrics, NonFiniteLoss, Progress, read_lines


def open_metrics(folder, **options):
    defaults = {
        "first_step": 0,
        "steps": 100,
        "log_every": 1,
        "tokens_per_step": 10,
        "flops_per_step": 1000.0,
        "config": {"name": "test"},
        "tensorboard": False,
        "wandb_project": None,
    }
    return Metrics(folder, **(defaults | options))


def values(loss=1.0, grad_norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}


def steps(folder):
    return [line["step"] for line in read_lines(as_path(folder) / "metrics.jsonl")]


def test_lines_come_with_a_lag_and_a_drain_brings_them_all(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in range(1, 6):
        metrics.step(step, values())
    assert steps(tmp_path) == list(range(1, 6 - LAG))
    metrics.drain()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    metrics.close()


def test_numbers_survive_to_the_last_bit(tmp_path):
    metrics = open_metrics(tmp_path)
    third = jnp.float32(1) / 3
    metrics.step(1, {"loss": third, "grad_norm": third})
    metrics.close()
    (line,) = read_lines(as_path(tmp_path) / "metrics.jsonl")
    assert jnp.float32(line["loss"]) == third and line["loss"] == float(third)


def test_a_resumed_file_keeps_the_lines_up_to_its_step_and_drops_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": 0.5}}\n' for s in range(1, 6)) + '{"ste')
    lines = JsonLines(as_path(path), step=3)
    lines.write({"step": 4, "loss": 0.25})
    lines.close()
    assert [(x["step"], x["loss"]) for x in read_lines(as_path(path))][2:] == [(3, 0.5), (4, 0.25)]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_value_that_is_not_finite_stops_with_its_step_and_is_written(tmp_path, name):
    metrics = open_metrics(tmp_path, log_every=50)
    with pytest.raises(NonFiniteLoss, match=f"{name} is nan") as caught:
        for step in range(1, 10):
            metrics.step(step, values(**{name: float("nan") if step == 4 else 1.0}))
    assert caught.value.step == 4
    metrics.close()
    assert steps(tmp_path) == [4]


def test_throughput_leaves_the_pauses_out(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    metrics = open_metrics(tmp_path)
    for step in range(1, 9):
        now += 0.5
        if step == 5:
            metrics.pause()
            now += 100.0
        metrics.step(step, values())
    metrics.drain()
    # Drained steps are seen at one moment; what was measured is never less than the truth.
    assert metrics.tokens_per_second >= 10 / 0.5
    speeds = [line["tokens_per_second"] for line in read_lines(metrics.workdir / "metrics.jsonl")]
    assert speeds[0] is None and speeds[4] is None
    assert min(s for s in speeds if s is not None) >= 10 / 0.5 - 1e-9
    metrics.close()


def test_tensorboard_gets_every_scalar(tmp_path):
    event_file_loader = pytest.importorskip("tensorboardX")
    assert event_file_loader
    metrics = open_metrics(tmp_path, tensorboard=True)
    metrics.step(1, values())
    metrics.evaluation(1, {"loss": 2.0})
    metrics.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"train/loss" in data and b"validation/loss" in data


def test_wandb_is_told_where_asked_for_and_missed_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train\.wandb_project.*install effattn\[wandb\]"):
        open_metrics(tmp_path, wandb_project="p")

    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: logged.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    metrics = open_metrics(tmp_path, wandb_project="p")
    metrics.step(1, values(loss=3.0))
    metrics.close()
    assert logged[0]["project"] == "p" and logged[0]["config"] == {"name": "test"}
    assert logged[1][0] == 1 and logged[1][1]["train/loss"] == 3.0
    assert logged[-1] == "end"


def test_progress_is_a_bar_on_a_terminal_and_sparse_lines_elsewhere(capsys, monkeypatch):
    progress = Progress(0, 100)
    for step in range(1, 101):
        progress.update(step, 1.5, 1234.5)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/100  loss 1.5000  1,234 tokens/s",
        "step 100/100  loss 1.5000  1,234 tokens/s",
    ]

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(10, 20)
    progress.update(20, 1.5, None)
    progress.close()
    assert "20/20" in terminal.getvalue() and "loss 1.5000" in terminal.getvalue()


def test_a_run_without_a_line_has_no_plots(tmp_path):
    assert plot_run(as_path(tmp_path)) == []


def test_object_stores_get_the_whole_text_again(tmp_path, monkeypatch):
    """A path with a scheme cannot be appended to. A stand-in keeps what was written."""

    class Store:
        def __init__(self):
            self.text, self.writes = '{"step": 1}\n{"step": 2}\n', 0

        def __str__(self):
            return "gs://bucket/metrics.jsonl"

        def exists(self):
            return True

        def read_text(self):
            return self.text

        def write_text(self, text):
            self.text, self.writes = text, self.writes + 1

    store = Store()
    lines = JsonLines(store, step=1)
    lines.write({"step": 2, "loss": 1.0})
    assert store.writes == 0
    lines.close()
    assert [json.loads(x)["step"] for x in store.text.splitlines()] == [1, 2]
    assert not list(Path(tmp_path).iterdir())
