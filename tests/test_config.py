"""Configs: loading, overriding, checking types, and the recorded form."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from effattn.config import (
    ConfigError,
    apply_overrides,
    check_types,
    config_names,
    from_dict,
    load_config,
    split_spec,
    to_dict,
)


@dataclass(kw_only=True)
class Layer:
    width: int = 4
    scale: float = 0.5
    window: int | None = 3
    axes: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ("a",)
    gated: bool = False
    kind: Literal["x", "y"] = "x"
    title: str = "t"


@dataclass(kw_only=True)
class Root:
    model: Layer = field(default_factory=Layer)
    layers: tuple[Layer, ...] = ()
    extra: Layer | None = None
    rate: float = 0.1


def overridden(*overrides):
    config = Root(layers=(Layer(), Layer()))
    apply_overrides(config, overrides)
    check_types(config)
    return config


@pytest.mark.parametrize(
    "text, path, value",
    [
        ("--config.model.width=7", "model.width", 7),
        ("--config.rate=1e-3", "rate", 1e-3),
        ("--config.rate=2", "rate", 2.0),
        ("--config.model.window=None", "model.window", None),
        ("--config.model.window=9", "model.window", 9),
        ("--config.model.axes=3,4", "model.axes", (3, 4)),
        ("--config.model.axes=(3, 4)", "model.axes", (3, 4)),
        ("--config.model.names=conv,linear", "model.names", ("conv", "linear")),
        ("--config.model.names=('conv',)", "model.names", ("conv",)),
        ("--config.model.names=()", "model.names", ()),
        ("--config.model.gated", "model.gated", True),
        ("--config.model.gated=true", "model.gated", True),
        ("--noconfig.model.gated", "model.gated", False),
        ("--config.model.title=it's = a b", "model.title", "it's = a b"),
        ("--config.model.title=12", "model.title", "12"),
        ("--config.layers[1].width=8", "layers.1.width", 8),
    ],
)
def test_an_override_sets_one_field_with_its_type(text, path, value):
    config = overridden(text)
    for part in path.split("."):
        config = config[int(part)] if part.isdecimal() else getattr(config, part)
    assert config == value and type(config) is type(value)


def test_the_last_override_of_a_field_wins():
    assert overridden("--config.model.window=None", "--config.model.window=5").model.window == 5
    assert overridden("--config.model.window=5", "--config.model.window=None").model.window is None
    assert overridden("--config.model.width=5", "--config.model.width=6").model.width == 6


@pytest.mark.parametrize(
    "text, words",
    [
        ("--config.model.widht=3", ["model.widht", "did you mean width?", "gated, kind"]),
        ("--config.modle.width=3", ["unknown config key modle", "did you mean model?"]),
        ("--config.model.width.x=3", ["config.model.width is 4"]),
        ("--config.model=3", ["config.model is a group", "width"]),
        ("--config.model.width=abc", ["config.model.width", "'abc'", "expected int"]),
        ("--config.model.width=4.5", ["'4.5'", "expected int"]),
        ("--config.model.width=None", ["'None'", "expected int"]),
        ("--config.model.width=True", ["expected int"]),
        ("--config.model.width", ["no value given", "expected int"]),
        ("--config.model.gated=perhaps", ["'perhaps'", "expected bool"]),
        ("--noconfig.model.gated=1", ["takes no value"]),
        ("--config.model.names=(3,)", ["(3,)", "tuple[str, ...]"]),
        ("--config.model.axes=(3,)", ["(3,)", "tuple[int, int]"]),
        ("--config.model.axes=(3, 'x')", ["tuple[int, int]"]),
        ("--config.layers[7].width=3", ["has no entry [7]"]),
        ("--config.extra.width=3", ["config.extra is None"]),
        ("--config.a-b=3", ["config key"]),
    ],
)
def test_a_wrong_override_is_a_sentence(text, words):
    with pytest.raises(ConfigError) as error:
        overridden(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("width", 4.0),
        ("width", True),
        ("width", None),
        ("scale", "0.5"),
        ("axes", [1, 2]),
        ("axes", (1, 2, 3)),
        ("names", ("a", 1)),
        ("names", "a"),
        ("kind", "z"),
        ("gated", 1),
        ("title", None),
    ],
)
def test_a_config_file_cannot_put_a_wrong_type_either(name, value):
    with pytest.raises(ConfigError, match=f"config.model.{name}: got"):
        check_types(Root(model=Layer(**{name: value})))
    with pytest.raises(ConfigError, match=rf"config.layers\[0\].{name}: got"):
        check_types(Root(layers=(Layer(**{name: value}),)))


def test_an_int_may_stand_for_a_float_and_none_where_it_is_allowed():
    check_types(Root(rate=1, model=Layer(window=None), extra=Layer()))


def test_a_recorded_config_comes_back_equal():
    config = Root(layers=(Layer(width=9), Layer(axes=(5, 6))), extra=Layer(names=()), rate=1e-17)
    record = json.loads(json.dumps(to_dict(config)))
    assert record["type"].endswith("test_config:Root")
    assert from_dict(record) == config


def test_a_field_that_was_not_recorded_takes_its_default():
    record = to_dict(Root())
    del record["model"]["title"]
    assert from_dict(record) == Root()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rat": 1.0}, ["unknown config key rat", "did you mean rate?"]),
        ({"rate": "fast"}, ["config.rate", "expected float"]),
        ({"type": "effattn.nowhere:Root"}, ["effattn.nowhere:Root", "not here"]),
        ({"type": "effattn.config:to_dict"}, ["no config dataclass"]),
    ],
)
def test_a_damaged_record_is_a_sentence(change, words):
    with pytest.raises(ConfigError) as error:
        from_dict({**to_dict(Root()), **change})
    for word in words:
        assert word in str(error.value)


def test_a_value_that_is_not_plain_cannot_be_recorded():
    with pytest.raises(ConfigError, match="not a plain number"):
        to_dict(Layer(title=object()))  # type: ignore[arg-type]


def test_a_spec_splits_into_file_or_name_and_argument():
    assert split_spec("a/b.py") == ("a/b.py", None)
    assert split_spec("a/b.py:c:d") == ("a/b.py", "c:d")
    assert split_spec("mqar:based") == ("mqar", "based")
    assert split_spec("mqar:") == ("mqar", "")


def test_every_config_of_the_package_loads_and_comes_back_from_its_record():
    assert {"quickstart", "transformer_stdlib", "based_stdlib", "mqar"} <= set(config_names())
    for name in config_names():
        config = load_config(name)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_file_and_a_bare_name_give_equal_configs():
    by_name = load_config("mqar:window", ["--config.train.steps=3"])
    by_path = load_config("configs/mqar.py:window", ["--config.train.steps=3"])
    assert by_name == by_path and by_name.train.steps == 3


@pytest.mark.parametrize(
    "content, words",
    [
        ("x = (", [":1:", "never closed"]),
        ("import effattn.nothing_here", [":1: ModuleNotFoundError", "nothing_here"]),
        ("y = 3\nundefined_name", [":2: NameError"]),
        ("y = 3", ["no function get_config"]),
        ("def get_config():\n  return None", ["returned None"]),
        ("def get_config():\n  return {'a': 1}", ["not a config"]),
        (
            "from effattn.data.config import DataConfig\n"
            "def get_config():\n  return DataConfig(sourc='x')",
            [":3: TypeError", "sourc"],
        ),
        ("def get_config(arg=None):\n  raise ValueError('no such ' + arg)", ["no such size"]),
    ],
)
def test_a_config_file_with_a_mistake_is_a_sentence(tmp_path, content, words):
    path = tmp_path / "mine.py"
    path.write_text(content + "\n")
    argument = ":size" if "arg" in content else ""
    with pytest.raises(ConfigError) as error:
        load_config(f"{path}{argument}")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("quickstrat", ["'quickstrat'", "did you mean quickstart?"]),
        ("quickstart.py", ["no file quickstart.py", "--config=quickstart is in the package"]),
        ("nowhere/x.py:a", ["no file nowhere/x.py"]),
        ("configs/quickstart", ["expected path/to/file.py"]),
        ("", ["expected path/to/file.py"]),
        ("quickstart:big", ["takes no argument"]),
        ("mqar:bassed", ["mixer", "did you mean based"]),
    ],
)
def test_a_wrong_spec_is_a_sentence(spec, words):
    with pytest.raises(ConfigError) as error:
        load_config(spec)
    for word in words:
        assert word in str(error.value)
