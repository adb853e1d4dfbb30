"""States, scans and neighbours over devices: values, final states and gradients of one device.

On 4 devices of 8 tokens each, beside 2 for the batch. The packed rows have documents over three
devices, within one, and parts that are padding alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from effattn.pallas_kernels.delta_rule import delta_rule
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.pallas_kernels.linear_attention.packing import (
    previous_valid,
    reduce_runs,
    runs_of_segments,
)
from effattn.pallas_kernels.prefix_scan import SoftmaxState, gated_scan, softmax_scan
from effattn.parallel.ring_strategy import Ring
from effattn.parallel.sequence import Local
from effattn.parallel.ulysses import Ulysses

BATCH, LEN, HEADS, KEY_DIM, VALUE_DIM = 2, 32, 4, 5, 6
# float32 sums in another order.
TOLERANCE = 2e-6
SEGMENTS = {
    "whole": None,
    "packed": [[1] * 3 + [2] * 19 + [0] * 8 + [2] * 2, [0] * 9 + [5] * 7 + [6] * 16],
    "crossing": [[3] * 7 + [1] * 25, [0] * 2 + [1] * 6 + [2] * 9 + [3] * 4 + [4] * 3 + [0] * 8],
}


def mesh_of(sequence=4, tensor=1):
    shape, names = (2, sequence, tensor), ("data", "sequence", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def drawn(seed=1):
    draw = np.random.default_rng(seed)

    def new(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    return new


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# Each: (arrays to differentiate by, the state that came before, options)


def softmax_case():
    new = drawn()
    arrays = {"scores": 5 * new(BATCH, LEN, HEADS), "values": new(BATCH, LEN, HEADS, VALUE_DIM)}
    state = SoftmaxState(
        new(BATCH, HEADS), jnp.abs(new(BATCH, HEADS)), new(BATCH, HEADS, VALUE_DIM)
    )
    return softmax_scan, arrays, state, {}


def gated_case(shared):
    new = drawn()
    gate = jax.nn.sigmoid(new(BATCH, LEN, HEADS, 1 if shared else VALUE_DIM))
    gate = gate.at[:, ::11].set(0)  # some forget all, in which no quotient of products would work
    arrays = {"gate": gate, "x": new(BATCH, LEN, HEADS, VALUE_DIM)}
    return gated_scan, arrays, new(BATCH, HEADS, VALUE_DIM), {}


def delta_case(gated):
    new = drawn()
    lead = (BATCH, LEN)
    arrays = {
        "query": unit(new(*lead, 2 if gated else HEADS, KEY_DIM)),
        "key": unit(new(*lead, 2 if gated else HEADS, KEY_DIM)),
        "value": new(*lead, HEADS, VALUE_DIM),
        "beta": (1 + gated) * jax.nn.sigmoid(new(*lead, HEADS)),
    }
    if gated:
        arrays["log_decay"] = -0.2 * jnp.abs(new(*lead, HEADS))
    return delta_rule, arrays, new(BATCH, HEADS, KEY_DIM, VALUE_DIM), {"chunk_size": 4}


def linear_case(decay=None, prefix=None):
    new = drawn()
    arrays = {
        "query": new(BATCH, LEN, HEADS, KEY_DIM) / 2,
        "key": new(BATCH, LEN, HEADS, KEY_DIM) / 2,
        "value": new(BATCH, LEN, HEADS, VALUE_DIM),
    }
    shapes = {"head": (HEADS,), "token": (BATCH, LEN, HEADS)}
    shapes["channel"] = (*shapes["token"], KEY_DIM)
    if decay is not None:
        arrays["log_decay"] = -0.2 * jnp.abs(new(*shapes[decay]))
    if decay == "channel":
        return linear_attention, arrays, LinearState(new(BATCH, HEADS, KEY_DIM, VALUE_DIM)), {}
    features = 1 + KEY_DIM + KEY_DIM * (KEY_DIM + 1) // 2
    sums = jnp.abs(new(BATCH, HEADS, features, VALUE_DIM)) / 9
    state = LinearState(sums, 1 + jnp.abs(new(BATCH, HEADS, features)))
    options = {"feature_map": "taylor", "normalize": True, "chunk_size": 4}
    if prefix is not None:
        length = LEN if prefix == "in place" else 6
        arrays["prefix_key"] = new(BATCH, length, HEADS, KEY_DIM) / 2
        arrays["prefix_value"] = new(BATCH, length, HEADS, VALUE_DIM)
        options["prefix"] = prefix
    return linear_attention, arrays, state, options


OPS = {
    "softmax": softmax_case,
    "gated": functools.partial(gated_case, False),
    "gated_shared": functools.partial(gated_case, True),
    "delta": functools.partial(delta_case, False),
    "gated_delta": functools.partial(delta_case, True),
    "linear": linear_case,
    "linear_head": functools.partial(linear_case, "head"),
    "linear_token": functools.partial(linear_case, "token"),
    "linear_channel": functools.partial(linear_case, "channel"),
    "prefix_in_place": functools.partial(linear_case, prefix="in place"),
    "prefix_apart": functools.partial(linear_case, prefix="apart"),
}


def prefix_ids(kind, segments):
    """In place: of each document the tokens at its positions 0 to 8. Apart: three of the first
    document of the row, and three of its last."""
    if kind == "apart":
        ends = [[r[0] or r[10], r[-1] or r[20]] for r in segments.tolist()]
        return jnp.asarray(np.repeat(ends, 3, axis=1), jnp.int32)
    ids = np.asarray(segments)
    number = np.stack([[np.sum(r[:t] == r[t]) for t in range(LEN)] for r in ids])
    return jnp.asarray(np.where(number < 9, ids, 0))


def results(op, arrays, state, others, options):
    """Every output, and the gradients of a sum that all of them enter, by path."""

    @jax.jit
    def run(arrays, state, others):
        def loss(arrays, state):
            out, last = op(**arrays, **others, state=state, **options)
            leaves = [out, *jax.tree.leaves(last)]
            weights = [jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in leaves]
            leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in leaves]
            return sum(jnp.sum(x * w) for x, w in zip(leaves, weights, strict=True)), (out, last)

        (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, state)
        return found, gradients

    leaves = jax.tree_util.tree_flatten_with_path(run(arrays, state, others))[0]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_equal(got, wanted, tolerance=TOLERANCE):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.isfinite(got[name]), finite, err_msg=name)
        scale = max(1.0, np.abs(value[finite]).max(initial=0))
        off = np.abs(np.where(finite, got[name] - np.where(finite, value, 0), 0)).max()
        assert off <= tolerance * scale, f"{name}: {off / scale}"


def compared(name, layout, mesh, *, has_state=True, dtype=jnp.float32):
    op, arrays, state, options = OPS[name]()
    others = {}
    if SEGMENTS[layout] is not None:
        others["segment_ids"] = jnp.asarray(SEGMENTS[layout], jnp.int32)
    kind = options.pop("prefix", None)
    if kind is not None:
        segments = others.setdefault("segment_ids", jnp.ones((BATCH, LEN), jnp.int32))
        others["prefix_segment_ids"] = prefix_ids(kind, segments)
    arrays = jax.tree.map(lambda x: x.astype(dtype), arrays)
    state = state if has_state else None
    wanted = results(op, arrays, state, others, options)
    with jax.set_mesh(mesh):
        got = results(getattr(Ulysses(), op.__name__), arrays, state, others, options)
    return (
        got,
        wanted,
        lambda: results(
            op, jax.tree.map(lambda x: x.astype(jnp.float32), arrays), state, others, options
        ),
    )


def cases():
    """Every op in one layout, but for those that a mixer asks in test_registries_over_devices.py;
    the other layouts, and rows without a state, are slow."""
    found = []
    for i, name in enumerate(OPS):
        for j, layout in enumerate(SEGMENTS):
            slow = (i + j) % 3 != 0 or name in ("prefix_in_place", "prefix_apart", "linear_head")
            marks = pytest.mark.slow if slow else ()
            found.append(pytest.param(name, layout, id=f"{name}-{layout}", marks=marks))
    return found


@pytest.mark.parametrize(("name", "layout"), cases())
def test_an_op_equals_one_device(name, layout):
    got, wanted, _ = compared(name, layout, mesh_of())
    assert_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SEGMENTS)
@pytest.mark.parametrize("name", OPS)
def test_an_op_equals_one_device_from_nothing_with_heads_over_the_mesh(name, layout):
    got, wanted, _ = compared(name, layout, mesh_of(2, 2), has_state=False)
    assert_equal(got, wanted)


@pytest.mark.parametrize(
    "name", ["softmax", *(pytest.param(n, marks=pytest.mark.slow) for n in OPS if n != "softmax")]
)
def test_bfloat16_is_as_near_as_on_one_device(name):
    got, alone, exact = compared(name, "packed", mesh_of(), dtype=jnp.bfloat16)
    for path, value in exact().items():
        finite = np.isfinite(value)
        off, off_alone = (
            np.linalg.norm((np.float32(x[path]) - value)[finite]) for x in (got, alone)
        )
        # Where one device sums a gradient in bfloat16 order by order, devices sum it apart.
        assert off <= 1.5 * off_alone + 1e-6 * np.linalg.norm(value[finite]), (path, off, off_alone)


def test_a_long_row_equals_its_pieces():
    """Rows of 4,096 over 8 devices, against one device in two pieces, in float32."""
    new = drawn(3)
    gate = jax.nn.sigmoid(new(1, 4096, 3) + 4)
    x = new(1, 4096, 3)
    state, outs = None, []
    for part in (slice(0, 1501), slice(1501, None)):
        out, state = jax.jit(gated_scan)(gate[:, part], x[:, part], state=state)
        outs.append(out)
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        out, last = jax.jit(Ulysses().gated_scan)(gate, x)
    assert_equal({"out": out, "last": last}, {"out": np.concatenate(outs, 1), "last": state})


# ---- neighbours


@pytest.mark.parametrize(("width", "behind"), [(3, 0), (2, 2), (11, 0), (0, 0), (40, 0)])
def test_a_halo_is_what_stands_beside_a_part(width, behind):
    x = drawn()(BATCH, LEN, 3)
    first = drawn(2)(BATCH, width, 3) if width else None
    whole = Local().halo(x, width, behind=behind, first=first)
    part = LEN // 4
    pieces = [whole[:, 0, i * part : (i + 1) * part + width + behind] for i in range(4)]

    def loss(halo, x, first):
        parts = halo(x, width, behind=behind, first=first)
        if parts.shape[1] == 1:
            parts = jnp.stack([parts[:, 0, i * part : (i + 1) * part + width + behind]
                               for i in range(4)], axis=1)  # fmt: skip
        return jnp.sum(parts * jnp.cos(jnp.arange(parts.size)).reshape(parts.shape)), parts

    with jax.set_mesh(mesh_of()):
        over = jax.jit(functools.partial(loss, Ulysses().halo))(x, first)[1]
        gradient = jax.jit(jax.grad(lambda x: loss(Ulysses().halo, x, first)[0]))(x)
    np.testing.assert_array_equal(over, np.stack(pieces, axis=1))
    wanted = jax.grad(lambda x: loss(Local().halo, x, first)[0])(x)
    # A token is read by two parts at most: the two gradients come in another order.
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_the_previous_token_that_is_no_padding():
    x, first = drawn()(BATCH, LEN, 3), drawn(2)(BATCH, 3)
    valid = jnp.asarray(SEGMENTS["packed"]) != 0
    numbers = jnp.arange(LEN)[None] * jnp.ones((BATCH, 1), jnp.int32)
    tree, before = (x, numbers), (first, -jnp.ones(BATCH, jnp.int32))

    def loss(op):
        def summed(x, first):
            found = op((x, numbers), valid, (first, before[1]))
            return jnp.sum(jnp.sin(found[0][0])) + jnp.sum(jnp.cos(found[1][0])), found

        return jax.jit(jax.value_and_grad(summed, (0, 1), has_aux=True))(x, first)

    wanted = loss(previous_valid)
    with jax.set_mesh(mesh_of()):
        got = loss(Ulysses().previous)
    np.testing.assert_array_equal(got[0][1][0][1], wanted[0][1][0][1])
    # The same numbers, summed over the parts in another order in the gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)
    assert tree[0].shape == got[1][0].shape


@pytest.mark.parametrize("kind", ["sum", "max"])
@pytest.mark.parametrize("layout", ["packed", "crossing"])
def test_sums_and_maxima_of_runs(kind, layout):
    x = drawn()(BATCH, LEN, 3)
    runs, _ = runs_of_segments(jnp.asarray(SEGMENTS[layout], jnp.int32))

    def loss(op):
        def summed(x):
            y = op(x if kind == "sum" else jax.lax.stop_gradient(x), runs, kind)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

        return jax.jit(jax.value_and_grad(summed, has_aux=True))(x)

    wanted = loss(reduce_runs)
    with jax.set_mesh(mesh_of()):
        got = loss(Ulysses().reduce_runs)
    # Sums over a run's tokens, by part; the gradients are of squares of such sums.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got[0][1], wanted[0][1])
    np.testing.assert_allclose(got[1], wanted[1], atol=1e-5)


# ---- bad input


def test_what_cannot_be_split_is_refused_in_a_sentence():
    new = drawn()
    x, heads = new(BATCH, LEN, 3), new(BATCH, LEN, HEADS, KEY_DIM)
    beta, valid = heads[..., 0], jnp.ones((BATCH, LEN), bool)
    zigzag = Ring(zigzag=True, devices=4)
    in_order = {
        "linear_attention": (heads, heads, heads),
        "delta_rule": (heads, heads, heads, beta),
        "softmax_scan": (beta, heads),
        "gated_scan": (x, x),
        "halo": (x, 2),
        "previous": (x, valid, x[:, 0]),
        "reduce_runs": (x, valid.astype(jnp.int32), "sum"),
    }
    with jax.set_mesh(mesh_of()):
        for name, arguments in in_order.items():
            with pytest.raises(ValueError, match="sequence.zigzag: got True, expected False"):
                getattr(zigzag, name)(*arguments)
            uneven = [a[:, :30] if hasattr(a, "ndim") and a.ndim > 1 else a for a in arguments]
            with pytest.raises(ValueError, match="seq_len: got 30, expected a multiple of mesh"):
                getattr(Ring(), name)(*uneven)
        with pytest.raises(ValueError, match="log_decay: got an array, expected None beside"):
            ids = jnp.ones((BATCH, LEN), jnp.int32)
            Ring().linear_attention(
                *(heads,) * 3, log_decay=-beta**2, prefix_key=heads, prefix_value=heads,
                prefix_segment_ids=ids, segment_ids=ids,
            )  # fmt: skip
