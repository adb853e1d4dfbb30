"""What a run writes while it runs.

metrics.jsonl, TensorBoard, W&B, a progress line.

Reading a metric from the device waits for it, so the loop hands them over as they are and `Metrics`
reads each one a few steps later, when it is long there.
"""

import json
import math
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

import jax

from effattn import versions as installed
from effattn.train.checkpoint import as_path

if TYPE_CHECKING:
    from etils import epath

# Steps in flight before the oldest one's metrics are read: enough to hide the host's own work.
LAG = 2
PROGRESS_SECONDS = 5.0
REMOTE_SECONDS = 30.0


class StepFailed(RuntimeError):
    """Update `step` of a training run has no result to go on from."""

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class NonFiniteLoss(StepFailed):
    """The loss or the gradient norm is nan or infinite."""


class CapacityOverflow(StepFailed):
    """More rows were to be kept than a buffer of mode "error" holds; see `effattn.nn.compact`."""


class JsonLines:
    """A file of one JSON object per line, appended to and flushed line by line.

    Keeps the lines up to `step` of an earlier run, which an unbroken run would have written too,
    and drops the rest; a torn last line is no error. Object stores cannot append: there the whole
    text is written again every half minute and at `flush`.
    """

    def __init__(self, path: "epath.Path", step: int):
        self.path = path
        kept = "".join(f"{json.dumps(line)}\n" for line in read_lines(path) if line["step"] <= step)
        self._text = kept
        self._written = time.monotonic()
        self._file: TextIO | None = None
        if "://" not in str(path):
            # Written beside and renamed: a kill in between loses no line.
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text(kept)
            os.replace(temporary, path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()

    def write(self, line: dict[str, Any]) -> None:
        text = f"{json.dumps(line)}\n"  # floats by repr, which is exact
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if time.monotonic() - self._written > REMOTE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        else:
            self.path.write_text(self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def read_lines(path: "epath.Path") -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where it is missing, a torn last line left out.

    Raises ValueError that names the file for a broken line elsewhere.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            object_ = json.loads(line)
        except json.JSONDecodeError:
            object_ = None
        if isinstance(object_, dict) and "step" in object_:
            objects.append(object_)
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: not a line of metrics")
    return objects


class Metrics:
    """Collects the steps' metrics and writes them out, `LAG` steps late.

    Only the first process writes. tokens_per_second and model_flops_per_second count the time
    between the moments at which steps were seen to be done; the first step's compilation, pauses
    for evaluation and for saving are left out.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        first_step: int,
        steps: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_step: float | None,
        config: dict[str, Any],
        tensorboard: bool,
        wandb_project: str | None,
    ):
        self.workdir = as_path(workdir)
        self.steps, self.log_every = steps, log_every
        self.tokens_per_step, self.flops_per_step = tokens_per_step, flops_per_step
        self._pending: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self._last_seen: float | None = None
        self._seconds, self._steps_timed = 0.0, 0
        self._total_seconds, self._total_steps = 0.0, 0
        self._last_loss: float | None = None
        self.writes = jax.process_index() == 0
        self._lines: dict[str, JsonLines] = {}
        self._writers: list[Any] = []
        self._progress: Progress | None = None
        if self.writes:
            self._lines = {
                name: JsonLines(self.workdir / f"{name}.jsonl", first_step)
                for name in ("metrics", "evaluations")
            }
            self._writers = _writers(self.workdir, config, tensorboard, wandb_project)
            self._progress = Progress(first_step, steps)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole of this process's training; None before the second step."""
        if not self._total_steps:
            return None
        return self._total_steps * self.tokens_per_step / max(self._total_seconds, 1e-9)

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of update `step` (from 1) and writes those that are LAG steps old.

        Raises NonFiniteLoss or CapacityOverflow.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > LAG:
            self._write_oldest()

    def drain(self) -> None:
        """Writes everything that is pending and flushes the files; waits for the device."""
        while self._pending:
            self._write_oldest()
        for lines in self._lines.values():
            lines.flush()

    def pause(self) -> None:
        """Drains, and leaves the time until the next step out of the throughput."""
        self.drain()
        self._last_seen = None

    def _write_oldest(self) -> None:
        step, arrays = self._pending.popleft()
        values: dict[str, Any] = {k: float(v) for k, v in jax.device_get(arrays).items()}
        now = time.perf_counter()
        if self._last_seen is not None:
            self._seconds += now - self._last_seen
            self._steps_timed += 1
            self._total_seconds += now - self._last_seen
            self._total_steps += 1
        self._last_seen = now
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        logged = bad or step % self.log_every == 0 or step == self.steps
        if logged:
            speed = flops = None
            if self._steps_timed:
                speed = self._steps_timed / max(self._seconds, 1e-9)
                self._seconds, self._steps_timed = 0.0, 0
            values["tokens_per_second"] = None if speed is None else speed * self.tokens_per_step
            if speed is not None and self.flops_per_step is not None:
                flops = speed * self.flops_per_step
            values["model_flops_per_second"] = flops
            self._last_loss = values["loss"]
            if self.writes:
                first = {"step": step, "loss": values["loss"]}
                self._lines["metrics"].write({**first, **values})
                for writer in self._writers:
                    writer.write(step, "train", values)
        if self._progress is not None:
            self._progress.update(step, values["loss"], self.tokens_per_second)
        if bad:
            raise NonFiniteLoss(" and ".join(f"{n} is {values[n]}" for n in bad), step=step)
        if values.get("capacity_error", 0) > 0:
            over = {n: v for n, v in values.items() if n.endswith("_overflow") and v}
            raise CapacityOverflow(
                f"{', '.join(f'{name} is {value:g}' for name, value in over.items())} rows: no "
                "parameter was changed; a larger capacity.share, or mode bucket, has room",
                step=step,
            )

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Writes the results of an evaluation after update `step` to evaluations.jsonl."""
        if not self.writes:
            return
        self._lines["evaluations"].write({"step": step, **values})
        for writer in self._writers:
            writer.write(step, "validation", values)
        assert self._progress is not None
        shown = ", ".join(
            f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)
        )
        self._progress.say(f"step {step}: validation {shown}")

    def last_loss(self) -> float | None:
        """The last training loss that was logged, by this process or by the one before it."""
        if self._last_loss is None:
            lines = read_lines(self.workdir / "metrics.jsonl")
            return lines[-1]["loss"] if lines else None
        return self._last_loss

    def say(self, text: str) -> None:
        """One line for the user, above the progress bar."""
        if self._progress is not None:
            self._progress.say(text)

    def close(self) -> None:
        """Writes what can still be written; safe to call twice."""
        try:
            while self._pending:
                self._write_oldest()
        except StepFailed:
            self._pending.clear()
        for part in (*self._lines.values(), *self._writers):
            part.close()
        if self._progress is not None:
            self._progress.close()
        self._lines, self._writers, self._progress = {}, [], None
        self.writes = False


class Progress:
    """A bar on a terminal; elsewhere a line every few seconds."""

    def __init__(self, first_step: int, steps: int):
        self.steps = steps
        self._bar = None
        self._step = first_step
        self._first = True
        self._printed = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
        speed = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f} {speed}", refresh=False)
            self._bar.update(step - self._step)
        elif (
            self._first
            or step == self.steps
            or time.monotonic() - self._printed >= PROGRESS_SECONDS
        ):
            print(f"step {step}/{self.steps}  loss {loss:.4f}  {speed}".rstrip(), flush=True)
            self._printed, self._first = time.monotonic(), False
        self._step = step

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _TensorBoard:
    def __init__(self, workdir: "epath.Path"):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, part: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{part}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, workdir: "epath.Path", project: str, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"train.wandb_project: got {project!r}, but wandb is not installed; "
                "install effattn[wandb]"
            ) from error
        # The same workdir is the same run: a resumed one continues its curves.
        name = workdir.name
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def write(self, step: int, part: str, values: dict[str, Any]) -> None:
        self._run.log({f"{part}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _writers(
    workdir: "epath.Path", config: dict[str, Any], tensorboard: bool, wandb_project: str | None
) -> list[Any]:
    writers: list[Any] = []
    if tensorboard and installed.version_of("tensorboardX") is not None:
        writers.append(_TensorBoard(workdir))
    if wandb_project is not None:
        writers.append(_Wandb(workdir, wandb_project, config))
    return writers
