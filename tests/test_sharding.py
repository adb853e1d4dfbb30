"""The mesh, where parameters lie on it, and training that does not notice it."""

import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from train_setup import experiment, losses, stop_at

from effattn.config import load_config
from effattn.models.based import BasedModelConfig
from effattn.parallel.mesh import MeshConfig, compile_afresh, parameter_specs
from effattn.train.loop import train
from effattn.train.optimizer import make_optimizer
from effattn.train.state import abstract_model, build_state


def test_mesh_axes_are_auto_and_data_takes_what_fsdp_leaves():
    mesh = MeshConfig(fsdp=4).build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert MeshConfig(data=1).build().size == 1


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (MeshConfig(fsdp=3), r"mesh\.fsdp: got 3, expected a divisor of the 8 devices"),
        (MeshConfig(data=4, fsdp=4), "wants 16 devices, 8 are there"),
        (MeshConfig(data=0), r"mesh\.data: got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        config.build()


def test_specs_follow_names_and_count_what_cannot_be_split():
    mesh = MeshConfig(data=2, fsdp=4).build()
    shapes = {
        "up": jax.ShapeDtypeStruct((3, 8, 10), np.float32),
        "odd": jax.ShapeDtypeStruct((6, 8), np.float32),
        "bias": jax.ShapeDtypeStruct((10,), np.float32),
    }
    axes = {"up": ("layers", "embed", "mlp"), "odd": ("embed", None), "bias": ("mlp",)}
    specs, whole = parameter_specs(shapes, axes, mesh)
    assert specs == {
        "up": PartitionSpec(None, "fsdp", None),
        "odd": PartitionSpec(None, None),
        "bias": PartitionSpec(None),
    }
    assert whole == 1


def test_programs_of_several_cpu_devices_are_not_read_from_a_cache():
    compile_afresh(MeshConfig(data=1).build())
    assert jax.config.jax_enable_compilation_cache
    compile_afresh(MeshConfig().build())
    assert not jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_the_state_is_born_in_its_shards(name):
    run = experiment(mesh=MeshConfig(data=2, fsdp=4))
    mesh = run.mesh.build()
    model = abstract_model(run, 257)
    run.optimizer.name = name
    optimizer = make_optimizer(run.optimizer, model.axes, lambda step: 0.01)
    init, abstract, whole = build_state(model, optimizer, mesh)
    assert whole == 0
    with jax.set_mesh(mesh):
        state = init(jax.random.key(0))
    table = state.params["embedding"]["table"]
    assert table.sharding.shard_shape(table.shape) == (table.shape[0], table.shape[1] // 4)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    # Almost everything is split: what stays whole is small.
    held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.params))
    assert held < 0.3 * model.num_parameters


PUBLISHED = {
    "transformer_8b": 128_256,
    "lightning_7b": 64_000,
    "based_1b3": 50_257,
    "mamba2_1b3": 50_277,
    "rat_1b3": 32_000,
    "hnet:1stage_XL": 256,
    "mor_1b7": 49_152,
    "parscale_1b8": 151_936,
    "moe_mixtral": 32_000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_large_parameter_of_a_published_size_is_split_and_its_moments_with_it(name):
    run = load_config(name)
    mesh = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2).build()
    model = abstract_model(run, PUBLISHED[name])
    optimizer = make_optimizer(run.optimizer, model.axes, lambda step: 0.01)
    _, abstract, _ = build_state(model, optimizer, mesh)

    def whole(tree):
        """What of it lies whole on every device."""
        return {
            jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if leaf.size >= 2**20 and math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size
        }

    assert not whole(abstract.params)
    assert not whole(abstract.opt_state)
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(abstract.params)
    )
    assert held < 0.27 * model.num_parameters


def test_a_run_moves_from_eight_devices_to_two_by_four_to_one(tmp_path, monkeypatch):
    model = BasedModelConfig(
        num_layers=1, width=16, num_heads=2, feature_dim=4, pattern=("linear",)
    )

    def go_on(name, until, mesh):
        run = experiment(steps=10, checkpoint_every=1, keep_last=10, mesh=mesh, model=model)
        train(run, tmp_path / name, stop=stop_at(monkeypatch, until))
        return losses(tmp_path / name)

    go_on("a", 2, MeshConfig(data=8))
    assert not jax.config.jax_enable_compilation_cache
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    eight = go_on("a", 3, MeshConfig(data=8))
    go_on("b", 3, MeshConfig(data=2, fsdp=4))
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    two_by_four = go_on("b", 4, MeshConfig(data=2, fsdp=4))
    one = go_on("c", 4, MeshConfig(data=1))
    np.testing.assert_allclose(two_by_four[3], eight[3], rtol=1e-6)
    np.testing.assert_allclose(one[4], two_by_four[4], rtol=1e-6)


def test_a_batch_that_the_mesh_cannot_split_is_refused(tmp_path):
    run = experiment(batch_size=6, mesh=MeshConfig(data=4))
    with pytest.raises(ValueError, match=r"data\.batch_size: got 6, expected a multiple of"):
        train(run, tmp_path)
