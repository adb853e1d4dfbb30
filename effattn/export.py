"""A model's weights and its experiment's config in one safetensors file.

Names are the path of a parameter joined by dots, `stack.blocks.0.mixer.query.kernel`; stacked
layers stay stacked. The config is JSON under the metadata key "config". Any safetensors reader
opens the file.
"""

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT = "effattn.weights.1"


def flat_names(params: Any) -> dict[str, Any]:
    """{"stack.blocks.0.mixer.query.kernel": leaf, ...} of a nested dict of parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(str(part.key) for part in path): leaf for path, leaf in leaves}


def export_weights(path: str | os.PathLike, params: Any, experiment_dict: dict[str, Any]) -> None:
    """Writes `params`, a nested dict of arrays, and the config to a local file.

    experiment_dict: `effattn.config.to_dict(experiment)`. The file appears whole or not at all.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    tensors = {
        name: np.ascontiguousarray(jax.device_get(leaf))
        for name, leaf in flat_names(params).items()
    }
    metadata = {"format": FORMAT, "config": json.dumps(experiment_dict)}
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        save_file(tensors, str(temporary), metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_config_dict(path: str | os.PathLike) -> dict[str, Any]:
    """The config that `export_weights` stored; `effattn.config.from_dict` makes it an Experiment.

    Raises ValueError that names the file where it is no such file.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"weights: {path} holds no effattn config: its format is {metadata.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    return json.loads(metadata["config"])


def load_weights(path: str | os.PathLike, abstract_params: Any) -> Any:
    """The weights of a file as arrays in the shape of `abstract_params`.

    abstract_params: nested dict of ShapeDtypeStructs or arrays. Where one has a sharding, the
    weight is put there. Raises ValueError that names the file and the first leaf that is missing,
    unknown, or of another shape or dtype: nothing is cast or reshaped.
    """
    wanted = flat_names(abstract_params)
    with _opened(path) as file:
        stored = set(file.keys())
        for name in wanted:
            if name not in stored:
                raise ValueError(f"weights: {path} has no {name}{_near(name, stored)}")
        for name in sorted(stored - set(wanted)):
            raise ValueError(f"weights: {path} has {name}, which the model lacks")
        loaded = []
        for name, leaf in wanted.items():
            array = file.get_tensor(name)
            if array.shape != tuple(leaf.shape) or array.dtype != leaf.dtype:
                raise ValueError(
                    f"weights: {name} in {path} is {array.dtype}{list(array.shape)}, "
                    f"expected {leaf.dtype}{list(leaf.shape)}"
                )
            loaded.append(jax.device_put(array, getattr(leaf, "sharding", None)))
    return jax.tree.unflatten(jax.tree.structure(abstract_params), loaded)


def _opened(path: str | os.PathLike) -> Any:
    """An open safetensors file; ValueError in one sentence where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: {path} is not a readable safetensors file: {error}") from error


def _near(name: str, stored: set[str]) -> str:
    near = get_close_matches(name, stored, n=2)
    return f"; near names: {', '.join(near)}" if near else ""
