"""Jobs of several real processes on this machine: they meet on 127.0.0.1 and train one model.

One job of each kind is run once and looked at by several tests: starting a process costs more than
all of its training.
"""

import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_setup import corpus, losses

from effattn.distributed import PEER_LOST, STOPPED, join

ROOT = Path(__file__).resolve().parent.parent
# Enough that a run still goes on when its first checkpoint has been seen.
STEPS = 60
CONFIG = """
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig


def get_config(arg=None):
    return Experiment(
        model=TransformerConfig(num_layers=2, width=32, num_heads=2),
        data=DataConfig(
            source={source!r},
            batch_size=8,
            seq_len=16,
            validation_fraction=0.2,
            cache_dir={cache!r},
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(steps={steps}, checkpoint_every=5, eval_batches=2, tensorboard=False),
        mesh=MeshConfig(data=1, fsdp=2, sequence=2),
        sequence=SequenceConfig(kind="ring", zigzag=True),
    )
"""


@dataclasses.dataclass
class Job:
    """Processes of one run, each with devices enough for four in all; their output in files."""

    folder: Path
    processes: list[subprocess.Popen]

    def wait(self, seconds=300) -> list[int]:
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def output(self, index: int) -> str:
        return (self.folder / f"{index}.txt").read_text()


def start(folder: Path, workdir: Path, processes: int) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.py"
    cache = str(folder.parent / "cache")
    config.write_text(CONFIG.format(source=corpus(), cache=cache, steps=STEPS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "effattn", "train", f"--config={config}"]
    command += [f"--workdir={workdir}"]
    job = Job(folder, [])
    for index in range(processes):
        environment = dict(os.environ)
        environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace(
            "device_count=8", f"device_count={4 // processes}"
        )
        environment |= {
            "EFFATTN_COORDINATOR": f"127.0.0.1:{port}",
            "EFFATTN_NUM_PROCESSES": str(processes),
            "EFFATTN_PROCESS_ID": str(index),
            "PYTHONUNBUFFERED": "1",
        }
        with (folder / f"{index}.txt").open("w") as out:
            job.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
            )
    return job


def until_step(workdir: Path, step: int, job: Job, seconds=240) -> None:
    """Returns when the run has a checkpoint of `step`, or of a later one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
        if max(done, default=0) >= step:
            return
        assert all(p.poll() is None for p in job.processes), [job.output(0), job.output(1)]
        time.sleep(0.05)
    job.kill()
    raise AssertionError(f"no checkpoint of step {step}: {job.output(0)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@functools.cache
def finished(folder: Path, processes: int) -> Path:
    """The run directory of an unbroken job."""
    workdir = folder / f"run{processes}"
    job = start(folder / f"job{processes}", workdir, processes)
    assert job.wait() == [0] * processes, job.output(0)
    return workdir


def assert_same_losses(workdir: Path, wanted: Path) -> None:
    got, expected = losses(workdir), losses(wanted)
    assert got.keys() == expected.keys()
    for step, value in expected.items():
        # Sums over the devices in another order.
        assert abs(got[step] - value) <= 1e-6 * abs(value), (step, got[step], value)


def test_two_processes_train_as_one(folder):
    two, one = finished(folder, 2), finished(folder, 1)
    assert_same_losses(two, one)
    results = [json.loads((run / "result.json").read_text()) for run in (two, one)]
    got, wanted = (result["validation"] for result in results)
    assert got["tokens"] == wanted["tokens"]
    assert abs(got["loss"] - wanted["loss"]) <= 1e-6 * wanted["loss"]
    # The other process writes no files and says nothing.
    output = (folder / "job2" / "1.txt").read_text()
    assert "step" not in output, output


@pytest.mark.slow
def test_four_processes_train_as_one(folder):
    assert_same_losses(finished(folder, 4), finished(folder, 1))


@pytest.mark.slow
def test_sigterm_to_one_saves_all_and_two_go_on_from_four(folder):
    workdir = folder / "preempted"
    job = start(folder / "preempted_job", workdir, 4)
    until_step(workdir, 5, job)
    job.processes[2].send_signal(signal.SIGTERM)
    assert job.wait() == [STOPPED] * 4, job.output(2)
    saved = max(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())
    assert saved < STEPS
    assert f"stopped at step {saved};" in job.output(0)
    assert sorted(losses(workdir)) == list(range(1, saved + 1))

    job = start(folder / "resumed_job", workdir, 2)
    assert job.wait() == [0, 0], job.output(0)
    assert f"going on from step {saved}" in job.output(0)
    assert_same_losses(workdir, finished(folder, 1))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_sigkill_of_one_ends_the_others_and_two_go_on(folder, victim):
    workdir = folder / f"killed{victim}"
    job = start(folder / f"killed{victim}_job", workdir, 4)
    until_step(workdir, 5, job)
    job.processes[victim].kill()
    codes = job.wait(120)
    others = [index for index in range(4) if index != victim]
    assert codes[victim] == -signal.SIGKILL
    for index in others:
        assert codes[index] == PEER_LOST, job.output(index)
        assert f"process {index} of 4: another process of the job has gone" in job.output(index)
        assert "Traceback" not in job.output(index)

    job = start(folder / f"after{victim}_job", workdir, 2)
    assert job.wait() == [0, 0], job.output(0)
    assert "going on from step" in job.output(0)
    assert_same_losses(workdir, finished(folder, 1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"coordinator": "127.0.0.1:1"}, "--num-processes: not given, .*EFFATTN_NUM_PROCESSES"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator: not given"),
        ({"coordinator": "here", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "expected host:port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "got 2, expected 0 to 1"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "--num-processes: got 0"),
    ],
)
def test_a_wrong_address_is_a_sentence(given, says):
    with pytest.raises(ValueError, match=says):
        join(**given, environment={})


def test_the_environment_stands_for_flags_and_flags_win():
    environment = {
        "EFFATTN_COORDINATOR": "127.0.0.1:1",
        "EFFATTN_NUM_PROCESSES": "two",
        "EFFATTN_PROCESS_ID": "0",
    }
    with pytest.raises(ValueError, match="--num-processes: got 'two', expected a whole number"):
        join(environment=environment)
    assert not join(num_processes=1, environment=environment)
    assert not join(environment={})


def test_a_coordinator_that_nobody_is_at_is_a_sentence():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ValueError, match="process 1 of 2 reached nobody at 127.0.0.1"):
            join(address, 2, 1, timeout_seconds=0)
