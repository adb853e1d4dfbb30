"""Training from the first line to the last: `train(experiment, workdir)`.

Mesh, shapes, optimizer, state, then a loop that takes a batch, steps, logs, evaluates and saves.
The same call on the same workdir goes on where the last one stopped, bit for bit.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from effattn.batch import Batch
from effattn.config import to_dict
from effattn.data.config import IMAGES, TASKS
from effattn.data.pipeline import open_dataset
from effattn.distributed import meet
from effattn.evaluate import evaluate
from effattn.experiment import Experiment, validate
from effattn.parallel.mesh import compile_afresh, process_rows, put_batch
from effattn.train import resume
from effattn.train.checkpoint import Checkpoints, as_path, restore_newest
from effattn.train.flops import training_flops
from effattn.train.metrics import Metrics, StepFailed
from effattn.train.program import make_program
from effattn.train.report import versions, write_report
from effattn.train.state import TrainState

if TYPE_CHECKING:
    from etils import epath
    from jax.sharding import NamedSharding


def train(
    experiment: Experiment,
    workdir: str | os.PathLike[str],
    *,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Trains until `train.steps`, or until SIGTERM, Ctrl-C or `stop()`; returns the result.

    result["status"]: "finished", or "stopped" after a checkpoint of the step reached. A finished
    result is also in workdir/result.json. A workdir that holds a checkpoint is gone on with.
    stop: called once after every step, and between the batches of an evaluation.
    Raises ValueError for what the user can put right (a field, the workdir, another model than the
    checkpoint's), NonFiniteLoss, CapacityOverflow, and CheckpointError where none can be written.
    """
    validate(experiment)
    config = experiment.train
    dataset = open_dataset(experiment.data)
    batch_size, seq_len = experiment.data.batch_size, experiment.data.seq_len
    mesh = experiment.mesh.build()
    compile_afresh(mesh)
    program = make_program(experiment, dataset.vocab_size, mesh)
    model, order, step_function = program.model, program.order, program.step
    abstract, sharding = program.abstract, program.rows
    _check_prefix(experiment, nnx.merge(model.graphdef, model.params))
    flops = training_flops(experiment.model, vocab_size=dataset.vocab_size, seq_len=seq_len)
    root = _make_workdir(workdir)
    record = to_dict(experiment)
    meta = {
        "config": record,
        "vocab_size": dataset.vocab_size,
        "data_identity": dataset.identity,
    }
    checkpoints = Checkpoints(root, keep_last=config.keep_last, keep_best=config.keep_best)
    rows = process_rows(mesh, batch_size)
    batches = dataset.train_iterator(config.seed, rows=rows)
    metrics = None
    with jax.set_mesh(mesh), _interruptions(stop) as interrupted:
        try:
            restored = restore_newest(
                checkpoints,
                abstract,
                lambda found: resume.check_same_run(
                    found, meta, workdir=root, allow_data_change=config.allow_data_change
                ),
            )
            if restored is not None:
                state, found = restored
                resume.continue_data(batches, found, meta)
                resume.check_params(state.params, root)
            else:
                state = program.init(jax.random.key(config.seed))
                if config.init_from is not None:
                    state = resume.init_from(
                        state, config.init_from, abstract.params, experiment.model
                    )
            step = first_step = int(state.step)
            if first_step >= config.steps and (done := _finished(root, first_step)):
                print(f"{root}: finished at step {first_step}; nothing to do")
                return done
            if jax.process_index() == 0:
                (root / "config.json").write_text(json.dumps(record, indent=2) + "\n")
            metrics = Metrics(
                root,
                first_step=first_step,
                steps=config.steps,
                log_every=config.log_every,
                tokens_per_step=batch_size * seq_len,
                flops_per_step=None if flops is None else flops * batch_size * seq_len,
                config=record,
                tensorboard=config.tensorboard,
                wandb_project=config.wandb_project,
            )
            metrics.say(_opening(root, model.num_parameters, mesh, program.whole, first_step))

            validation, stopped = None, False
            while step < config.steps and not stopped:
                _profile(config.profile_steps, step, root, metrics)
                batch = _ordered(next(batches), order)
                if jax.process_count() > 1:
                    batch = put_batch(batch, sharding, rows, batch_size)
                state, step_metrics = step_function(state, batch)
                step += 1
                metrics.step(step, step_metrics)
                stopped = interrupted()
                last = step == config.steps
                validation = None
                if last or _due(step, config.eval_every) and not stopped:
                    metrics.pause()
                    limit = None if last else config.eval_batches
                    placed = _Placed(dataset, sharding, rows, order, limit, interrupted)
                    validation = _validate(model.graphdef, state, placed)
                    if validation is None:
                        stopped = True
                    else:
                        metrics.evaluation(step, validation)
                if last or stopped or _due(step, config.checkpoint_every):
                    # Lines up to a checkpoint are on disk before it is: a run that is killed
                    # and goes on from it has them all, and no checkpoint of a bad step exists.
                    metrics.pause()
                    checkpoints.save(
                        step,
                        state,
                        {**meta, "data_position": batches.get_state()},
                        None if validation is None else validation["loss"],
                    )
                checkpoints.check()
            metrics.drain()
            checkpoints.wait()
            if stopped and (step < config.steps or validation is None):
                metrics.say(f"stopped at step {step}; the same command goes on")
                meet("effattn_stopped")
                return {"status": "stopped", "step": step}
            if validation is None:  # the run was cut off between its last step and its report
                placed = _Placed(dataset, sharding, rows, order, None, lambda: False)
                validation = _validate(model.graphdef, state, placed)
                assert validation is not None  # nothing can interrupt it
                metrics.evaluation(step, validation)
            result = {
                "status": "finished",
                "name": root.name,
                "step": step,
                "loss": metrics.last_loss(),
                "validation": validation,
                "tokens": step * batch_size * seq_len,
                "tokens_per_second": metrics.tokens_per_second,
                "parameters": model.num_parameters,
                "flops_per_token": flops,
                "data": dataset.describe(),
                "versions": versions(),
            }
            metrics.close()
            if jax.process_index() == 0:
                write_report(root, result)
            meet("effattn_finished")  # others may not leave while one still writes
            return result
        except StepFailed as error:
            raise _explained(error, step, batches, dataset, config.seed, checkpoints) from None
        finally:
            batches.close()
            if metrics is not None:
                metrics.close()
            checkpoints.close()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_prefix(experiment: Experiment, model: Any) -> None:
    """Raises ValueError where a model would read the answers of its own loss."""
    data, prefix = experiment.data, getattr(model, "prefix_length", 0)
    if data.sources[0] in (*TASKS, *IMAGES):
        return
    if prefix >= data.seq_len:
        raise ValueError(
            f"data.seq_len: got {data.seq_len}, expected more than the {prefix} tokens of the "
            "model's prefix: what comes after it is what is scored"
        )
    if prefix > data.prefix_length:
        raise ValueError(
            f"data.prefix_length: got {data.prefix_length}, expected at least {prefix}: every "
            "token sees those of the model's prefix, where a loss for the next one would read its "
            "answer"
        )


def _ordered(batch: Batch, order: Any) -> Batch:
    return batch if order is None else jax.tree.map(lambda x: x[:, order], batch)


def _make_workdir(workdir: str | os.PathLike[str]) -> "epath.Path":
    """The workdir, made and written to once. Raises ValueError where that cannot be done."""
    root = as_path(workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".write_test_{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"workdir: cannot write to {root}: {error.strerror or error}") from error
    return root


def _finished(root: "epath.Path", step: int) -> dict[str, Any] | None:
    """The result of a run that ended at `step`, if its report was written."""
    path = root / "result.json"
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return result if result.get("step") == step else None


def _opening(root: "epath.Path", parameters: int, mesh: Any, whole: int, first_step: int) -> str:
    text = f"{root}: {parameters:,} parameters on {mesh.size} {mesh.devices.flat[0].platform}"
    if whole:
        text += f"; {whole} parameters stay whole, fsdp={mesh.shape['fsdp']} divides no axis"
    return f"{text}; going on from step {first_step}" if first_step else text


@contextmanager
def _interruptions(stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM, Ctrl-C or `stop` asked for an end.

    A second Ctrl-C interrupts at once. Handlers are put back at the end; outside of the main
    thread, where Python allows none, only `stop` counts. With several processes all must ask at the
    same moments, and all get the same answer, whichever of them was told to end.
    """
    asked = False
    previous = {}
    several = jax.process_count() > 1

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        wanted = [signal.SIGINT]
        if not several:
            # jax.distributed listens to SIGTERM itself, and tells the others.
            wanted.append(signal.SIGTERM)
        previous = {number: signal.signal(number, handler) for number in wanted}
    try:
        if several:
            yield _agreed(stop)
        else:
            yield lambda: asked or (stop is not None and stop())
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _agreed(stop: Callable[[], bool] | None) -> Callable[[], bool]:
    """Whether any process was told to end (SIGTERM), told to all of them at the same call."""
    calls, ended = 0, False

    def interrupted() -> bool:
        nonlocal calls, ended
        calls += 1
        if stop is not None and stop() and not ended:
            os.kill(os.getpid(), signal.SIGTERM)
        ended = ended or multihost_utils.reached_preemption_sync_point(calls)
        return ended

    return interrupted


class _Placed:
    """A dataset's validation split for `evaluate`: on the mesh, cut short where asked."""

    def __init__(
        self,
        dataset: Any,
        sharding: "NamedSharding",
        rows: np.ndarray,
        order: Any,
        limit: int | None,
        interrupted: Callable[[], bool],
    ):
        self.vocab_size = dataset.vocab_size
        self._dataset, self._sharding = dataset, sharding
        self._rows, self._order = rows, order
        self._limit, self._interrupted = limit, interrupted

    def evaluation_batches(self, split: str, batch_size: int | None = None) -> Iterable[Batch]:
        size = self._dataset.config.batch_size if batch_size is None else batch_size
        batches = self._dataset.evaluation_batches(split, batch_size, rows=self._rows)
        for index, batch in enumerate(batches):
            if index == self._limit:
                return
            if self._interrupted():
                raise InterruptedError
            yield put_batch(_ordered(batch, self._order), self._sharding, self._rows, size)

    def num_bytes(self, split: str) -> int | None:
        # The bytes of a part of the split are not known, so bits per byte are not told.
        return self._dataset.num_bytes(split) if self._limit is None else None


def _validate(graphdef: nnx.GraphDef, state: TrainState, dataset: _Placed) -> dict[str, Any] | None:
    """The figures of `evaluate`; None where an interruption cut it off."""
    model = nnx.merge(graphdef, state.params)
    try:
        figures = evaluate(model, dataset)
    except InterruptedError:
        return None
    return {name: value for name, value in figures._asdict().items() if value is not None}


def _profile(span: tuple[int, int] | None, step: int, root: "epath.Path", metrics: Metrics) -> None:
    """Starts or ends the profiler's trace between two steps."""
    if span is not None and step in span:
        metrics.pause()  # so that the trace holds the steps it names and no others
        if step == span[0]:
            jax.profiler.start_trace(str(root / "profile"))
        else:
            with suppress(RuntimeError):  # resumed inside the span: no trace is running
                jax.profiler.stop_trace()


def _explained(
    error: StepFailed,
    step: int,
    batches: Any,
    dataset: Any,
    seed: int,
    checkpoints: Checkpoints,
) -> StepFailed:
    """The same error with the step, the batch that met it and the checkpoint to go back to."""
    index = batches.get_state()["next_index"] - 1 - (step - error.step)
    batch = dataset.batch_identity(index, seed)
    with suppress(Exception):  # a failed save is not what ended the run
        checkpoints.wait()
    steps = checkpoints.steps()
    good = "no checkpoint was saved before it"
    if steps:
        good = f"the last good checkpoint is {checkpoints.path(steps[-1])}"
    return type(error)(
        f"step {error.step}: {error}; {good}; batch {batch['index']} of seed {seed}, "
        f"sha256 {batch['sha256']}, rows {json.dumps(batch['rows'], default=str)[:500]}",
        step=error.step,
    )
