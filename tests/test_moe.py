"""Mixtures of experts: all experts densely, slots counted one by one, folds of the mesh."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from train_setup import experiment

from effattn.batch import Batch, whole_rows
from effattn.config import load_config
from effattn.models.moe import MoEConfig
from effattn.nn.memory import MemoryConfig
from effattn.nn.moe import ExpertsConfig, MoE
from effattn.nn.param import parameter_axes
from effattn.parallel.mesh import BATCH_AXES, FOLDS, MeshConfig, named, parameter_specs
from effattn.static.collectives import bytes_by_kind
from effattn.static.tpu import compile_for, describe_mesh
from effattn.train.flops import forward_flops
from effattn.train.loop import train
from effattn.train.optimizer import group
from effattn.train.program import make_program
from effattn.train.state import abstract_model

BATCH, LEN, WIDTH, COUNT = 4, 16, 12, 8
# Whole, odd, empty and short rows.
LENGTHS = np.array([LEN, 9, 0, 13])
VALID = np.arange(LEN) < LENGTHS[:, None]
# float32 sums in another order.
TOLERANCE = 2e-6
# Other sums altogether: those of all experts, densely.
DENSE_TOLERANCE = 5e-6
CASES = {
    "mixtral": {"top_k": 2},
    "olmoe": {"top_k": 3, "normalize": False},
    "deepseek": {"top_k": 3, "shared": 2, "score": "sigmoid", "balance": "loss_free"}
    | {"scale": 2.5},
    "one": {"top_k": 1, "normalize": False},
    "all": {"top_k": COUNT},
}


def make(dtype=jnp.float32, **fields):
    config = ExpertsConfig(**{"count": COUNT, "mlp_width": 10} | fields)
    return MoE(WIDTH, config, init_std=0.5, dtype=dtype, rngs=nnx.Rngs(0))


def drawn(**fields):
    """(graphdef, parameters, x)"""
    graphdef, state = nnx.split(make(**fields))
    params = nnx.to_pure_dict(state)
    draw = np.random.default_rng(1)
    if "bias" in params:
        params["bias"] = draw.normal(0, 0.1, COUNT).astype(np.float32)
    return graphdef, params, draw.normal(size=(BATCH, LEN, WIDTH)).astype(np.float32)


def densely(moe, x, taken=None):
    """Every expert of every token, weighed; taken: bool [..., chosen], None: all choices."""
    experts = moe.experts
    logits = x @ moe.router.kernel[...]
    scores = jax.nn.softmax(logits) if moe.score == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if moe.bias is None else scores + moe.bias[...]
    order = jnp.argsort(-ranked, axis=-1)[..., : moe.top_k]
    weight = jnp.take_along_axis(scores, order, -1)
    if moe.normalize:
        weight = weight / weight.sum(-1, keepdims=True)
    weight = weight * moe.scale * VALID[..., None]
    if taken is not None:
        weight = weight * taken
    gates = jnp.sum(jax.nn.one_hot(order, COUNT) * weight[..., None], axis=-2)
    up = jnp.einsum("bsd,edf->bsef", x, experts.up[...])
    gate = jnp.einsum("bsd,edf->bsef", x, experts.gate[...])
    y = jnp.einsum("bsef,efd,bse->bsd", up * gate * jax.nn.sigmoid(gate), experts.down[...], gates)
    if moe.shared is not None:
        shared = moe.shared
        up, gate = x @ shared.up.kernel[...], x @ shared.gate.kernel[...]
        y = y + (up * gate * jax.nn.sigmoid(gate)) @ shared.down.kernel[...]
    return y, order


def results(graphdef, params, x, run):
    """((y, what else run says), gradients of the parameters and x)"""

    def loss(params, x):
        y, more = run(nnx.merge(graphdef, params), x)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return jnp.sum(jnp.where(VALID[..., None], jnp.tanh(y) * weight, 0)), (y, more)

    gradients, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return jax.tree.map(np.asarray, (out, gradients))


def ours(training=True):
    return lambda moe, x: moe(x, jnp.asarray(VALID), training=training)


def assert_near(got, wanted, tolerance=TOLERANCE):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    found = jax.tree.leaves(got)
    for (path, value), x in zip(jax.tree_util.tree_leaves_with_path(wanted), found, strict=True):
        off = np.abs(x - value).max() / max(1.0, np.abs(value).max())
        assert off <= tolerance, (jax.tree_util.keystr(path), off)


@pytest.mark.parametrize("name", CASES)
def test_it_is_all_experts_weighed(name):
    graphdef, params, x = drawn(**CASES[name])
    (y, report), gradients = results(graphdef, params, x, ours())
    (wanted, order), wanted_gradients = results(graphdef, params, x, densely)
    assert_near([y[VALID], *gradients], [wanted[VALID], *wanted_gradients], DENSE_TOLERANCE)
    chosen = np.bincount(order[VALID].ravel(), minlength=COUNT)
    np.testing.assert_array_equal(report.load, chosen)
    assert report.dropped == 0


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_bfloat16_is_as_near_as_rounding_makes_it(routing):
    fields = {**CASES["mixtral"], "routing": routing, "capacity_factor": COUNT / 2, "group_size": 4}
    graphdef, params, x = drawn(**fields)
    half = nnx.graphdef(make(jnp.bfloat16, **fields))
    (wanted, _), wanted_gradients = results(graphdef, params, x, densely)
    (y, _), gradients = results(half, params, x.astype(jnp.bfloat16), ours())
    assert y.dtype == jnp.bfloat16

    def off(got, wanted):
        return np.linalg.norm(np.float32(got) - wanted) / np.linalg.norm(wanted)

    assert off(y[VALID], wanted[VALID]) < 2e-2
    for got, value in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert off(got, value) < 5e-2


def counted(order, capacity, group):
    """bool [batch, seq_len, chosen]: which choices find a slot, one token after the other."""
    taken = np.zeros(order.shape, bool)
    for row in range(BATCH):
        for start in range(0, LEN, group):
            used = np.zeros(COUNT, int)
            for token in range(start, start + group):
                for i, expert in enumerate(order[row, token] if VALID[row, token] else ()):
                    taken[row, token, i] = used[expert] < capacity
                    used[expert] += 1
    return taken


@pytest.mark.parametrize(
    ("factor", "group", "capacity"), [(1.0, 8, 2), (0.5, None, 2), (2.0, 4, 2)]
)
@pytest.mark.parametrize("name", thinned(["mixtral", "deepseek"]))
def test_what_finds_no_slot_is_dropped_and_counted(name, factor, group, capacity):
    fields = CASES[name] | {"routing": "capacity", "capacity_factor": factor, "group_size": group}
    fields["top_k"] = 2
    graphdef, params, x = drawn(**fields)
    (y, report), gradients = results(graphdef, params, x, ours())
    order = np.asarray(densely(nnx.merge(graphdef, params), x)[1])
    taken = counted(order, capacity, LEN if group is None else group)
    dense = functools.partial(densely, taken=jnp.asarray(taken))
    (wanted, _), wanted_gradients = results(graphdef, params, x, dense)
    assert_near([y[VALID], *gradients], [wanted[VALID], *wanted_gradients], DENSE_TOLERANCE)
    assert report.dropped == (~taken & VALID[..., None]).sum() > 0
    # Nothing is dropped but in training.
    (y, report), _ = results(graphdef, params, x, ours(training=False))
    assert report.dropped == 0
    (wanted, _), _ = results(graphdef, params, x, densely)
    assert_near(y[VALID], wanted[VALID], DENSE_TOLERANCE)


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_tokens_as_slots_fit_and_one_more_does_not(more):
    """Seven tokens that choose one expert."""
    graphdef, params, x = drawn(top_k=1, routing="capacity", capacity_factor=1.0, group_size=LEN)
    capacity = LEN // COUNT
    x = np.tile(x[:1, :1], (BATCH, LEN, 1))
    valid = np.arange(LEN) < capacity + more
    moe = nnx.merge(graphdef, params)
    y, report = moe(x, jnp.broadcast_to(valid, (BATCH, LEN)), training=True)
    assert report.dropped == BATCH * more
    assert np.abs(y[:, :capacity]).min() > 0
    assert np.abs(y[:, capacity:]).max() == 0


def test_a_later_token_takes_no_slot_from_an_earlier_one():
    graphdef, params, x = drawn(top_k=2, routing="capacity", capacity_factor=0.5, group_size=LEN)
    moe, other = nnx.merge(graphdef, params), x.copy()
    other[:, 8:] = np.random.default_rng(5).normal(size=other[:, 8:].shape)
    valid = jnp.ones((BATCH, LEN), bool)
    (y, report), (z, _) = (moe(a, valid, training=True) for a in (x, other))
    assert report.dropped > 0
    np.testing.assert_array_equal(y[:, :8], z[:, :8])
    assert not np.array_equal(y[:, 8:], z[:, 8:])


# ---- over devices

AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_of(*shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)


def over(mesh, graphdef, params, x, **fields):
    abstract = nnx.state(nnx.eval_shape(lambda: make(**fields)))
    specs, _ = parameter_specs(params, parameter_axes(abstract), mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, named(mesh, specs))
        if mesh.shape["fsdp"] <= BATCH:
            x = jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES, "sequence")))
        return results(graphdef, params, x, ours())


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 2), pytest.param((2, 1, 4, 1), marks=pytest.mark.slow), (1, 8, 1, 1)]
)
@pytest.mark.parametrize(
    ("fold", "routing"),
    [
        *(("sequence_tensor", routing) for routing in ("dropless", "capacity")),
        *(
            pytest.param(fold, routing, marks=pytest.mark.slow)
            for fold in FOLDS
            if fold != "sequence_tensor"
            for routing in ("dropless", "capacity")
        ),
    ],
)
def test_folds_of_a_mesh_are_one_device(fold, routing, shape):
    """With slots too few; on (1, 8, 1, 1) the four rows leave fsdp to the parameters alone."""
    fields = CASES["deepseek"] | {
        "fold": fold,
        "routing": routing,
        "capacity_factor": 0.7,
        "group_size": 4,
    }
    graphdef, params, x = drawn(**fields)
    out, gradients = results(graphdef, params, x, ours())
    (y, report), more = over(mesh_of(*shape), graphdef, params, x, **fields)
    assert report.dropped == out[1].dropped
    assert (report.dropped > 0) == (routing == "capacity")
    np.testing.assert_array_equal(report.load, out[1].load)
    assert_near([y[VALID], report.balance, report.z], [out[0][VALID], *out[1][:2]])
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (params, x))
        truth = results(nnx.graphdef(make(jnp.float64, **fields)), *wide, ours())[1]
    for got, one, exact in zip(*map(jax.tree.leaves, (more, gradients, truth)), strict=True):
        off = np.abs(got - one).max() / max(1, np.abs(exact).max())
        # Where one device's own rounding is more than the tolerance, devices are as near.
        near = np.linalg.norm(got - exact) <= 2 * np.linalg.norm(one - exact)
        assert off <= TOLERANCE or (near and off <= 2 * TOLERANCE), off


def test_a_group_that_no_device_holds_whole_is_refused():
    fields = {"routing": "capacity"}
    graphdef, params, x = drawn(**fields)
    with pytest.raises(
        ValueError, match=r"model\.experts\.group_size: got 16, expected a divisor of the 4"
    ):
        over(mesh_of(2, 1, 4, 1), graphdef, params, x, **fields)


TOKENS, BIG = 1024, 512


@functools.cache
def moved(routing, fold):
    """Bytes that a chip receives by kind, forward: 8 chips of v5e, all of them along the row."""
    mesh = describe_mesh("v5e:2x4", {"sequence": 8})
    config = ExpertsConfig(
        count=16,
        top_k=2,
        mlp_width=256,
        routing=routing,
        capacity_factor=1.0,
        group_size=TOKENS,
        fold=fold,
    )
    abstract = nnx.eval_shape(lambda: MoE(BIG, config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    params = nnx.to_pure_dict(state)
    specs, _ = parameter_specs(params, parameter_axes(state), mesh)
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=s),
        params,
        named(mesh, specs),
    )
    split = NamedSharding(mesh, P(None, "sequence"))
    x = jax.ShapeDtypeStruct((1, 8 * TOKENS, BIG), jnp.bfloat16, sharding=split)

    def call(params, x):
        moe = nnx.merge(graphdef, params)
        valid = jnp.ones(x.shape[:2], bool)
        return moe(x, valid, training=True)[0]

    return bytes_by_kind(compile_for("v5e:2x4", call, params, x, mesh=mesh).as_text())


@pytest.mark.parametrize(
    ("routing", "wanted"),
    [
        # Each vector to seven others, and the sums back; choices and weights go with them.
        ("dropless", {"all-gather": 7 * TOKENS * BIG * 2, "reduce-scatter": 7 * TOKENS * BIG * 2}),
        # Two slots a token, seven eighths of them elsewhere, there and back.
        ("capacity", {"all-to-all": 2 * 2 * TOKENS * BIG * 2 * 7 / 8}),
    ],
)
def test_bytes_are_those_of_the_tokens_that_meet_their_experts(routing, wanted):
    found = moved(routing, "sequence_tensor")
    for kind, size in wanted.items():
        assert size <= found[kind] <= 1.05 * size, (found, wanted)
    rest = sum(size for kind, size in found.items() if kind not in wanted)
    assert rest <= 0.05 * sum(wanted.values()), (found, wanted)


# ---- as a model

SMALL = {"num_layers": 3, "width": 16, "num_heads": 2, "dense_layers": 1}


def small(**fields):
    return MoEConfig(**SMALL, experts=ExpertsConfig(count=4, top_k=2, mlp_width=12, **fields))


def test_a_run_reports_its_experts_and_the_busiest_is_told(tmp_path):
    run = experiment(model=small(routing="capacity", capacity_factor=0.5, group_size=8), steps=2)
    train(run, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    last = next(line for line in reversed(lines) if "experts_overflow" in line)
    # Half the slots that balance would fill: at least half of the choices find none.
    assert 0.5 <= last["experts_dropped"] < 1
    assert last["experts_overflow"] >= 0.5 * 2 * 2 * 8 * 16 * 0.9
    assert last["experts_load_max"] >= 1
    assert last["experts_balance"] > 0 and last["experts_z"] > 0


@pytest.mark.slow
def test_decoding_on_a_mesh_is_the_full_pass_of_one_device():
    """What training would drop is kept: prefill of 8 tokens, then four steps."""
    config = small(routing="capacity", group_size=4, fold="all")
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: config.build(vocab_size=40, rngs=nnx.Rngs(0)))
    )
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    draw = np.random.default_rng(0)
    params = tree.unflatten([draw.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves])
    tokens = draw.integers(0, 40, (4, 12), dtype=np.int32)
    info = whole_rows(tokens)

    def full(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, info).hidden)

    def decoded(params):
        model = nnx.merge(graphdef, params)
        state = model.init_state(4, 16, jnp.float32)
        prompt = jax.tree.map(lambda field: field[:, :8], info)
        logits, state = model.prefill(tokens[:, :8], prompt, state)
        out = [logits]
        for t in range(8, 12):
            one = jax.tree.map(lambda field, t=t: field[:, t], info)
            logits, state = model.step(tokens[:, t], one, state)
            out.append(logits[:, None])
        return jnp.concatenate(out, axis=1)

    mesh = mesh_of(1, 2, 2, 2)
    specs, _ = parameter_specs(params, parameter_axes(state), mesh)
    with jax.set_mesh(mesh):
        got = jax.device_get(jax.jit(decoded)(jax.device_put(params, named(mesh, specs))))
    assert_near(got, np.asarray(jax.jit(full)(params)))


def test_the_bias_moves_against_the_loads_of_all_microbatches():
    run = experiment(model=small(balance="loss_free", bias_rate=0.01), batch_size=8, accumulation=2)
    mesh = run.mesh.build()
    program = make_program(run, 257, mesh)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 257, (8, 16), dtype=np.int32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones((8, 16), np.float32), whole_rows(tokens))
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(0))
        model = nnx.merge(program.model.graphdef, state.params)
        loads = model(tokens, batch.info, key=jax.random.key(0), extra=state.extra).extra
        np.testing.assert_array_equal(loads.sum(1), [2 * 8 * 16] * 2)
        loads = np.asarray(loads)
        state, _ = program.step(state, batch)
    bias = [b["moe"]["bias"] for b in state.params["stack"]["blocks"].values() if "moe" in b]
    wanted = 0.01 * np.sign(loads.mean(1, keepdims=True) - loads)
    # The rate, 0.01, is rounded to float32.
    np.testing.assert_allclose(np.concatenate(bias), wanted, rtol=1e-6)
    assert (np.asarray(state.extra) == 0).all()


def test_the_balance_loss_is_least_where_loads_are_equal():
    """As many as tokens where every expert has the same load and score (Switch, equation 4)."""
    graphdef, params, x = drawn(top_k=COUNT)
    params["router"]["kernel"] = np.zeros_like(params["router"]["kernel"])
    (_, report), _ = results(graphdef, params, x, ours())
    # Sums of 38 tokens in float32.
    np.testing.assert_allclose(report.balance, VALID.sum(), rtol=1e-6)
    np.testing.assert_allclose(report.z, VALID.sum() * math.log(COUNT) ** 2, rtol=1e-6)


def test_experts_are_matrices_of_their_own_to_an_optimizer():
    for fold in FOLDS:
        assert group(("layers", f"experts_{fold}", "embed", "mlp")) == "matrix"


def test_mixtral_has_its_published_sizes():
    run = load_config("moe_mixtral")
    model = abstract_model(run, 32_000)
    assert round(model.num_parameters / 1e9, 1) == 46.7
    # Of a token's forward pass, two FLOPs a weight; the embedding is looked up.
    weights = forward_flops(run.model, vocab_size=32_000, seq_len=1) / 2
    assert abs(weights + 32_000 * 4096 - 12.9e9) < 0.05e9


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"top_k": 9}, r"model\.experts\.top_k: got 9, expected at most model\.experts\.count=8"),
        ({"count": 0}, r"model\.experts\.count: got 0"),
        ({"score": "tanh"}, r"model\.experts\.score: got 'tanh', expected one of softmax, sigmoid"),
        ({"routing": "top"}, r"model\.experts\.routing: got 'top', expected one of dropless"),
        ({"balance": "yes"}, r"model\.experts\.balance: got 'yes'"),
        ({"fold": "x"}, r"model\.experts\.fold: got 'x', expected one of none, tensor"),
        (
            {"capacity_factor": 0.0},
            r"model\.experts\.capacity_factor: got 0\.0, expected more than 0",
        ),
        ({"group_size": 0}, r"model\.experts\.group_size: got 0"),
        ({"shared": -1}, r"model\.experts\.shared: got -1"),
    ],
)
def test_a_field_that_does_not_fit_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        make(**fields)


def test_what_the_model_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"model\.dense_layers: got 3, expected 0 to 2"):
        MoEConfig(num_layers=3, dense_layers=3).build(vocab_size=8, rngs=nnx.Rngs(0))
    run = experiment(model=small(), mesh=MeshConfig(data=1))
    run.memory = MemoryConfig(mlp_tile=8)
    with pytest.raises(ValueError, match=r"memory\.mlp_tile: got 8 with a mixture of experts"):
        abstract_model(run, 257)
