"""The TPU kernels of linear attention: arithmetic interpreted, races, the compiler's opinion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value, pairwise
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.pallas_kernels.linear_attention import (
    LinearState,
    explain,
    init_linear_state,
    linear_attention,
    tpu,
)
from effattn.pallas_kernels.linear_attention.tpu_features import (
    kernel_features,
    kernel_features_backward,
    num_kernel_features,
    packed_from_kernel,
)
from effattn.parallel import sequence
from effattn.parallel.sequence import Local
from effattn.static.tpu import compile_for, describe_mesh

BATCH = 2
FACTORS = {
    "decay": ("none", "head", "token"),
    "map": (("identity", False), ("identity", True), ("taylor", True), ("taylor", False)),
    "dtype": ("float32", "bfloat16"),
    "heads": ((4, 4), (2, 4), (1, 3)),
    "dims": ((16, 64), (24, 40), (32, 32)),
    "length": (128, 300, 67),
    "state": (False, True),
    "segments": (False, True),
    "prefix": (0, 9),
}
CASES = pairwise(FACTORS)
# Against the XLA backend on the same inputs. bfloat16 rounds the scores, the features and, as a
# factor of a product, the state, which XLA keeps in float32.
TOLERANCE = {"float32": 3e-5, "bfloat16": 3e-2}
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def case_id(case):
    return "-".join(str(x).replace(" ", "") for x in case.values())


def arguments_of(case, rng):
    """(arrays that have gradients, other arguments)."""
    (g, h), (d, e), s = case["heads"], case["dims"], case["length"]
    feature_map, normalize = case["map"]
    draw = rng.standard_normal
    query, key = (draw((BATCH, s, g, d)) for _ in "qk")
    if normalize and feature_map == "identity":
        query, key = np.abs(query), np.abs(key)  # a denominator near 0 proves nothing
    arrays = {"query": query, "key": key, "value": draw((BATCH, s, h, e))}
    if case["prefix"]:
        arrays["prefix_key"] = np.abs(draw((BATCH, case["prefix"], g, d)))
        arrays["prefix_value"] = draw((BATCH, case["prefix"], h, e))
    arrays = {name: jnp.asarray(x, case["dtype"]) for name, x in arrays.items()}
    shape = {"head": (h,), "token": (BATCH, s, h)}
    if case["decay"] in shape:
        arrays["log_decay"] = jnp.asarray(-0.2 * rng.random(shape[case["decay"]]), jnp.float32)
    if case["state"]:
        state = init_linear_state(BATCH, h, d, e, feature_map=feature_map, normalize=normalize)
        arrays["state"] = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), state)
    others = {"feature_map": feature_map, "normalize": normalize, "eps": 1e-6}
    if case["segments"]:
        ids = np.ones((BATCH, s), np.int32)
        ids[:, s // 3 :] = 2
        ids[0, -5:] = 0
        ids[1, : s // 3] = 0
        others["segment_ids"] = jnp.asarray(ids)
        if case["prefix"]:
            others["prefix_segment_ids"] = jnp.asarray([[1] * 5 + [2] * 4, [2] * 9])
    return arrays, others


def all_results(arrays, others, implementation, op=linear_attention):
    """out, final state, and the gradients of a sum that every number of both enters alike."""

    def loss(arrays):
        out, state = op(**arrays, **others, implementation=implementation)
        total = jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out)
        for x in jax.tree.leaves(tuple(state)):
            total += jnp.sum(jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x) / 10
        return total, (out, tuple(state))

    (_, values), gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return values, gradients


def assert_same(got, wanted, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(got), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / max(1, np.abs(a).max())
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def cases():
    """528 to 864 Taylor features take the CPU's compiler half a minute: those are slow."""
    large = [case for case in CASES if case["map"][0] == "taylor" and case["dims"][0] > 16]
    small = [case for case in CASES if case not in large]
    return each_value(small) + [pytest.param(case, marks=pytest.mark.slow) for case in large]


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_it_equals_the_xla_backend(case):
    arrays, others = arguments_of(case, np.random.default_rng(0))
    wanted = all_results(arrays, others, "xla")
    got = all_results(arrays, others, "tpu_interpret")
    if case["dtype"] == "bfloat16" and case["decay"] != "none":
        # The gradient of a decay is a difference of sums of out * d_out, each of rounded numbers,
        # and that of a head's only decay the sum of many: its error is one of theirs.
        out = np.asarray(wanted[0][0], np.float64)
        terms = np.abs((np.sin(np.arange(out.size)).reshape(out.shape) * out).sum(-1))
        error = np.abs(got[1].pop("log_decay") - wanted[1].pop("log_decay")).max()
        assert error < 2 * TOLERANCE["bfloat16"] * terms.sum((0, 1)).max()
    assert_same(got, wanted, TOLERANCE[case["dtype"]])


def test_strong_decay_gives_no_nan():
    """7 per token: the exponential of one chunk's decay alone would be inf one way, 0 the other."""
    rng = np.random.default_rng(0)
    arrays = {
        n: jnp.asarray(rng.standard_normal((1, 200, 2, 16)), "float32")
        for n in ("query", "key", "value")
    }
    arrays["log_decay"] = jnp.full((1, 200, 2), -7.0).at[0, 100:120, 0].set(-jnp.inf)
    others = {}
    got, wanted = (all_results(arrays, others, name) for name in ("tpu_interpret", "xla"))
    assert_same(got, wanted, 3e-5)


def test_features_and_their_gradient():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((24, 128)), jnp.float32)
    y = jnp.roll(x, 1, 1)
    phi = kernel_features(x)
    assert phi.shape == (num_kernel_features("taylor", 24), 128)
    s = (x * y).sum(0)
    np.testing.assert_allclose((phi * kernel_features(y)).sum(0), 1 + s + s * s / 2, rtol=1e-4)
    # A cotangent as the kernels make them: a sum of features.
    d = kernel_features(y) + 2 * kernel_features(x)
    wanted = jax.vjp(kernel_features, x)[1](d)[0]
    np.testing.assert_allclose(kernel_features_backward(x, d), wanted, rtol=1e-4, atol=1e-4)
    table = packed_from_kernel(20, 24)
    np.testing.assert_allclose(table @ table.T, np.eye(len(table)), atol=1e-12)


@pytest.mark.parametrize("kind", ["identity", "taylor"])
def test_no_races_and_nothing_uninitialised(kind, monkeypatch):
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    simulated = tpu._backend("simulated", lambda call: None, interpret=params)
    monkeypatch.setattr("effattn.pallas_kernels.dispatch.load", lambda path: simulated)
    case = {"heads": (1, 2), "dims": (16, 16), "length": 200, "map": (kind, kind == "taylor")}
    case |= {"decay": "token", "dtype": "float32", "state": True, "segments": True, "prefix": 0}
    arrays, others = arguments_of(case, np.random.default_rng(0))
    got = all_results(arrays, others, "tpu")
    monkeypatch.undo()
    assert_same(got, all_results(arrays, others, "xla"), 3e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_under_vmap_and_checkpoint():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 2, 130, 2, 16)), "float32") for _ in "qkv")
    decay = jnp.asarray([-0.1, -0.3])

    def loss(q, k, v):
        out, _ = linear_attention(q, k, v, log_decay=decay, implementation="tpu_interpret")
        return (out**2).sum()

    got = quick_jit(jax.grad(lambda x: jax.vmap(jax.checkpoint(loss))(*x).sum()))((q, k, v))
    flat = [x.reshape(4, *x.shape[2:]) for x in (q, k, v)]
    wanted = [x.reshape(q.shape) for x in quick_jit(jax.grad(loss, (0, 1, 2)))(*flat)]
    assert_same(list(got), wanted, 1e-5)


@pytest.mark.parametrize("decay", ["head", "token"])
def test_on_a_mesh_each_device_computes_its_rows_and_heads(decay, monkeypatch):
    # XLA could split its own operations; told that it cannot, it tests how arguments are split.
    monkeypatch.setattr(sequence, "may_be_pallas", lambda implementation: True)
    case = {"heads": (2, 4), "dims": (8, 16), "length": 40, "map": ("identity", True)}
    case |= {"decay": decay, "dtype": "float32", "state": True, "segments": True, "prefix": 9}
    arrays, others = arguments_of(case, np.random.default_rng(0))
    wanted = all_results(arrays, others, "xla")
    local, seen = Local(head_axes=("tensor",)), []

    def watched(query, *rest, **options):
        seen.append((query.shape, options["log_decay"].shape))
        return linear_attention(query, *rest, **options)

    monkeypatch.setattr(sequence, "linear_attention", watched)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got = all_results(arrays, others, "xla", local.linear_attention)
    assert_same(got, wanted, 1e-5)
    assert {shape[0] for shape, _ in seen} == {1} and {shape[2] for shape, _ in seen} == {1}
    assert {shape[-1] for _, shape in seen} == {2}


def per_device_loss(implementation, q, log_decay):
    """What one device adds inside a user's `jax.shard_map`, and the gradients; rates are shared."""

    def loss(q, log_decay):
        options = {"log_decay": log_decay, "implementation": implementation}
        out, state = linear_attention(q, q, q, **options)
        return jnp.sum(out**2) + jnp.sum(state.kv)

    return jax.grad(loss, (0, 1))(q, log_decay)


@pytest.mark.parametrize("checked", [True, False])
def test_rates_that_devices_share_get_the_sum_of_their_gradients(checked):
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 40, 2, 16)), jnp.float32)
    rates = jnp.asarray([-0.1, -0.2])
    d_q, d_rates = per_device_loss("xla", q, rates)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    implementation = "xla" if checked else "tpu_interpret"  # the interpreter knows no such types

    def each(q, rates):
        d_q, d_rates = per_device_loss(implementation, q, rates)
        return d_q, d_rates if checked else jax.lax.psum(d_rates, "data")

    sharded = jax.shard_map(
        each, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()), check_vma=checked
    )
    assert_same(list(jax.jit(sharded)(q, rates)), [d_q, d_rates], 1e-5)


# --- the compiler ---------------------------------------------------------------------------------


def test_kernels_compile_inside_a_shard_map_that_checks_types():
    mesh = describe_mesh("v5e:2x4", {"data": 8})
    shapes = [((8, 256, 2, 64), P("data")), ((2,), P())]
    arrays = [
        jax.ShapeDtypeStruct(s, "float32", sharding=NamedSharding(mesh, p)) for s, p in shapes
    ]
    specs = (P("data"), P())
    sharded = jax.shard_map(
        functools.partial(per_device_loss, "tpu"), mesh=mesh, in_specs=specs, out_specs=specs
    )
    text = compile_for("v5e:2x4", sharded, *arrays, mesh=mesh).as_text()
    assert "tpu_custom_call" in text and "all-reduce" in text


def compile_case(chip, case):
    arrays, others = arguments_of(case, np.random.default_rng(0))

    def loss(arrays):
        out, state = linear_attention(**arrays, **others, implementation="tpu")
        return out.astype("float32").sum() + sum(x.sum() for x in jax.tree.leaves(tuple(state)))

    assert "tpu_custom_call" in compile_for(chip, jax.grad(loss), arrays).as_text()


@pytest.mark.parametrize(("chip", "case"), list(zip(["v5e", "v5p", "v6e"], CASES, strict=False)))
def test_a_case_compiles_for_a_tpu(chip, case):
    compile_case(chip, case)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_case_compiles_for_a_tpu(case, chip):
    compile_case(chip, case)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    "dims", [(128, 128, 1, 16), (64, 64, 4, 32), (256, 256, 4, 4), (128, 64, 8, 64)]
)
def test_sizes_of_published_models_compile_for_a_tpu(dims, chip):
    d, e, g, h = dims
    shapes = [(1, 2048, g, d)] * 2 + [(1, 2048, h, e)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    decay = jax.ShapeDtypeStruct((1, 2048, h), jnp.float32)

    def loss(q, k, v, decay):
        out, _ = linear_attention(q, k, v, log_decay=decay, implementation="tpu")
        return out.astype("float32").sum()

    compile_for(chip, jax.grad(loss, (0, 1, 2, 3)), *arrays, decay)


# --- who is taken ---------------------------------------------------------------------------------


def test_a_refusal_is_a_sentence():
    x = jnp.zeros((1, 8, 1, 16))
    assert "it is a TPU kernel and this call is lowered for cpu" in explain(x, x, x)
    with pytest.raises(ValueError, match="log_decay per key channel has no kernel"):
        linear_attention(x, x, x, log_decay=jnp.zeros(x.shape), implementation="tpu_interpret")
    wide = jnp.zeros((1, 8, 1, 48))
    with pytest.raises(ValueError, match="key_dim must be at most 32 with 'taylor', got 48"):
        linear_attention(wide, wide, x, feature_map="taylor", implementation="tpu_interpret")
    assert isinstance(linear_attention(x, x, x, implementation="tpu_interpret")[1], LinearState)
