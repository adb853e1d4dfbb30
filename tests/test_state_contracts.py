"""What states, scans and neighbours move between TPUs: bytes by formula, whatever the length.

Compiled for v5e, 8 chips along the row, 4 heads of 64 or 512 channels. Beside a state go a few
numbers of each row that say where documents begin: the slack of the comparisons.
"""

import functools
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.batch import TokenInfo
from effattn.nn.mixers import MIXERS
from effattn.parallel.ring_strategy import Ring
from effattn.static.collectives import bytes_by_kind
from effattn.static.tpu import compile_for, describe_mesh

CHIPS, PART, HEADS, DIM, WIDTH = 8, 512, 4, 64, 512
OTHERS = CHIPS - 1
TOPOLOGY = "v5e:2x4"
HEADED, PER_HEAD, FLAT = (HEADS, DIM), (HEADS,), (WIDTH,)
STATE = HEADS * DIM * DIM * 4
# name: (call, its arrays behind [1, seq_len], kind, bytes received forward)
OPS = {
    "linear": (
        lambda q, k, v: Ring().linear_attention(q, k, v)[0],
        (HEADED,) * 3,
        "all-gather",
        OTHERS * STATE,
    ),
    "delta": (
        lambda q, k, v, beta: Ring().delta_rule(q, k, v, beta)[0],
        (HEADED, HEADED, HEADED, PER_HEAD),
        "all-gather",
        OTHERS * 2 * STATE,  # with the transition, key_dim x key_dim
    ),
    "softmax": (
        lambda scores, values: Ring().softmax_scan(scores, values)[0],
        (PER_HEAD, HEADED),
        "all-gather",
        OTHERS * HEADS * (DIM + 2) * 4,
    ),
    "gated": (
        lambda gate, x: Ring().gated_scan(gate, x)[0],
        (FLAT, FLAT),
        "all-gather",
        OTHERS * 2 * WIDTH * 4,  # the last h and the product of the gates
    ),
    "halo": (lambda x: Ring().halo(x, 3), (FLAT,), "collective-permute", 3 * WIDTH * 2),
}


@functools.cache
def moved(name, part=PART, gradient=False):
    call, shapes, _, _ = OPS[name]
    mesh = describe_mesh(TOPOLOGY, {"sequence": CHIPS})
    split = NamedSharding(mesh, P(None, "sequence"))
    arrays = [
        jax.ShapeDtypeStruct((1, CHIPS * part, *shape), jnp.bfloat16, sharding=split)
        for shape in shapes
    ]

    def loss(*arrays):
        return jnp.sum(jnp.square(call(*arrays).astype(jnp.float32)))

    fn = jax.grad(loss, tuple(range(len(arrays)))) if gradient else call
    return bytes_by_kind(compile_for(TOPOLOGY, fn, *arrays, mesh=mesh).as_text())


def assert_moves(found, wanted):
    """Each kind's bytes, and of anything else no more than the numbers of a few tokens."""
    for kind, size in wanted.items():
        # XLA gathers the smallest arrays by an all-reduce.
        assert 0.96 * size <= found[kind] <= 1.02 * size + 1500, (kind, found, wanted)
    others = {kind: size for kind, size in found.items() if kind not in wanted}
    assert sum(others.values()) <= 4096, (found, wanted)


@pytest.mark.parametrize("name", OPS)
def test_forward_moves_the_summaries_and_no_tokens(name):
    _, _, kind, size = OPS[name]
    assert_moves(moved(name), {kind: size})


@pytest.mark.parametrize(
    "name", ["linear", *(pytest.param(n, marks=pytest.mark.slow) for n in OPS if n != "linear")]
)
def test_four_times_the_tokens_move_the_same(name):
    """As 16K and 64K tokens on 32 chips."""
    assert moved(name, 4 * PART) == moved(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_gradients_move_as_much_back(name):
    """A gather's gradient is a reduce-scatter; where it is small XLA makes an all-reduce of it,
    which is twice as many bytes. A permute's is a permute."""
    _, _, kind, size = OPS[name]
    found = dict(moved(name, gradient=True))
    if kind == "collective-permute":
        return assert_moves(found, {kind: 2 * size})
    if "reduce-scatter" in found:
        return assert_moves(found, {kind: size, "reduce-scatter": size})
    return assert_moves(found, {kind: size, "all-reduce": 2 * size})


# ---- whole layers

LAYERS = {
    "aaren": {},
    "based": {"feature_dim": 8},
    "delta": {"head_dim": 32},
    "gla": {},
    "jrt": {"feature_dim": 8, "enc_length": 64},
    "lightning": {"head_dim": 32},
    "ponet": {},
    "short_conv": {},
    "ssd": {"state_dim": 32},
}
# Layers that meet in attention or move tokens by choice, see test_sequence_contracts.py.
BY_TOKENS = {"attention", "neighborhood", "rat", "routing"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "short_conv" else pytest.mark.slow) for n in LAYERS],
)
def test_a_layer_gathers_no_tokens(name):
    """All that a layer's forward pass receives is smaller than one chip's own activations."""
    part = 4096
    mesh = describe_mesh(TOPOLOGY, {"data": 1, "sequence": CHIPS})
    split = NamedSharding(mesh, P("data", "sequence"))

    def of_tokens(dtype, *shape):
        return jax.ShapeDtypeStruct((1, CHIPS * part, *shape), dtype, sharding=split)

    def build():
        config = pkgutil.resolve_name(MIXERS[name])(**LAYERS[name])
        return config.build(WIDTH, sequence=Ring(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    everywhere = NamedSharding(mesh, P())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        nnx.to_pure_dict(state),
    )
    info = TokenInfo(of_tokens(jnp.int32), of_tokens(jnp.int32), of_tokens(jnp.bool_))

    def forward(params, x, info):
        y, _ = nnx.merge(graphdef, params)(x, info)
        return jax.lax.with_sharding_constraint(y, P("data", "sequence"))

    compiled = compile_for(
        TOPOLOGY, forward, params, of_tokens(jnp.bfloat16, WIDTH), info, mesh=mesh
    )
    found = bytes_by_kind(compiled.as_text())
    assert 0 < sum(found.values()) < part * WIDTH * 2, found


def test_every_mixer_is_asked_or_moves_tokens():
    assert {*LAYERS} | BY_TOKENS == {*MIXERS}
