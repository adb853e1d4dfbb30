"""Checkpoints of a run: saved while training goes on, restored whole or for the parameters alone.

The only file that knows Orbax. A checkpoint of step n holds three items: `params`, `state` (step,
optimizer state, extra, key) and `meta` (schema version, config, vocabulary, data identity and
position). Orbax makes a checkpoint under a temporary name and renames it when it is complete, so a
kill at any moment leaves the earlier ones as they were.
"""

import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from effattn.config import ConfigError, from_dict
from effattn.distributed import meet
from effattn.experiment import Experiment
from effattn.parallel.mesh import MeshConfig
from effattn.train.checksum import checksum
from effattn.train.shards import missing_shards
from effattn.train.state import TrainState, abstract_model, abstract_params, check_finite, dotted

if TYPE_CHECKING:
    from etils import epath

SCHEMA = 1
log = logging.getLogger("effattn")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, for a reason outside of the run (a full disk)."""


class UnreadableCheckpoint(ValueError):
    """A checkpoint that is corrupt or was not written by this package."""


class Run(NamedTuple):
    """A finished or unfinished run, for reading. nnx.merge(graphdef, params) is its model."""

    experiment: Experiment
    graphdef: nnx.GraphDef
    params: Any
    step: int


def as_path(workdir: str | os.PathLike[str]) -> "epath.Path":
    """A local path made absolute, or a gs:// or s3:// path."""
    from etils import epath

    text = os.fspath(workdir)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


class Checkpoints:
    """The folder `workdir/checkpoints`.

    keep_last newest checkpoints stay, and the keep_best with the lowest validation loss among
    those saved with one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        # Its notes on every save and preserved step say nothing to a user.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = as_path(workdir) / "checkpoints"
        self._ocp = ocp
        self._pending: int | None = None

        def loss(metrics: dict[str, float]) -> float:
            return metrics["loss"]

        policies: list[Any] = [LatestN(keep_last)]
        if keep_best:
            # max_to_keep with best_fn would delete the newest and send a resume backwards.
            policies.append(
                BestN(
                    get_metric_fn=loss,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            # Without best_fn metrics are not written, and the next process knows no best.
            best_fn=loss,
            best_mode="min",
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            preservation_policy=AnyPreservationPolicy(policies),
        )
        if not read_only and jax.process_index() == 0:
            self._drop_garbled_metrics()
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending. Whether each can be read is not known yet."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None where none was saved with one."""
        losses = {}
        for step in self.steps():
            try:
                metrics = self._manager.metrics(step)
            except Exception as error:  # a foreign folder: Orbax raises whatever it met
                log.warning("%s: metrics cannot be read: %s", self.path(step), _first_line(error))
                continue
            if metrics is not None:
                losses[step] = metrics["loss"]
        return min(losses, key=losses.__getitem__) if losses else None

    def _drop_garbled_metrics(self) -> None:
        """Orbax ends in a traceback on a garbled loss, of any checkpoint, at any moment."""
        for file in self.directory.glob("*/metrics/metrics"):
            try:
                json.loads(file.read_text())
            except ValueError:
                log.warning("%s: cannot be read, so this checkpoint has no rank", file)
                file.parent.rename(file.parent.with_name("metrics.unreadable"))

    def path(self, step: int) -> "epath.Path":
        return self.directory / str(step)

    def save(
        self,
        step: int,
        state: TrainState,
        meta: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Starts a save and returns; the state may be donated at once. A step that is already there
        is left alone. Raises CheckpointError where this save or the one before it failed.
        """
        if step in self._manager.all_steps():
            return
        save, record = self._ocp.args.StandardSave, self._ocp.args.JsonSave
        rest = {
            "step": state.step,
            "opt_state": state.opt_state,
            "extra": state.extra,
            "key": state.key,
        }
        sums = {"params": checksum(state.params), "state": checksum(rest)}
        arguments = self._ocp.args.Composite(
            params=save(state.params),
            state=save(rest),
            meta=record({"schema": SCHEMA, "step": step, "checksums": sums} | meta),
        )
        metrics = None if validation_loss is None else {"loss": float(validation_loss)}
        self._told(lambda: self._manager.wait_until_finished())
        self._pending = step
        self._told(lambda: self._manager.save(step, metrics=metrics, args=arguments, force=True))

    def check(self) -> None:
        """Raises CheckpointError if a save that is under way has failed; does not wait."""
        self._told(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when the last save is complete. Raises CheckpointError where it failed."""
        self._told(self._manager.wait_until_finished)
        self._pending = None

    def close(self) -> None:
        self._manager.close()

    def _told(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # tensorstore, Orbax and the file system raise many types
            step, self._pending = self._pending, None
            self._manager.reload()
            kept = [s for s in self.steps() if s != step]
            rest = f"{self.path(kept[-1])} is intact" if kept else "there is no earlier one"
            raise CheckpointError(
                f"checkpoint {self.path(step) if step is not None else self.directory} could not "
                f"be saved: {_first_line(error)}; {rest}"
            ) from error

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` recorded beside the arrays. Raises UnreadableCheckpoint."""
        args = self._ocp.args
        meta = self._read(step, args.Composite(meta=args.JsonRestore())).meta
        if not isinstance(meta, dict) or "schema" not in meta or "config" not in meta:
            raise UnreadableCheckpoint(f"{self.path(step)}: not a checkpoint of effattn")
        if meta["schema"] > SCHEMA:
            raise UnreadableCheckpoint(
                f"{self.path(step)}: written by a newer effattn (schema {meta['schema']}, this one "
                f"reads {SCHEMA})"
            )
        return meta

    def params(self, step: int, abstract: Any) -> Any:
        """The parameters, placed as `abstract` says. Raises UnreadableCheckpoint."""
        return self._items(step, {"params": abstract})["params"]

    def state(self, step: int, abstract: TrainState) -> TrainState:
        """The whole state, placed as `abstract` says. Raises UnreadableCheckpoint."""
        rest = {
            "step": abstract.step,
            "opt_state": abstract.opt_state,
            "extra": abstract.extra,
            "key": abstract.key,
        }
        items = self._items(step, {"params": abstract.params, "state": rest})
        return TrainState(params=items["params"], **items["state"])

    def set_aside(self, step: int) -> None:
        """Renames an unreadable checkpoint, so that its step can be saved again."""
        if jax.process_index() == 0:
            source = self.path(step)
            target, number = self.directory / f"{step}.unreadable", 1
            while target.exists():
                target, number = self.directory / f"{step}.unreadable{number}", number + 1
            source.rename(target)
        meet("effattn_set_aside")
        self._manager.reload()

    def _items(self, step: int, items: dict[str, Any]) -> Any:
        self._check_files(step, items)
        self._check_leaves(step, items)
        restore = self._ocp.args.StandardRestore
        arguments = {name: restore(abstract) for name, abstract in items.items()}
        restored = self._read(step, self._ocp.args.Composite(**arguments))
        sums = self.meta(step)["checksums"]
        for name in items:
            if checksum(restored[name]) != sums[name]:
                raise UnreadableCheckpoint(
                    f"{self.path(step) / name}: its numbers are not those that were saved"
                )
        return restored

    def _read(self, step: int, arguments: Any) -> Any:
        try:
            return self._manager.restore(step, args=arguments)
        except Exception as error:  # JSONDecodeError, ValueError, KeyError, ...: all are corruption
            reason = _first_line(error)
        _forget_failed_reads()
        raise UnreadableCheckpoint(f"{self.path(step)}: cannot be read: {reason}")

    def _check_files(self, step: int, items: Iterable[str]) -> None:
        """Orbax fails on a missing file in its own words, in each of many threads."""
        for item in items:
            folder = self.path(step) / item
            try:
                missing = missing_shards(folder)
            except Exception as error:  # tensorstore, on a tree that is not one
                missing = f"its list of arrays cannot be read: {_first_line(error)}"
            if missing is not None:
                raise UnreadableCheckpoint(f"{folder}: {missing}")

    def _check_leaves(self, step: int, items: dict[str, Any]) -> None:
        """Orbax casts a wrong dtype silently and reports shapes leaf by leaf in its own words."""
        try:
            # A manager that has restored one item knows no others; a fresh one reads them all.
            with self._ocp.CheckpointManager(
                self.directory,
                options=self._ocp.CheckpointManagerOptions(create=False, read_only=True),
                item_handlers={name: self._ocp.StandardCheckpointHandler() for name in items},
            ) as manager:
                metadata = manager.item_metadata(step)
        except Exception as error:
            raise UnreadableCheckpoint(
                f"{self.path(step)}: cannot be read: {_first_line(error)}"
            ) from error
        for item, tree in items.items():
            if metadata[item] is None:
                raise UnreadableCheckpoint(f"{self.path(step) / item}: missing or unreadable")
            found = {
                tuple(map(_key, path)): leaf
                for path, leaf in jax.tree_util.tree_flatten_with_path(metadata[item].tree)[0]
            }
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                    continue
                there = found.get(tuple(map(_key, path)))
                if there is None:
                    raise UnreadableCheckpoint(
                        f"{self.path(step) / item}: {dotted(path)} is missing"
                    )
                if tuple(there.shape) != leaf.shape or np.dtype(there.dtype) != leaf.dtype:
                    raise UnreadableCheckpoint(
                        f"{self.path(step) / item}: {dotted(path)} is {there.dtype}"
                        f"{list(there.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
                    )


def restore_newest(
    checkpoints: Checkpoints, abstract: TrainState, check: Callable[[dict[str, Any]], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """(state, meta) of the newest readable checkpoint; None in an empty folder.

    check: raises ValueError where the run that wrote `meta` is not the run that goes on. An
    unreadable checkpoint costs one warning, and is renamed once an older one has been read. Raises
    UnreadableCheckpoint where none can be read.
    """
    unreadable: list[tuple[int, UnreadableCheckpoint]] = []
    for step in reversed(checkpoints.steps()):
        try:
            meta = checkpoints.meta(step)
            check(meta)
            state = checkpoints.state(step, abstract)
        except UnreadableCheckpoint as error:
            unreadable.append((step, error))
            continue
        for bad, why in unreadable:
            log.warning("%s; going on from step %d", why, step)
            checkpoints.set_aside(bad)
        return state, meta
    if unreadable:
        raise UnreadableCheckpoint(
            f"{unreadable[0][1]}; no other checkpoint in {checkpoints.directory} can be read; "
            "take another workdir, or remove this one to start anew"
        )
    return None


def load_run(
    workdir: str | os.PathLike[str],
    step: int | str | None = None,
    *,
    mesh: Mesh | None = None,
) -> Run:
    """The config, model and parameters of a run, without its optimizer state.

    step: None for the newest checkpoint, "best" for the one with the lowest validation loss, or a
    number. mesh: where the parameters go; None: one device. Raises ValueError where there is no
    such run or step, or its checkpoint cannot be read.
    """
    directory = as_path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"workdir: {workdir} holds no run (no folder {directory})")
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise ValueError(f"workdir: {workdir} holds no complete checkpoint yet")
        if step == "best":
            chosen = checkpoints.best_step()
            if chosen is None:
                raise ValueError(f"step: no checkpoint of {workdir} was saved with an evaluation")
        elif step is None:
            chosen = steps[-1]
        elif step in steps:
            chosen = int(step)
        else:
            raise ValueError(f"step: got {step!r}, {workdir} has {', '.join(map(str, steps))}")
        meta = checkpoints.meta(chosen)
        try:
            experiment = from_dict(meta["config"])
        except ConfigError as error:
            raise ValueError(f"{checkpoints.path(chosen)}: {error}") from error
        mesh = MeshConfig(data=1).build(jax.devices()[:1]) if mesh is None else mesh
        model = abstract_model(experiment, meta["vocab_size"])
        params = checkpoints.params(chosen, abstract_params(model, mesh)[0])
        check_finite(params, str(checkpoints.path(chosen)))
    finally:
        checkpoints.close()
    return Run(experiment, model.graphdef, params, chosen)


def _forget_failed_reads() -> None:
    """Drops Orbax's half-done reads without the pages that Python prints about each of them."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _key(entry: Any) -> str:
    """One entry of a pytree path; saved trees spell tuples, attributes and integers as strings."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300].rstrip(".")
