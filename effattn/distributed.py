"""Several processes as one program: how they find each other, stop together and end together.

`join` comes before anything asks jax for a device. After it `jax.devices()` holds the devices of
all processes, and every process runs the same program on its own part of every array.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import jax

from effattn.checks import check_at_least

# Environment variable of each field of an address, for launchers that cannot set flags.
VARIABLES = {
    "coordinator": "EFFATTN_COORDINATOR",
    "num_processes": "EFFATTN_NUM_PROCESSES",
    "process_id": "EFFATTN_PROCESS_ID",
}

# Exit codes of a job of several processes, beside 0 (finished), 1 (failed) and 2 (a mistake).
STOPPED = 75  # told to end, and saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
PEER_LOST = 76  # another process has gone: the same command goes on from the last checkpoint

# A process that is silent for so long is given up, and with it the job; jax's own default is 100.
HEARTBEAT_SECONDS = 60
# How long a process that ends waits for the others. Those that finish meet before (`meet`), so only
# one that has failed waits, for nothing.
SHUTDOWN_SECONDS = 5

# What gloo, XLA's collectives and the coordination service say when a peer is gone.
_PEER_WORDS = (
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    "coordination service",
    "heartbeat",
    "barrier timed out",
    "socket closed",
    "deadline_exceeded",
    "unavailable:",
    "failed to connect",
)


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cluster: bool = False,
    timeout_seconds: int = 300,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Makes this process one of several, and says whether there are several.

    coordinator: host:port of process 0, which must be able to listen there. What is None is taken
    from the environment (`VARIABLES`). With none of the three, jax is asked for the cluster (Slurm,
    Cloud TPU, GKE, Open MPI) where `cluster` says so, or where `srun` started several tasks: each
    would train on its own otherwise. timeout_seconds: to wait for the others.
    Raises ValueError, in a sentence, for an incomplete or wrong address, for a cluster that jax
    does not find, and where the others do not come in time.
    """
    given = _address(coordinator, num_processes, process_id, environment)
    source = os.environ if environment is None else environment
    if given is None and not cluster and not _started_by_srun(source):
        return False
    if given is not None and given[1] == 1:
        return False
    _use_gloo()
    address, count, index = (None, None, None) if given is None else given
    if given is not None and given[2] > 0:
        _await_coordinator(*given, timeout_seconds)
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if given is None:
            raise ValueError(
                f"--distributed: jax finds no cluster that it knows ({reason}); give "
                "--coordinator, --num-processes and --process-id"
            ) from error
        raise ValueError(
            f"--coordinator: process {index} of {count} did not meet the others at {address} "
            f"within {timeout_seconds} s ({reason})"
        ) from error
    return jax.process_count() > 1


def _await_coordinator(address: str, count: int, index: int, timeout_seconds: int) -> None:
    """jax aborts the process where nobody listens: that is found out, and said, before."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ValueError(
                    f"--coordinator: process {index} of {count} reached nobody at {address} within "
                    f"{timeout_seconds} s ({error}); process 0 listens there"
                ) from error
            time.sleep(0.2)


def _address(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str] | None,
) -> tuple[str, int, int] | None:
    environment = os.environ if environment is None else environment
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    found = {
        name: environment.get(VARIABLES[name]) if value is None else value
        for name, value in given.items()
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        name = missing[0]
        there = next(n for n in found if n not in missing)
        raise ValueError(
            f"{_flag(name)}: not given, expected beside {_flag(there)}={found[there]} (or "
            f"{VARIABLES[name]} in the environment)"
        )
    address = str(found["coordinator"])
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator: got {address!r}, expected host:port")
    count, index = (_whole(name, found[name]) for name in ("num_processes", "process_id"))
    check_at_least("--num-processes", count, 1)
    if not 0 <= index < count:
        raise ValueError(
            f"--process-id: got {index}, expected 0 to {count - 1} for --num-processes={count}"
        )
    return address, count, index


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _whole(name: str, value: int | str | None) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{_flag(name)}: got {value!r}, expected a whole number") from None


def _started_by_srun(environment: Mapping[str, str]) -> bool:
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" in environment


def _use_gloo() -> None:
    """How CPU processes reach each other; other devices have their own ways."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def meet(name: str) -> None:
    """Returns when every process is here; at once in a job of one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def lost_peer(error: BaseException) -> str | None:
    """The sentence for a user where `error` says that another process has gone; else None."""
    if jax.process_count() == 1 or not isinstance(error, (RuntimeError, OSError)):
        return None
    text = str(error)
    if not any(word in text.lower() for word in _PEER_WORDS):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()}: another process of the job has "
        f"gone, so this one ends too; the same command goes on from the last checkpoint, on as "
        f"many processes as it is given ({text.strip().splitlines()[0][:200]})"
    )


def leave(code: int) -> NoReturn:
    """Ends this process now: an ordinary exit would wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
