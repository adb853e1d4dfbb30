"""Weights survive the way through a safetensors file, and a wrong file is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from effattn.batch import whole_rows
from effattn.config import from_dict, to_dict
from effattn.experiment import Experiment
from effattn.export import export_weights, flat_names, load_config_dict, load_weights
from effattn.models.based import BasedModelConfig


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    model = BasedModelConfig(num_layers=4, width=16, num_heads=2, feature_dim=4, window=3)
    return Experiment(model=model)


@pytest.fixture(scope="module")
def params(experiment: Experiment) -> dict:
    make = functools.partial(experiment.model.build, vocab_size=21)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(draw.normal(size=a.shape), a.dtype), shapes)


@pytest.fixture
def path(tmp_path, experiment, params):
    export_weights(tmp_path / "model.safetensors", params, to_dict(experiment))
    return tmp_path / "model.safetensors"


def abstract(params: dict) -> dict:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)


def test_weights_and_config_come_back_equal(path, params, experiment):
    loaded = load_weights(path, abstract(params))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert from_dict(load_config_dict(path)) == experiment
    assert not list(path.parent.glob("*.tmp*"))


def test_the_loaded_model_computes_the_same(path, params, experiment):
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: experiment.model.build(vocab_size=21, rngs=nnx.Rngs(0)))
    )
    tokens = jnp.arange(12).reshape(2, 6)
    logits = jax.jit(
        lambda p: (m := nnx.merge(graphdef, p)).logits(m(tokens, whole_rows(tokens)).hidden)
    )
    np.testing.assert_array_equal(logits(load_weights(path, abstract(params))), logits(params))


def test_names_are_paths_joined_by_dots(params):
    names = flat_names(params)
    assert "embedding.table" in names
    assert names["stack.blocks.0.mixer.inner.kernel"].shape == (1, 16, 32)


def test_bfloat16_weights_keep_their_bits(tmp_path, experiment, params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    export_weights(tmp_path / "half.safetensors", half, to_dict(experiment))
    loaded = load_weights(tmp_path / "half.safetensors", abstract(half))
    jax.tree.map(np.testing.assert_array_equal, loaded, half)


def test_a_wrong_leaf_is_named(path, params):
    shapes = abstract(params)
    table = shapes["embedding"]["table"]
    shapes["embedding"]["table"] = jax.ShapeDtypeStruct((8, 16), table.dtype)
    with pytest.raises(
        ValueError, match=r"embedding\.table .* is float32\[24, 16\], expected float32\[8, 16\]"
    ):
        load_weights(path, shapes)
    shapes["embedding"]["table"] = jax.ShapeDtypeStruct(table.shape, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"embedding\.table .* expected bfloat16"):
        load_weights(path, shapes)
    shapes["embedding"] = {"tables": table}
    with pytest.raises(ValueError, match=r"has no embedding\.tables; near names: embedding\.table"):
        load_weights(path, shapes)
    del shapes["embedding"]
    with pytest.raises(ValueError, match=r"has embedding\.table, which the model lacks"):
        load_weights(path, shapes)


def test_a_foreign_file_is_named(tmp_path, params):
    missing = tmp_path / "none.safetensors"
    with pytest.raises(ValueError, match=r"there is no file .*none"):
        load_weights(missing, abstract(params))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a header")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a readable"):
        load_config_dict(broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": np.zeros(2, np.float32)}, str(foreign))
    with pytest.raises(ValueError, match=r"foreign\.safetensors holds no effattn config"):
        load_config_dict(foreign)
