"""Several processes on this machine that train as one.

    python scripts/launch/local.py --processes 4 -- train --config=quickstart

What follows `--` is the command line of `effattn`, the same for every process. Each gets a number,
and --devices-per-process devices of the CPU. Their lines come out with their numbers. SIGTERM and
Ctrl-C go to all of them: they save and end; a second Ctrl-C kills. When one dies the others find
out by themselves and end with a message; those that have not after 100 s are killed.

Exit code: 0 all finished; 75 told to end and saved; 76 a process was lost; else that of a process
that failed. With --restarts the same command goes on after 75 (of a process that was preempted, not
of this launcher) and 76.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from effattn.distributed import PEER_LOST, STOPPED, VARIABLES

# Longer than jax takes to find out that a peer is silent (HEARTBEAT_SECONDS), and to end.
GRACE_SECONDS = 100.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments, command = parse(list(sys.argv[1:] if argv is None else argv))
    if arguments.dry_run:
        for index in range(arguments.processes):
            words = [
                f"{name}={value}" for name, value in variables(arguments, "PORT", index).items()
            ]
            print(shlex.join([*words, *command]))
        return 0
    for attempt in range(arguments.restarts + 1):
        job = Job(arguments, command)
        code = job.run()
        if code not in (STOPPED, PEER_LOST) or job.told or attempt == arguments.restarts:
            return code
        print(f"local: exit code {code}, restart {attempt + 1} of {arguments.restarts}", flush=True)
    raise AssertionError("the last attempt returns")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(our own options, the command line of one process)."""
    own, command = argv, []
    if "--" in argv:
        own, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="N")
    parser.add_argument("--restarts", type=int, default=0, metavar="N")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and exit")
    arguments = parser.parse_args(own)
    for name, least in (("processes", 1), ("devices_per_process", 1), ("restarts", 0)):
        if getattr(arguments, name) < least:
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag}: got {getattr(arguments, name)}, expected at least {least}")
    if not command:
        parser.error("no command: expected one after `--`, as in `-- train --config=quickstart`")
    return arguments, [sys.executable, "-m", "effattn", *command]


def variables(arguments: argparse.Namespace, port: int | str, index: int) -> dict[str, str]:
    """What the environment of process `index` has that ours has not."""
    flags = os.environ.get("XLA_FLAGS", "")
    added = {
        VARIABLES["coordinator"]: f"127.0.0.1:{port}",
        VARIABLES["num_processes"]: str(arguments.processes),
        VARIABLES["process_id"]: str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(arguments.devices_per_process),
        "PYTHONUNBUFFERED": "1",
    }
    if "xla_force_host_platform_device_count" in flags:  # another way to say the same
        added["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    return added


class Job:
    """One attempt: all processes from their start to the end of the last one."""

    def __init__(self, arguments: argparse.Namespace, command: list[str]):
        self.told = False  # whether this launcher was told to end
        self._arguments = arguments
        self._command = command
        self._processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """The exit code of the job."""
        handlers = {n: signal.signal(n, self._end) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run()
        finally:
            for process in self._processes:
                process.kill()  # does nothing to one that has ended
                process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        readers = []
        for index in range(self._arguments.processes):
            process = subprocess.Popen(
                self._command,
                env=os.environ | variables(self._arguments, port, index),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C comes through us, once
            )
            self._processes.append(process)
            readers.append(threading.Thread(target=_copy, args=(process.stdout, index)))
            readers[-1].start()
        first_end: float | None = None
        while any(process.poll() is None for process in self._processes):
            codes = [process.returncode for process in self._processes]
            if first_end is None and any(code not in (None, 0) for code in codes):
                first_end = time.monotonic()
            if first_end is not None and time.monotonic() - first_end > self._arguments.grace:
                print(f"local: still running after {self._arguments.grace:g} s: killed", flush=True)
                for process in self._processes:
                    process.kill()
            time.sleep(0.1)
        for reader in readers:
            reader.join()
        return worst([process.returncode for process in self._processes])

    def _end(self, number: int, frame: Any) -> None:
        if self.told and number == signal.SIGINT:
            for process in self._processes:
                process.kill()
        self.told = True
        for process in self._processes:
            process.terminate()


def worst(codes: Sequence[int]) -> int:
    """The exit code of a job: a failure before a loss, a loss before a stop, a stop before 0.

    A process that a signal ended (a negative code, or 128 + the signal) is one that was lost.
    """
    known = [PEER_LOST if code < 0 or code > 128 else code for code in codes]
    failed = [code for code in known if code not in (0, STOPPED, PEER_LOST)]
    return failed[0] if failed else max(known)


def _copy(lines: IO[bytes] | None, index: int) -> None:
    assert lines is not None
    for line in lines:
        text = line.decode(errors="replace").rstrip("\n")
        sys.stdout.write(f"[{index}] {text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
