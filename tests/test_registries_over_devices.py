"""Every registered mixer and model over a sequence axis: values and gradients of one device.

On 4 devices along the row beside 2 for the batch, with the strategies of the sequence axis. A mixer
or model is tested by being listed in MIXERS or MODELS.
"""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws as laws
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.batch import TokenInfo, whole_rows
from effattn.models import MODELS
from effattn.nn.layers import statistics_dtype
from effattn.nn.mixers import MIXERS
from effattn.nn.param import parameter_axes
from effattn.parallel.gather_keys import GatherKeys
from effattn.parallel.halo import Halo
from effattn.parallel.mesh import BATCH_AXES, named, parameter_specs
from effattn.parallel.ring_strategy import Ring
from effattn.parallel.token_ring import TokenRing
from effattn.parallel.ulysses import Ulysses

BATCH, LEN = 2, 16
# float32 sums in another order.
TOLERANCE = 2e-6
STRATEGIES = {
    "ring": Ring(),
    "both_ways": Ring(both_ways=True),
    "ulysses": Ulysses(),
    "gather": GatherKeys(),
    "token_ring": TokenRing(),
    "halo": Halo(),
}
# Fields that take the place of the small ones: grids of LEN tokens.
FIELDS = {
    "model:nat": {"axes": (1, LEN)},
    "causal_grid": {"axes": (4, 4)},
    "grid": {"axes": (4, 4)},
    # Ulysses lays heads over the axis.
    "model:routing": {"num_heads": 4},
    # Halo wants a window of every layer.
    "attention-halo": {"window": 3},
}
# Documents of each row, then padding: over three devices, within one, a device with padding alone.
DOCUMENTS = ((9, 1, 4), (3, 8))


def packed():
    positions, segments = (np.zeros((BATCH, LEN), np.int32) for _ in range(2))
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for number, length in enumerate(lengths, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = number
            start += length
    return TokenInfo(positions, segments, segments != 0)


AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_of(*, data=2, fsdp=1, tensor=1):
    shape = (data, fsdp, 8 // (data * fsdp * tensor), tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)


@functools.cache
def subject(case):
    """(parameters, x, TokenInfos by layout)"""
    abstract = nnx.eval_shape(lambda: laws.build(case, jnp.float32, **FIELDS.get(case, {})))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(abstract)))
    draw = np.random.default_rng(0)
    params = tree.unflatten([draw.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves])
    x = draw.normal(size=(BATCH, LEN, laws.WIDTH)).astype(np.float32)
    if case.startswith("model:"):
        x = draw.integers(0, laws.VOCAB, (BATCH, LEN), dtype=np.int32)
    packs = getattr(abstract, "packs", True)
    whole_only = case == "model:nat"  # one image each
    rows = whole_rows(x, None if whole_only else np.array([LEN, 11]))
    return params, x, {"rows": rows, **({"packed": packed()} if packs else {})}


def results(
    case, info, sequence=None, *, dtype=jnp.float32, mesh=None, fields=None, training=False
):
    params, x, _ = subject(case)
    if dtype == jnp.float64:
        params, x = jax.tree.map(
            lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, (params, x)
        )
    more = {**FIELDS.get(case, {}), **({} if fields is None else fields)}
    more |= {} if sequence is None else {"sequence": sequence}
    abstract = nnx.eval_shape(lambda: laws.build(case, dtype, **more))
    graphdef = nnx.graphdef(abstract)
    if mesh is not None:
        axes = parameter_axes(nnx.state(abstract))
        specs, _ = parameter_specs(params, axes, mesh)
        params = jax.device_put(params, named(mesh, specs))
        x, info = jax.device_put((x, info), NamedSharding(mesh, P(BATCH_AXES, "sequence")))

    def loss(params, x, info):
        module = nnx.merge(graphdef, params)
        built = laws.ModelAsMixer(module) if case.startswith("model:") else module
        if training:
            hidden = module(x, info, key=jax.random.key(0)).hidden
            return jnp.sum(jnp.tanh(module.logits(hidden))), hidden
        y = built(x, info)[0].astype(statistics_dtype(dtype))
        weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        y = jnp.where(info.valid[..., None], y, 0)
        return jnp.sum(jnp.tanh(y) * weight), y

    by = (0,) if case.startswith("model:") else (0, 1)
    run = jax.jit(jax.grad(loss, by, has_aux=True))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, run(params, x, info))


@functools.cache
def alone(case, layout, halo=False):
    fields = FIELDS["attention-halo"] if halo else None
    return results(case, subject(case)[2][layout], fields=fields)


@functools.cache
def exact(case, layout):
    """In float64, by path."""
    with jax.enable_x64(True):
        found = results(case, subject(case)[2][layout], dtype=jnp.float64)
    return dict(jax.tree_util.tree_leaves_with_path(found))


def assert_equal(got, wanted, truth):
    """truth: a function of a path. Where layers on layers have made more of a rounding than the
    tolerance, devices must be about as near to it as one device is: within 2.5 times its error in
    the worst case, the first stage of nat."""
    wanted = dict(jax.tree_util.tree_leaves_with_path(wanted))
    for path, value in jax.tree_util.tree_leaves_with_path(got):
        # Some gradients are nothing but rounding: that of a key's bias under a softmax.
        scale, name = max(1.0, np.abs(wanted[path]).max()), jax.tree_util.keystr(path)
        off = np.abs(value - wanted[path]).max()
        if off > TOLERANCE * scale:
            errors = [np.linalg.norm(x - truth(path)) for x in (value, wanted[path])]
            assert off <= 10 * TOLERANCE * scale, f"{name}: {off / scale}"
            assert errors[0] <= 3 * errors[1], f"{name}: {off / scale}, {errors}"


# Those whose own ops lie over devices; the others are attention's, and pass by in slow tests.
FAST = ("aaren", "delta", "jrt", "ponet", "rat")


def cases():
    """Every case in every layout by every strategy; the fast ones one strategy each."""
    found = []
    names = list(STRATEGIES)[:-1]
    for i, case in enumerate([*laws.CASES, *(v for v in laws.VARIANTS if v not in laws.CASES)]):
        for j, layout in enumerate(subject_layouts(case)):
            for k, strategy in enumerate(names):
                first = k == (i + j) % len(names)
                fast = case in FAST and layout == "packed" and first
                marks = () if fast else pytest.mark.slow
                found.append(pytest.param(case, layout, strategy, marks=marks))
    return found


def subject_layouts(case):
    unpacked = case in ("model:nat", "model:mrt5", "top_routing")
    return ("rows",) if unpacked else ("packed", "rows")


@pytest.mark.parametrize(("case", "layout", "strategy"), cases())
def test_over_a_sequence_axis_it_is_what_it_is_on_one_device(case, layout, strategy):
    got = results(case, subject(case)[2][layout], STRATEGIES[strategy], mesh=mesh_of())
    assert_equal(got, alone(case, layout), lambda path: exact(case, layout)[path])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        (case, strategy)
        for case in ("attention", "model:based", "model:transformer")
        for strategy in STRATEGIES
        if strategy != "halo" or case == "attention"  # it wants a window in every layer
    ],
)
def test_attention_beside_other_layers_by_every_strategy(case, strategy):
    fields = FIELDS["attention-halo"] if strategy == "halo" else None
    info = subject(case)[2]["packed"]
    got = results(case, info, STRATEGIES[strategy], mesh=mesh_of(), fields=fields)
    wanted = alone(case, "packed", strategy == "halo")
    assert_equal(got, wanted, lambda path: exact(case, "packed")[path])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["model:mor", "model:mor_token", "model:hnet"])
def test_rows_that_training_chooses_have_room_over_the_axis(case):
    info = subject(case)[2]["rows"]
    wanted = results(case, info, training=True)
    got = results(case, info, Ring(both_ways=True), mesh=mesh_of(), training=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        # Three recursions or stages deep, as the laws allow them.
        np.testing.assert_allclose(a, b, rtol=0, atol=laws.TOLERANCE * max(1, np.abs(b).max()))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(MIXERS))
def test_heads_over_the_mesh_as_well(case):
    layout = subject_layouts(case)[0]
    got = results(case, subject(case)[2][layout], Ring(), mesh=mesh_of(tensor=2))
    assert_equal(got, alone(case, layout), lambda path: exact(case, layout)[path])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(f"model:{name}", marks=() if name in ("moe", "based") else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_a_model_over_all_axes_is_what_it_is_on_one_device(case):
    layout = subject_layouts(case)[0]
    mesh = mesh_of(data=1, fsdp=2, tensor=2)
    got = results(case, subject(case)[2][layout], Ring(), mesh=mesh)
    assert_equal(got, alone(case, layout), lambda path: exact(case, layout)[path])


def test_every_mixer_and_model_is_asked():
    asked = {case.values[0] for case in cases()}
    assert {*MIXERS, *(f"model:{name}" for name in MODELS)} <= asked
