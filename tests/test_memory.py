"""What long sequences keep and where: nothing of it changes what a model computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.batch import whole_rows
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, TrainConfig, validate
from effattn.models.hnet import HNetConfig
from effattn.models.lightning import LightningModelConfig
from effattn.models.mor import MoRConfig
from effattn.models.parscale import ParScaleConfig
from effattn.models.tokenformer import TokenFormerConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.block import Block
from effattn.nn.decoder import Stack
from effattn.nn.memory import MemoryConfig, lay_out, share_on_host
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.tiles import from_tiles, join_tokens, split_tokens, token_tiles
from effattn.static.chips import CHIPS
from effattn.static.tpu import compile_step, describe_devices
from effattn.train.program import abstract_batch, make_program

SMALL = {"num_layers": 3, "width": 16, "num_heads": 2}
MODELS = {
    "transformer": TransformerConfig(**SMALL, remat="full"),
    "names": TransformerConfig(**SMALL, remat="names"),
    "lightning": LightningModelConfig(**SMALL, remat="full"),
}
MEMORY = {
    "tiles": {"mlp_tile": 4},
    "tiles of an odd number": {"mlp_tile": 5},
    "residual": {"residual_on_host": True},
    "hidden": {"hidden_on_host": 0.4},
    "all on the host": {"hidden_on_host": 1.0, "residual_on_host": True},
}
LENGTH = 11  # odd: the last tile is not full


@functools.cache
def gradients(model, memory, length=LENGTH, mesh=None):
    config = MODELS[model]
    built = config.build(vocab_size=32, rngs=nnx.Rngs(0))
    lay_out(built, MemoryConfig(**MEMORY.get(memory, {})))
    graphdef, state = nnx.split(built)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, length)), jnp.int32)
    if mesh is not None:
        tokens = jax.device_put(tokens, NamedSharding(mesh, P("data", "sequence")))

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, whole_rows(tokens)).hidden
        return jnp.mean(jnp.sin(3 * model.logits(hidden)))

    return jax.tree.map(
        np.asarray, jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(state), tokens)
    )


def assert_same(got, wanted):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(wanted[1]))
    assert abs(got[0] - wanted[0]) <= 2e-6 * max(1, abs(wanted[0]))
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        # Sums over tokens in another order.
        assert np.abs(a - b).max() <= 2e-6 * scale


@pytest.mark.parametrize(
    ("model", "memory"), each_value([(model, memory) for memory in MEMORY for model in MODELS])
)
def test_what_is_kept_changes_nothing(model, memory):
    assert_same(gradients(model, memory), gradients(model, None))


@pytest.mark.parametrize("memory", ["tiles", "hidden"])
def test_tiles_stay_on_their_devices(memory):
    mesh = jax.make_mesh((2, 1, 4), ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        got = gradients("transformer", memory, 16, mesh)
    assert_same(got, gradients("transformer", None, 16))


@pytest.mark.parametrize("length", [1, 7, 12])
def test_tiles_and_splits_come_back(length):
    x = jnp.arange(2.0 * length * 3).reshape(2, length, 3)
    for tile in (1, 4, 20):
        assert (from_tiles(token_tiles(x, tile), length) == x).all()
    for fraction in (0.0, 0.3, 1.0):
        assert (join_tokens(*split_tokens(x, fraction)) == x).all()


def test_every_block_of_an_inner_stack_is_told():
    inner = TransformerConfig(**SMALL, remat="full")
    for config in (
        HNetConfig(width=64, inner_widths=(64,), num_heads=(2,), remat="full"),
        MoRConfig(**{**SMALL, "num_layers": 5}, num_kv_heads=2, remat="full"),
        ParScaleConfig(base=inner, streams=2, prefix_length=2),
    ):
        model = config.build(vocab_size=32, rngs=nnx.Rngs(0))
        lay_out(model, MemoryConfig(mlp_tile=4, residual_on_host=True))
        nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, (Block, Stack))]
        assert nodes
        assert all(node.memory.mlp_tile == 4 for node in nodes)


@pytest.mark.slow
def test_host_bytes_are_those_of_the_residual_stream():
    """v5e:2x2, static: layers x tokens x width x bytes, exactly; the temporaries shrink by them."""
    layers, width, length = 12, 128, 4096
    sizes = {}
    for on_host in (False, True):
        experiment = Experiment(
            model=TransformerConfig(
                # More than `UNROLLED_LAYERS`: a loop is what the formula is of.
                num_layers=layers,
                width=width,
                num_heads=1,
                mlp_width=256,
                remat="full",
            ),
            data=DataConfig(batch_size=4, seq_len=length),
            train=TrainConfig(compute_dtype="bfloat16", loss_tile=512),
            mesh=MeshConfig(data=1, fsdp=4),
            memory=MemoryConfig(residual_on_host=on_host, residual_dtype="bfloat16"),
        )
        mesh = experiment.mesh.build(describe_devices(CHIPS["v5e"], "v5e:2x2"))
        program = make_program(experiment, 256, mesh)
        batch = abstract_batch(experiment, program.rows)
        compiled = compile_step(CHIPS["v5e"], program.step, (program.abstract, batch), mesh)
        sizes[on_host] = compiled.memory_analysis()
    assert sizes[False].host_temp_size_in_bytes == 0
    assert sizes[True].host_temp_size_in_bytes == layers * length * width * 2
    assert sizes[True].temp_size_in_bytes < sizes[False].temp_size_in_bytes


def test_the_share_on_the_host_is_what_the_copy_and_the_memory_allow():
    rule = functools.partial(share_on_host, layer_bytes=1e9, num_layers=10)
    slow = rule(layer_seconds=0.01, host_bytes_per_second=3e10, host_bytes=1e12)
    assert slow == pytest.approx(0.3)
    assert rule(layer_seconds=1.0, host_bytes_per_second=3e10, host_bytes=1e12) == 1.0
    small = rule(layer_seconds=1.0, host_bytes_per_second=3e10, host_bytes=2e9)
    assert small == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("model", "memory", "says"),
    [
        (TransformerConfig(**SMALL), {"residual_on_host": True}, "beside remat='none', expected"),
        (TransformerConfig(**SMALL), {"mlp_tile": 0}, "memory.mlp_tile: got 0"),
        (
            TransformerConfig(**SMALL),
            {"hidden_on_host": 1.5},
            "hidden_on_host: got 1.5, expected a",
        ),
        (
            TransformerConfig(**SMALL, remat="full"),
            {"hidden_on_host": 0.5, "mlp_tile": 4},
            "expected one of them",
        ),
        (
            TransformerConfig(**SMALL),
            {"residual_dtype": "int8"},
            "memory.residual_dtype: got 'int8'",
        ),
        (TokenFormerConfig(**SMALL, remat="full"), {"hidden_on_host": 0.5}, "hidden_on_host: got"),
    ],
)
def test_what_cannot_be_is_a_sentence(model, memory, says):
    experiment = Experiment(model=model, memory=MemoryConfig(**memory))
    with pytest.raises(ValueError, match=says):
        validate(experiment)
        lay_out(model.build(vocab_size=8, rngs=nnx.Rngs(0)), experiment.memory)
