"""The ops in other people's programs: under jax's transformations, and under a mesh."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.blocks import BlockSizes, select_blocks
from effattn.masks import EMPTY, FULL, Causal, Window
from effattn.pallas_kernels.attention import attention, decode_attention, neighborhood_attention
from effattn.parallel import sequence
from effattn.parallel.sequence import Local
from effattn.static.tpu import CompileError, compile_for, describe_mesh

AXES = {"data": 2, "fsdp": 2, "tensor": 2}
LOCAL = Local(head_axes=("tensor",))
# Nearly all the time of these tests goes to the compiler: spare its optimizations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(tuple(AXES.values()), tuple(AXES), axis_types=(kind,) * len(AXES))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def qkv(batch=4, length=24, heads=4, kv_heads=2, dim=16, kv_length=None):
    shapes = [(length, heads), *[(length if kv_length is None else kv_length, kv_heads)] * 2]
    return [normal(batch, *shape, dim, seed=i) for i, shape in enumerate(shapes)]


def value_and_gradients(op, arrays, options):
    """(results, gradients by the arrays); array options are arguments of the compiled function."""
    traced = {n: x for n, x in options.items() if not isinstance(x, np.ndarray)}
    traced = {n: x for n, x in traced.items() if jax.tree.leaves(x) and n not in NOT_ARRAYS}
    static = {n: x for n, x in options.items() if n not in traced}

    def loss(arrays, traced):
        result = op(*arrays, **traced, **static)
        leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(result)]
        weights = [normal(*x.shape, seed=9) for x in leaves]
        return sum((x * w).sum() for x, w in zip(leaves, weights, strict=True)), result

    gradients, result = quick_jit(jax.grad(loss, has_aux=True))(arrays, traced)
    return jax.tree.leaves(result), gradients


NOT_ARRAYS = ("implementation", "return_lse", "mask", "block_sizes", "window", "tile")


def assert_same(got, wanted):
    # float32 sums of at most 100 terms, in another order
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


POSITIONS = np.tile(np.arange(24, dtype=np.int32), (4, 1))
KINDS = np.where(np.random.default_rng(0).random((4, 2, 3, 3)) < 0.7, FULL, EMPTY).astype(np.int32)
LENGTHS = jnp.array([3, 24, 0, 17])
# name: (op, arrays, options, is the batch split, are the heads split)
CASES = {
    "grouped heads, segments, extra keys": (
        "attention",
        {},
        {
            "mask": Causal() & Window(left=9),
            "q_segment_ids": jnp.repeat(jnp.array([[1, 2, 3, 0]] * 4), 6, axis=1),
            "extra_key": normal(4, 3, 2, 16),
            "extra_value": normal(4, 3, 2, 16),
            "return_lse": True,
        },
        True,
        True,
    ),
    "one kv head, an odd batch": ("attention", {"batch": 3, "kv_heads": 1}, {}, False, True),
    "kv heads that the axis does not divide": ("attention", {"heads": 3, "kv_heads": 3}, {}, 1, 0),
    "the same masks on both halves": (
        "attention",
        {},
        {"mask": (Causal(), Window(left=3)) * 2, "q_positions": POSITIONS[0]},
        True,
        True,
    ),
    "other masks on both halves": (
        "attention",
        {},
        {"mask": (Causal(),) * 2 + (Window(left=3),) * 2, "q_positions": POSITIONS},
        True,
        False,
    ),
    "blocks, unequal rows of positions": (
        "attention",
        {},
        {
            "blocks": select_blocks(KINDS, BlockSizes(8, 8)),
            "q_positions": POSITIONS + np.arange(4, dtype=np.int32)[:, None],
        },
        True,
        True,
    ),
    "neighborhood": (
        "neighborhood_attention",
        {"length": (6, 6)},
        {"window": 3, "return_lse": True},
        True,
        True,
    ),
    "decode": (
        "decode_attention",
        {"length": 1, "kv_length": 24},
        {"lengths": LENGTHS, "q_positions": LENGTHS[:, None], "return_lse": True},
        True,
        True,
    ),
}


@pytest.mark.parametrize("name", thinned(CASES))
def test_on_a_mesh_each_device_computes_its_rows_and_heads(name, monkeypatch):
    # XLA could split its own operations; told that it cannot, it tests how arguments are split.
    monkeypatch.setattr(sequence, "may_be_pallas", lambda implementation: True)
    op, sizes, options, rows_split, heads_split = CASES[name]
    length = sizes.get("length", 24)
    arrays = qkv(**{**sizes, "length": int(np.prod(length))})
    if isinstance(length, tuple):
        arrays = [x.reshape(len(x), *length, *x.shape[2:]) for x in arrays]
    run = getattr(LOCAL, op)
    wanted = value_and_gradients(run, arrays, options)
    seen = []
    whole = getattr(sequence, op)
    monkeypatch.setattr(
        sequence, op, lambda q, *x, **y: (seen.append(q.shape), whole(q, *x, **y))[1]
    )
    with jax.set_mesh(mesh_of()):
        assert_same(value_and_gradients(run, arrays, options), wanted)
    batch, *_, heads, _ = arrays[0].shape
    assert {(s[0], s[-2]) for s in seen} == {
        (batch // 4 if rows_split else batch, heads // 2 if heads_split else heads)
    }


def test_explicit_axes_are_resharded_and_manual_ones_left_alone(monkeypatch):
    monkeypatch.setattr(sequence, "may_be_pallas", lambda implementation: True)
    arrays = qkv()
    wanted = attention(*arrays)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        out = quick_jit(LOCAL.attention)(*jax.device_put(arrays, P("data")))
        assert out.sharding.spec == P(("data", "fsdp"), None, "tensor", None)
        np.testing.assert_allclose(out, wanted, atol=1e-6)
    with jax.set_mesh(mesh_of()):
        for axes in ({"data"}, set(AXES)):
            inside = jax.shard_map(
                LOCAL.attention, in_specs=P("data"), out_specs=P("data"), axis_names=axes
            )
            np.testing.assert_allclose(quick_jit(inside)(*arrays), wanted, atol=1e-6)


def test_interpreted_kernels_on_a_mesh_give_the_values_of_one_device():
    arrays = qkv(length=136)
    options = {"mask": Causal() & Window(left=50), "implementation": "tpu_interpret"}
    options["return_lse"] = True
    wanted = value_and_gradients(attention, arrays, options)
    with jax.set_mesh(mesh_of()):
        assert_same(value_and_gradients(LOCAL.attention, arrays, options), wanted)


def test_kernels_compile_for_a_mesh_of_eight_tpus():
    mesh = describe_mesh("v5e:2x4", {"data": 4, "tensor": 2})

    def shapes(*specs):
        sharding = NamedSharding(mesh, P("data", None, "tensor"))
        return [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=sharding) for x in specs]

    def loss(attend, *arrays):
        return attend(*arrays).astype(jnp.float32).sum()

    arrays = shapes((4, 1024, 4, 128), *[(4, 1024, 2, 128)] * 2)
    with pytest.raises(CompileError, match="cannot be automatically partitioned"):
        compile_for("v5e:2x4", functools.partial(loss, attention), *arrays, mesh=mesh)
    gradient = jax.grad(functools.partial(loss, LOCAL.attention), (0, 1, 2))
    text = compile_for("v5e:2x4", gradient, *arrays, mesh=mesh).as_text()
    assert "tpu_custom_call" in text and "all-gather" not in text
    assert "bf16[1,1024,2,128]" in text  # a row and two heads on each device
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, P("data")))

    def decode(query, key, value, lengths):
        return LOCAL.decode_attention(query, key, value, lengths=lengths)

    arrays = shapes((4, 1, 4, 128), *[(4, 2048, 2, 128)] * 2)
    text = compile_for("v5e:2x4", decode, *arrays, lengths, mesh=mesh).as_text()
    assert "tpu_custom_call" in text and "all-gather" not in text


def interpreted(name, *arrays):
    """The op on [batch, ...] arrays; decode has the TPU kernel only where pallas interprets it."""
    if name == "attention":
        return attention(*arrays, mask=WINDOW, implementation="tpu_interpret")
    if name == "neighborhood_attention":
        arrays = [x.reshape(len(x), 16, 8, *x.shape[2:]) for x in arrays]
        return neighborhood_attention(*arrays, window=3, implementation="tpu_interpret")
    query, *cache = arrays
    lengths = jnp.full(len(query), 100)
    return decode_attention(query[:, :1], *cache, lengths=lengths, implementation="tpu")


WINDOW = Causal() & Window(left=40)


@pytest.mark.parametrize(
    "name", thinned(["attention", "neighborhood_attention", "decode_attention"], 3)
)
def test_kernels_work_under_jit_vmap_grad_and_checkpoint(name):
    from jax.experimental.pallas import tpu as pltpu

    op = functools.partial(interpreted, name)
    arrays = [x.reshape(2, 2, *x.shape[1:]) for x in qkv(length=128)]

    def loss(*arrays):
        return (op(*arrays) ** 2).sum()

    def gradients(of_both):
        return quick_jit(jax.grad(lambda arrays: of_both(*arrays).sum()))(arrays)

    with pltpu.force_tpu_interpret_mode() if name == "decode_attention" else nullcontext():
        wanted = gradients(lambda *x: loss(*(y.reshape(4, *y.shape[2:]) for y in x)))
        # That interpreter has effects, which checkpoint does not take; compiled kernels have none.
        once = loss if name == "decode_attention" else jax.checkpoint(loss)
        assert_same(gradients(jax.vmap(once)), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "decode_attention",
        pytest.param("neighborhood_attention", marks=pytest.mark.slow),
        pytest.param("packed attention", marks=pytest.mark.slow),
    ],
)
def test_kernels_under_vmap_compile_for_a_tpu(name):
    def loss(*arrays):
        if name == "attention":
            return attention(*arrays, mask=WINDOW).astype(jnp.float32).sum()
        if name == "packed attention":  # ids that differ by row: so do the lists of blocks
            ids = (arrays[0][..., 0, 0] > 0).astype(jnp.int32)
            return attention(*arrays, q_segment_ids=ids).astype(jnp.float32).sum()
        if name == "neighborhood_attention":
            arrays = [x.reshape(1, 32, 32, *x.shape[2:]) for x in arrays]
            return neighborhood_attention(*arrays, window=7).astype(jnp.float32).sum()
        query, *cache = arrays
        lengths = jnp.full(len(query), 100)
        return decode_attention(query[:, :1], *cache, lengths=lengths).astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((2, 1, 1024, h, 128), jnp.bfloat16) for h in (4, 2, 2)]
    both = jax.vmap(jax.checkpoint(loss))
    compiled = compile_for("v5e", jax.grad(lambda *x: both(*x).sum(), (0, 1, 2)), *arrays)
    assert "tpu_custom_call" in compiled.as_text()
