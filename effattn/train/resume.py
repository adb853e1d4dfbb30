"""Where a state comes from that is not new: the run's checkpoint, or another's parameters."""

import dataclasses
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import jax

from effattn.config import to_dict
from effattn.export import load_config_dict, load_weights
from effattn.train.checkpoint import as_path, load_run
from effattn.train.state import TrainState, check_finite, dotted

if TYPE_CHECKING:
    from etils import epath

# Fields that change neither the parameters nor what they mean.
FREE_MODEL_FIELDS = {"remat"}
FREE_DATA_FIELDS = {"cache_dir", "prefetch"}


def differences(old: Any, new: Any, name: str, free: Set[str] = frozenset()) -> list[str]:
    """`name.field is 4, was 2` for every field in which two recorded configs differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name} is {new!r}, was {old!r}"]
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in free:
            missing = "not there"
            found += differences(old.get(key, missing), new.get(key, missing), f"{name}.{key}")
    return found


def check_same_run(
    found: dict[str, Any], meta: dict[str, Any], *, workdir: "epath.Path", allow_data_change: bool
) -> None:
    """Raises ValueError where the run that wrote `found` cannot go on as the one of `meta`."""
    old, new = found["config"], meta["config"]
    changed = differences(old["model"], new["model"], "model", FREE_MODEL_FIELDS)
    if changed:
        raise ValueError(
            f"workdir: {workdir} holds another model: {'; '.join(changed)}; "
            "take another workdir, or the old model"
        )
    if found["vocab_size"] != meta["vocab_size"]:
        raise ValueError(
            f"workdir: {workdir} was trained with a vocabulary of {found['vocab_size']}, the data "
            f"has {meta['vocab_size']}"
        )
    changed = [
        *differences(old["optimizer"]["name"], new["optimizer"]["name"], "optimizer.name"),
        *differences(old["train"]["seed"], new["train"]["seed"], "train.seed"),
    ]
    if changed:
        raise ValueError(
            f"workdir: {workdir} cannot be gone on with: {'; '.join(changed)}; take another "
            "workdir, or train.init_from this one"
        )
    changed = data_changes(found, meta)
    if changed and not allow_data_change:
        raise ValueError(
            f"workdir: {workdir} was trained on other data: {'; '.join(changed)}; "
            "train.allow_data_change=True goes on with the new data from its beginning"
        )


def data_changes(found: dict[str, Any], meta: dict[str, Any]) -> list[str]:
    changed = differences(found["config"]["data"], meta["config"]["data"], "data", FREE_DATA_FIELDS)
    if found["data_identity"] != meta["data_identity"]:
        changed.append(
            f"the content's identity is {meta['data_identity'][:12]}, "
            f"was {found['data_identity'][:12]}"
        )
    return changed


def continue_data(batches: Any, found: dict[str, Any], meta: dict[str, Any]) -> None:
    """Puts the iterator where the checkpoint left it; other data starts at its beginning."""
    if not data_changes(found, meta):
        batches.set_state(found["data_position"])


def check_params(params: Any, root: "epath.Path") -> None:
    check_finite(params, f"workdir: the checkpoint in {root}")


def init_from(state: TrainState, source: str, abstract: Any, model: Any = None) -> TrainState:
    """`state` with the parameters of a run directory or a safetensors file.

    abstract: ShapeDtypeStructs with shardings. model: the config. Where it has `recycles`, the name
    of a part and of the field with that part's config, the source may also be a run of the part
    alone: the other parameters then stay as they are in `state`. Raises ValueError where the source
    cannot be read, its parameters do not fit or are not finite.
    """
    path = as_path(source)
    where = f"train.init_from: {source}"
    try:
        run = load_run(path) if path.is_dir() else None
        part = None
        if hasattr(model, "recycles"):
            recorded = load_config_dict(path) if run is None else to_dict(run.experiment)
            part = _recycled_part(recorded["model"], model)
        wanted = abstract if part is None else abstract[part]
        params = load_weights(path, wanted) if run is None else _of_run(run.params, wanted)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    check_finite(params, where)
    if part is not None:
        params = {**state.params, part: params}
    return dataclasses.replace(state, params=params)


def _recycled_part(recorded: dict[str, Any], model: Any) -> str | None:
    """The part of the model that the parameters of a recorded one are for; None: all of it.

    Raises ValueError where that is another kind of model and not the one that the part is.
    """
    if recorded["type"] == to_dict(model)["type"]:
        return None
    part = model.recycles
    wanted = to_dict(getattr(model, part))
    found = differences(recorded, wanted, f"model.{part}", FREE_MODEL_FIELDS)
    if found:
        raise ValueError(f"it holds another model: {found[0]}")
    return part


def _of_run(params: Any, abstract: Any) -> Any:
    """A run's parameters, placed as `abstract` says."""
    found = {dotted(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def take(key: Any, wanted: Any) -> jax.Array:
        leaf = found.pop(dotted(key), None)
        if leaf is None or leaf.shape != wanted.shape:
            got = "not there" if leaf is None else f"of shape {leaf.shape}"
            raise ValueError(f"parameter {dotted(key)} is {got}, expected {wanted.shape}")
        return jax.device_put(leaf, wanted.sharding)

    taken = jax.tree_util.tree_map_with_path(take, abstract)
    if found:
        raise ValueError(f"the model has no parameter {sorted(found)[0]}")
    return taken
