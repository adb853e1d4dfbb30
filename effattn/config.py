"""Configs are dataclasses of plain values: loading, overriding, checking and recording them.

A config file has `get_config(arg=None)` that returns an Experiment. `load_config` finds it by path
or by bare name, lets `--config.model.num_layers=4` change single fields in place (parsed by
ml_collections.config_flags), and checks every field against its annotation. `to_dict` and
`from_dict` are the form a run keeps in its `config.json`.
"""

import dataclasses
import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
import types
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A mistake in a config, a config file or an override, said in one sentence."""


# ---- values and annotations


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, the annotation itself where it is none."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a plain value may stand in a field of this annotation. An int may stand for a float,
    a bool for neither; None only where the annotation says so."""
    if annotation is Any:
        return True
    if annotation is None:
        return value is None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(_fits(entry, arguments[0]) for entry in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin in (dict, list):
        return isinstance(value, origin)
    if not isinstance(annotation, type):
        return True  # a type variable or a protocol: nothing here can judge it
    if annotation is float:
        return type(value) in (int, float)
    if annotation in (int, bool, str, tuple):
        return type(value) is annotation
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    if annotation is type(None) or annotation is None:
        return "None"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in _members(annotation))
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _annotations(config: Any) -> dict[str, Any]:
    cls = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _wrong_type(path: str, value: Any, annotation: Any) -> ConfigError:
    return ConfigError(f"config.{path}: got {value!r}, expected {_describe(annotation)}")


def check_types(config: Any, path: str = "") -> None:
    """Raises ConfigError unless every field of `config`, and of the configs in it, has its type."""
    for name, annotation in _annotations(config).items():
        value, here = getattr(config, name), f"{path}.{name}" if path else name
        if not _fits(value, annotation):
            raise _wrong_type(here, value, annotation)
        for index, entry in enumerate(value if isinstance(value, tuple) else (value,)):
            if _is_config(entry):
                check_types(entry, f"{here}[{index}]" if isinstance(value, tuple) else here)


# ---- the recorded form


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values; `from_dict` gives an equal config back.

    Every config becomes its fields and `"type": "module:Class"`; tuples become lists.
    Raises ConfigError where a value is not plain or a class could not be imported again.
    """
    cls = type(config)
    module = sys.modules.get(cls.__module__)
    if cls.__module__ == "__main__" or getattr(module, cls.__qualname__, None) is not cls:
        raise ConfigError(
            f"{cls.__qualname__} cannot be recorded: it must stand at the top of an importable "
            f"module, and {cls.__module__} is none; move it out of the config file"
        )
    result: dict[str, Any] = {"type": f"{cls.__module__}:{cls.__qualname__}"}
    for field in dataclasses.fields(config):
        result[field.name] = _to_plain(getattr(config, field.name), field.name)
    return result


def _to_plain(value: Any, name: str) -> Any:
    if _is_config(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_to_plain(entry, name) for entry in value]
    if isinstance(value, dict):
        return {str(key): _to_plain(entry, name) for key, entry in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ConfigError(f"config field {name}: {value!r} is not a plain number, string or tuple")


def from_dict(recorded: dict[str, Any]) -> Any:
    """The config that `to_dict` recorded. A field that was not recorded takes its default.

    Raises ConfigError for an unknown type or field, or a value of the wrong type.
    """
    config = _from_plain(recorded)
    if not _is_config(config):
        raise ConfigError('a recorded config is a mapping with a "type", e.g. "module:Class"')
    check_types(config)
    return config


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_plain(entry) for entry in value)
    if not isinstance(value, dict):
        return value
    if "type" not in value:
        return {key: _from_plain(entry) for key, entry in value.items()}
    cls = _import_class(value["type"])
    names = [field.name for field in dataclasses.fields(cls)]
    fields = {key: _from_plain(entry) for key, entry in value.items() if key != "type"}
    for key in fields:
        if key not in names:
            raise _unknown_key(key, key, cls.__name__, names)
    try:
        return cls(**fields)
    except TypeError as error:
        raise ConfigError(f"{value['type']} cannot be built from its record: {error}") from error


def _import_class(name: Any) -> type:
    module_name, _, class_name = str(name).partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the recorded config needs {name}, which is not here: {error}") from None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"the recorded config names {name}, which is no config dataclass")
    return cls


# ---- config files


def config_names() -> list[str]:
    """Names that `--config=` takes without a path: the modules of effattn.configs."""
    package = importlib.import_module("effattn.configs")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def split_spec(spec: str) -> tuple[str, str | None]:
    """("path/to/file.py" or "name", arg or None) of `path/to/file.py:arg` or `name:arg`."""
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec, re.DOTALL)
    if match is None:
        match = re.fullmatch(r"([^:]*)(?::(.*))?", spec, re.DOTALL)
    assert match is not None
    return match[1], match[2]


def load_config(spec: str, overrides: typing.Sequence[str] = ()) -> Any:
    """The config of `spec` with `overrides` applied and every field's type checked.

    spec: `path/to/file.py`, `path/to/file.py:arg` or a bare name from effattn.configs (`name:arg`).
    overrides: `--config.model.num_layers=4`, in order; a later one wins.
    Raises ConfigError for the user's mistakes: no such file or name, a file that does not load or
    has no get_config, an unknown key, a wrong type.
    """
    name, argument = split_spec(spec)
    if name.endswith(".py"):
        module = _load_file(name)
    elif re.fullmatch(r"\w+", name):
        if name not in config_names():
            near = get_close_matches(name, config_names(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(
                f"--config: got {name!r}, expected a file ending in .py or one of "
                f"{', '.join(config_names())}{hint}"
            )
        module = importlib.import_module(f"effattn.configs.{name}")
    else:
        raise ConfigError(
            f"--config: got {spec!r}, expected path/to/file.py, path/to/file.py:arg or one of "
            f"{', '.join(config_names())}"
        )
    config = _call_get_config(module, spec, argument)
    apply_overrides(config, overrides)
    check_types(config)
    return config


def _load_file(path: str) -> types.ModuleType:
    if not Path(path).is_file():
        name = Path(path).stem
        hint = f"; --config={name} is in the package" if name in config_names() else ""
        raise ConfigError(f"--config: no file {path}{hint}")
    # In sys.modules under one private name, because dataclasses look their module up there.
    module_spec = importlib.util.spec_from_file_location("effattn_config_file", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["effattn_config_file"] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise _file_error(path, error) from error
    return module


def _call_get_config(module: types.ModuleType, spec: str, argument: str | None) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"--config: {spec} has no function get_config(arg=None)")
    try:
        config = get_config() if argument is None else get_config(argument)
    except Exception as error:
        if argument is not None and _raised_in(error, __file__):
            raise ConfigError(f"--config: {spec} takes no argument after the colon") from error
        raise _file_error(str(module.__file__), error) from error
    if not _is_config(config):
        raise ConfigError(f"--config: get_config of {spec} returned {config!r}, not a config")
    return config


def _raised_in(error: Exception, path: str) -> bool:
    return traceback.extract_tb(error.__traceback__)[-1].filename == path


def _file_error(path: str, error: Exception) -> Exception:
    """A sentence with file and line for a mistake in a config file; any other error as it is."""
    if isinstance(error, SyntaxError):
        return ConfigError(f"{error.filename}:{error.lineno}: {error.msg}")
    if isinstance(error, ConfigError):
        return error
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if lines and (isinstance(error, (ImportError, ValueError)) or _raised_in(error, path)):
        return ConfigError(f"{path}:{lines[-1].lineno}: {type(error).__name__}: {error}")
    return error


# ---- overrides


def _unknown_key(path: str, key: str, owner: str, names: list[str]) -> ConfigError:
    near = get_close_matches(key, names, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return ConfigError(
        f"unknown config key {path}{hint} (fields of {owner}: {', '.join(sorted(names))})"
    )


def apply_overrides(config: Any, overrides: typing.Sequence[str]) -> None:
    """Sets fields in place, `--config.model.width=64`, `--config.model.flag` or `--noconfig...`.

    Raises ConfigError for an unknown key, with near matches, and for a value of the wrong type.
    """
    # Imported here: ml_collections brings absl and yaml, which reading a record does not need.
    from absl import flags
    from ml_collections import config_flags
    from ml_collections.config_flags import config_path

    arguments: list[tuple[str, str]] = []
    for override in overrides:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", override, re.DOTALL)
        if match is None:
            raise ConfigError(f"got {override!r}, expected --config.key=value")
        negated, path, text = match.groups()
        annotation = _annotation_at(config, path)
        boolean = bool in _members(annotation)
        if text is None and not boolean:
            raise ConfigError(f"config.{path}: no value given, expected {_describe(annotation)}")
        if text is not None and text.lower() == "none" and _fits(None, annotation):
            config_path.set_value(path, config, None)
            arguments = [done for done in arguments if done[0] != path]
        elif text is not None and negated:
            raise ConfigError(f"--noconfig.{path} takes no value, got {text!r}")
        else:
            value = "false" if negated else "true" if text is None else text
            arguments = [done for done in arguments if done[0] != path]
            arguments.append((path, _quote_entries(value, annotation)))

    for path, text in arguments:
        # One private set of flags for each key, so that an error is about that key.
        values = flags.FlagValues()
        argv = ["effattn", f"--config.{path}={text}"]
        try:
            # The dataclass flag copies its default; a parser that hands it back edits in place.
            holder = config_flags.DEFINE_config_dataclass(
                "config", config, flag_values=values, sys_argv=argv
            )
            values(argv)
        except (flags.Error, ValueError, TypeError, SyntaxError) as error:
            raise _wrong_type(path, text, _annotation_at(config, path)) from error
        config_path.set_value(path, config, config_path.get_value(path, holder.value))
        annotation = _annotation_at(config, path)
        if not _fits(config_path.get_value(path, config), annotation):
            raise _wrong_type(path, config_path.get_value(path, config), annotation)


def _annotation_at(config: Any, path: str) -> Any:
    """The annotation of the field that `path` names. Raises ConfigError where there is none."""
    parts = re.findall(r"\w+|\[\d+\]", path)
    annotation: Any = None
    walked = ""
    for part in parts:
        if part.startswith("["):
            index = int(part[1:-1])
            if not isinstance(config, tuple) or index >= len(config):
                raise ConfigError(f"config.{walked} has no entry {part}")
            config, annotation = config[index], Any
        elif not _is_config(config):
            raise ConfigError(f"config.{walked} is {config!r}, which has no field {part}")
        else:
            annotations = _annotations(config)
            if part not in annotations:
                owner = type(config).__name__ + (f", config.{walked}" if walked else "")
                raise _unknown_key(f"{walked}.{part}".lstrip("."), part, owner, list(annotations))
            config, annotation = getattr(config, part), annotations[part]
        walked = f"{walked}{part}" if part.startswith("[") else f"{walked}.{part}".lstrip(".")
    if walked != path:
        raise ConfigError(f"got the config key {path!r}, expected names joined by dots")
    if _is_config(config):
        names = ", ".join(_annotations(config))
        raise ConfigError(f"config.{path} is a group: set one of its fields ({names})")
    return annotation


def _quote_entries(text: str, annotation: Any) -> str:
    """`conv,linear` as `('conv', 'linear')` where the field is a tuple of strings."""
    of_strings = any(
        typing.get_origin(member) is tuple and str in typing.get_args(member)
        for member in _members(annotation)
    )
    if of_strings and not re.search(r"[()\[\]'\"]", text):
        return repr(tuple(entry.strip() for entry in text.split(",") if entry.strip()))
    return text
