"""The launchers: what the remote ones would run, and real jobs of the local one."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_multiprocess import CONFIG, STEPS
from train_setup import corpus, losses

from effattn.distributed import PEER_LOST, STOPPED
from scripts.launch.local import worst

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "scripts" / "launch"
TRAIN = ["--", "train", "--config=quickstart", "--config.train.steps=5"]
POD = {"NAME": "run1", "ZONE": "us-west4-a", "WORKDIR": "gs://bucket/run1"}
XPK = POD | {"CLUSTER": "c", "IMAGE": "gcr.io/p/effattn:1"}
JOBSET = {"NAME": "run1", "PODS": "4", "IMAGE": "r/effattn:1", "WORKDIR": "/runs/run1"}


def shell(name: str, arguments: list[str], **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"]} | variables
    command = ["bash", str(LAUNCH / name), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def dry(name: str, arguments: list[str], **variables: str) -> list[str]:
    """The words of the command that a launcher would run."""
    done = shell(name, ["--dry-run", *arguments], **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_tpu_pod_commands():
    words = dry("tpu_pod.sh", ["run", *TRAIN], **POD)
    assert words[:-1] == [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run1"],
        *["--zone=us-west4-a", "--worker=all"],
    ]
    assert words[-1] == (
        "--command=cd effattn && JAX_COMPILATION_CACHE_DIR=gs://bucket/run1/compile_cache "
        ".venv/bin/effattn train --config=quickstart --config.train.steps=5 --distributed "
        "--workdir=gs://bucket/run1; echo effattn exit code $?"
    )
    slice_ = {"ACCELERATOR": "v5litepod-256", "RUNTIME": "v2-alpha-tpuv5-lite"}
    assert dry("tpu_pod.sh", ["create", "--spot"], **POD, **slice_) == [
        *["gcloud", "compute", "tpus", "queued-resources", "create", "run1", "--node-id=run1"],
        *["--zone=us-west4-a", "--accelerator-type=v5litepod-256"],
        *["--runtime-version=v2-alpha-tpuv5-lite", "--spot"],
    ]
    assert "queued-resources delete run1" in " ".join(dry("tpu_pod.sh", ["delete"], **POD))
    words = dry("tpu_pod.sh", ["install"], SOURCE="https://example.org/effattn.git", **POD)
    assert "git clone https://example.org/effattn.git effattn" in words[-1]


@pytest.mark.parametrize(
    ("output", "code"),
    [
        ("effattn exit code 0\neffattn exit code 0", 0),
        ("effattn exit code 75\neffattn exit code 75", STOPPED),
        ("effattn exit code 137\neffattn exit code 76", PEER_LOST),
        ("effattn exit code 1\neffattn exit code 76", 1),
        ("effattn exit code 2\neffattn exit code 2", 2),
        ("ssh: connection refused", PEER_LOST),
    ],
)
def test_tpu_pod_tells_the_codes_of_its_hosts_apart(tmp_path, output, code):
    (tmp_path / "gcloud").write_text(f"#!/bin/bash\necho '{output}'\nexit 1\n")
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = shell("tpu_pod.sh", ["run", *TRAIN], **POD, PATH=path)
    assert done.returncode == code, done.stderr


def test_xpk_command():
    words = dry("xpk.sh", TRAIN, **XPK, TPU="v5litepod-256", SLICES="2", RESTARTS="3")
    assert words[:3] == ["xpk", "workload", "create"]
    for word in [
        *["--workload=run1", "--cluster=c", "--zone=us-west4-a", "--tpu-type=v5litepod-256"],
        *["--num-slices=2", "--docker-image=gcr.io/p/effattn:1", "--max-restarts=3"],
    ]:
        assert word in words
    (command,) = [word for word in words if word.startswith("--command=")]
    assert shlex.split(command.removeprefix("--command=")) == [
        "effattn",
        *TRAIN[1:],
        "--distributed",
        "--workdir=gs://bucket/run1",
    ]
    words = dry("xpk.sh", TRAIN, **XPK, DEVICE="h100-80gb-8", NODES="2")
    assert "--device-type=h100-80gb-8" in words and "--num-nodes=2" in words


def test_slurm_command_gives_every_task_its_number(tmp_path):
    words = dry("slurm.sh", TRAIN[1:], WORKDIR="/shared/run1")
    assert words[:2] == [
        "EFFATTN_COORDINATOR=FIRST_NODE:12355",
        "JAX_COMPILATION_CACHE_DIR=/shared/run1/compile_cache",
    ]
    assert words[2:6] == ["srun", "--kill-on-bad-exit=0", "--wait=100", "--label"]
    each = words[6:]
    assert each[4:] == [*[".venv/bin/effattn", *TRAIN[1:]], "--workdir=/shared/run1"]
    # What srun would start as task 2 of 4, with another program in effattn's place.
    each[4] = "env"
    task = {"PATH": os.environ["PATH"], "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
    done = subprocess.run(each[:5], env=task, capture_output=True, text=True, check=True)
    assert {"EFFATTN_NUM_PROCESSES=4", "EFFATTN_PROCESS_ID=2"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("task", "restarts", "code", "requeued"),
    [(0, "1", 0, False), (75, "1", 75, True), (137, "1", 76, True), (76, "0", 76, False)]
    + [(2, "1", 2, False)],
)
def test_slurm_puts_back_what_was_preempted_and_not_what_failed(
    tmp_path, task, restarts, code, requeued
):
    calls = tmp_path / "calls"
    for name, text in [
        ("srun", f'echo "$EFFATTN_COORDINATOR"; exit {task}'),
        ("scontrol", f'echo "$@" >>{calls}; [ "$2" != hostnames ] || echo node01'),
    ]:
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[01-04]", "RESTARTS": restarts}
    job["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = shell("slurm.sh", TRAIN[1:], WORKDIR="/shared/run1", **job)
    assert done.returncode == code and done.stdout == "node01:12355\n"
    assert ("requeue 7" in calls.read_text()) == requeued


def test_kubernetes_manifest():
    strange = "--config.data.source=it's: here"
    tpu = {"RESOURCE": "google.com/tpu", "COUNT": "4", "TPU": "tpu-v5-lite-podslice"}
    more = tpu | {"TOPOLOGY": "4x4", "CLAIM": "disk", "RESTARTS": "3"}
    done = shell("kubernetes.sh", ["--dry-run", *TRAIN, strange], **JOBSET, **more)
    job = yaml.safe_load(done.stdout)
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "run1")
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 3
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy allows no other
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == ["effattn", *TRAIN[1:], strange, "--workdir=/runs/run1"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    # <job set>-<replicated job>-<job>-<pod>.<service>, as JobSet names pods.
    assert environment["EFFATTN_COORDINATOR"] == "run1-workers-0-0.run1:12355"
    assert environment["EFFATTN_NUM_PROCESSES"] == "4"
    plain = yaml.safe_load(shell("kubernetes.sh", ["--dry-run", *TRAIN], **JOBSET).stdout)
    pod = plain["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod and "volumes" not in pod


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "says"),
    [
        ("tpu_pod.sh", ["start"], POD, "unknown action start"),
        ("tpu_pod.sh", ["run", "train"], POD, "run: expected -- train"),
        ("xpk.sh", ["train"], XPK, "expected -- train"),
        ("slurm.sh", [], {"WORKDIR": "w"}, "expected train"),
        ("kubernetes.sh", ["--"], JOBSET, "expected -- train"),
        ("kubernetes.sh", TRAIN, {}, "NAME: kubernetes.sh: the name of the job"),
    ],
)
def test_a_mistake_is_one_sentence(name, arguments, variables, says):
    done = shell(name, arguments, **variables)
    assert done.returncode != 0
    assert says in done.stderr and done.stderr.count("\n") == 1


# ---- the local launcher


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], STOPPED),
        ([76, -9], PEER_LOST),
        ([134, 76], PEER_LOST),
        ([75, 76], PEER_LOST),
        ([76, 1], 1),
        ([2, 2], 2),
    ],
)
def test_the_worst_of_the_codes_is_the_jobs(codes, code):
    assert worst(codes) == code


def local(*arguments: str, cwd: Path = ROOT) -> subprocess.Popen:
    command = [sys.executable, str(LAUNCH / "local.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_local_shows_every_processs_lines_and_a_mistake_is_not_restarted():
    job = local("--processes", "2", "--restarts", "3", *TRAIN[:2], "--config=nothing")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2, output
    assert sorted(line[:18] for line in output.splitlines()) == ["[0] effattn train:"] + [
        "[1] effattn train:"
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "2"], "no command: expected one after `--`"),
        (["--processes", "0", *TRAIN], "--processes: got 0, expected at least 1"),
    ],
)
def test_local_says_a_mistake(arguments, says):
    job = local(*arguments)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2 and says in output


@pytest.mark.slow
def test_local_jobs_stop_resume_and_restart(tmp_path):
    """SIGTERM to the launcher saves; the same command goes on; a killed process is replaced."""
    config, workdir = tmp_path / "config.py", tmp_path / "run"
    config.write_text(CONFIG.format(source=corpus(), cache=str(tmp_path), steps=STEPS))
    command = ["--", "train", f"--config={config}", f"--workdir={workdir}"]
    two = ["--processes", "2", "--devices-per-process", "2"]

    def started(*options: str) -> subprocess.Popen:
        job = local(*two, *options, *command)
        assert job.stdout is not None
        while "step " not in (line := job.stdout.readline()):
            assert line, "ended before its first step"
        return job

    job = started("--restarts", "1")
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == STOPPED, output
    assert "stopped at step" in output and "restart" not in output
    stopped = max(losses(workdir))
    assert stopped < STEPS

    job = started("--restarts", "1")
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "[0] effattn train: process 0 of 2: another process of the job has gone" in output
    assert "local: exit code 76, restart 1 of 1" in output
    assert re.search(r"\[0\] .*going on from step \d+", output)
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
