"""The scans: chunks against the recurrence and the explicit formula, gradients, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effattn.pallas_kernels.prefix_scan import (
    SoftmaxState,
    explain_gated_scan,
    explain_softmax_scan,
    gated_scan,
    gated_scan_step,
    init_softmax_state,
    softmax_scan,
    softmax_scan_step,
)

BATCH = 2
# chunk None is the plain loop of a CPU, a number the chunks side by side of an accelerator.
CASES = {
    "softmax-one-token": dict(op="softmax", length=1, state=True),
    "softmax-loop": dict(op="softmax", length=45, state=True),
    "softmax-chunks": dict(op="softmax", length=48, chunk=16),
    "softmax-tail-packed": dict(op="softmax", length=45, chunk=7, state=True, packed=True),
    "softmax-loop-packed": dict(op="softmax", length=40, packed=True),
    "softmax-one-token-chunks": dict(op="softmax", length=9, chunk=1, state=True),
    "gated-loop": dict(op="gated", length=45, state=True),
    "gated-chunks": dict(op="gated", length=48, chunk=16, channels=(2, 3), shared=(1, 3)),
    "gated-tail-packed": dict(
        op="gated", length=45, chunk=7, channels=(2, 3), shared=(2, 1), state=True, packed=True
    ),
    "gated-loop-packed": dict(op="gated", length=40, packed=True, shared=(1,)),
    "gated-no-channels": dict(op="gated", length=9, chunk=2, channels=(), state=True),
}


def segments_of(length):
    """Two packed rows: documents of unequal length, padding left, right and inside a document."""
    ids = np.zeros((BATCH, length), np.int32)
    ids[0] = np.repeat([3, 0, 3, 2, 5, 0], -(-length // 6))[:length]
    ids[1] = np.repeat([0, 1, 1, 1, 7, 7, 7], -(-length // 7))[:length]
    return ids


def make(*, op="softmax", length=20, heads=2, value_dim=3, channels=(4,), shared=None, state=False,
         packed=False, chunk=None, spread=3.0, dtype=np.float64):  # fmt: skip
    """(differentiable arrays, other arguments) of one call."""
    rng = np.random.default_rng(0)
    lead = (BATCH, length)
    if op == "softmax":
        a = {
            "scores": spread * rng.normal(size=(*lead, heads)),
            "values": rng.normal(size=(*lead, heads, value_dim)),
        }
        if state:
            m = rng.normal(size=(BATCH, heads))
            u = 1 + rng.uniform(size=m.shape)
            a["state"] = SoftmaxState(m, u, rng.normal(size=(*m.shape, value_dim)))
    else:
        a = {
            "gate": rng.uniform(size=(*lead, *(channels if shared is None else shared))),
            "x": rng.normal(size=(*lead, *channels)),
        }
        if state:
            a["state"] = rng.normal(size=(BATCH, *channels))
    others = {"segment_ids": segments_of(length)} if packed else {}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), a), others


OPS = {"softmax": softmax_scan, "gated": gated_scan}


def outputs_and_gradients(op, arrays, others, **how):
    """((out, state), gradients of a random contraction of both), in one compiled program."""

    def contraction(arrays):
        out, state = results = OPS[op](**arrays, **others, **how)
        # The maximum of a state is a reference point without a gradient.
        leaves = [out, *(state[1:] if op == "softmax" else [state])]
        weights = [np.random.default_rng(i).normal(size=x.shape) for i, x in enumerate(leaves)]
        return sum((x * w).sum() for x, w in zip(leaves, weights, strict=True)), results

    (_, results), gradients = jax.jit(jax.value_and_grad(contraction, has_aux=True))(arrays)
    return results, gradients


def assert_close(got, wanted, tolerance):
    """Largest difference relative to max(1, largest number), leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


# ---- the definition


def documents(others, length):
    """For every row, the lists of places that belong together; the first goes on from the state."""
    ids = others.get("segment_ids", np.ones((BATCH, length), int))
    for row in ids:
        found, last = [], None
        for place in np.flatnonzero(row):
            if row[place] != last:
                found.append([])
            last = row[place]
            found[-1].append(place)
        yield found


def prefix_softmax(arrays, others):
    """(out, state) by an explicit softmax over every prefix."""
    s, v = (np.asarray(arrays[name]) for name in ("scores", "values"))
    out = np.zeros(v.shape)
    m, u = np.full(s[:, 0].shape, -np.inf), np.zeros(s[:, 0].shape)
    w = np.zeros(v[:, 0].shape)
    if "state" in arrays:
        m, u, w = (np.array(x) for x in arrays["state"])
    for b, rows in enumerate(documents(others, s.shape[1])):
        for i, document in enumerate(rows):
            m0, u0, w0 = (m[b], u[b], w[b]) if i == 0 else (m[b] * 0 - np.inf, u[b] * 0, w[b] * 0)
            for n in range(1, len(document) + 1):
                seen = document[:n]
                top = np.maximum(s[b, seen].max(axis=0), m0)
                p = np.exp(s[b, seen] - top)
                total = p.sum(axis=0) + u0 * np.exp(m0 - top)
                numerator = (p[..., None] * v[b, seen]).sum(axis=0)
                numerator += w0 * np.exp(m0 - top)[:, None]
                out[b, document[n - 1]] = numerator / total[:, None]
            m[b], u[b], w[b] = top, total, numerator
    return out, SoftmaxState(m, u, w)


def explicit_recurrence(arrays, others):
    """(h, state), one token at a time."""
    x = np.asarray(arrays["x"])
    gate = np.broadcast_to(arrays["gate"], x.shape)
    out = np.zeros(x.shape)
    state = np.array(arrays.get("state", np.zeros(x[:, 0].shape)))
    for b, rows in enumerate(documents(others, x.shape[1])):
        for i, document in enumerate(rows):
            h = state[b] if i == 0 else np.zeros(x.shape[2:])
            for t in document:
                h = gate[b, t] * h + x[b, t]
                out[b, t] = h
            state[b] = h
    return out, state


@pytest.mark.parametrize("name", CASES)
def test_scan_equals_definition_and_recurrence_with_every_gradient(name):
    case = dict(CASES[name])
    op, chunk = case["op"], case.pop("chunk", None)
    definition = prefix_softmax if op == "softmax" else explicit_recurrence
    with jax.enable_x64(True):
        arrays, others = make(**case)
        got, gradients = outputs_and_gradients(op, arrays, others, chunk_size=chunk)
        reference, wanted = outputs_and_gradients(op, arrays, others, implementation="reference")
        assert got[0].dtype == np.float64
        assert_close(got, definition(arrays, others), 1e-12)
        assert_close(got, reference, 1e-12)
        assert_close(gradients, wanted, 1e-11)


@pytest.mark.parametrize("op", OPS)
def test_bfloat16_keeps_its_dtype_and_a_float32_state(op):
    arrays, others = make(op=op, length=45, dtype=np.float32, packed=True)
    half = {k: x if k == "scores" else x.astype(jnp.bfloat16) for k, x in arrays.items()}
    run = jax.jit(lambda a: OPS[op](**a, **others))
    out, state = run(half)
    assert out.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    wanted, _ = run(jax.tree.map(lambda x: x.astype(jnp.float32), half))
    # The inputs are the same: only the result is rounded, to 8 bits.
    assert_close(out, wanted, 2**-8)


# ---- laws


def cut(arrays, start, stop):
    """The tokens [start, stop) of every array but the state."""
    return {k: x[:, start:stop] for k, x in arrays.items() if k != "state"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_row_in_pieces_or_token_by_token_equals_one_pass(op, packed):
    length = 24
    arrays, others = make(op=op, length=length, state=True, packed=packed, dtype=np.float32)
    wanted, last = jax.jit(OPS[op])(**arrays, **others)
    run = jax.jit(lambda a, ids, state: OPS[op](**a, state=state, segment_ids=ids))
    ids = others.get("segment_ids", np.ones((BATCH, length), np.int32))
    for at in (5, 12):
        # A new document does not go on from the state: pieces are cut where none begins.
        same = (ids[:, at - 1] == ids[:, at]) | (ids[:, at] == 0)
        first, state = run(cut(arrays, 0, at), ids[:, :at], arrays["state"])
        second, state = run(cut(arrays, at, length), ids[:, at:], state)
        rows = np.flatnonzero(same)
        got = jnp.concatenate([first, second], axis=1)
        assert_close(got[rows], wanted[rows], 1e-6)
        assert_close(*(jax.tree.map(lambda x, rows=rows: x[rows], s) for s in (state, last)), 1e-6)
    if packed:
        return
    step = softmax_scan_step if op == "softmax" else gated_scan_step
    valid = np.random.default_rng(1).random((length, BATCH)) < 0.7

    def token(state, x):
        token, valid = x
        out, state = step(*token, state, valid=valid)
        return state, out

    tokens = tuple(x.swapaxes(0, 1) for x in cut(arrays, 0, length).values())
    state, out = jax.jit(lambda *a: jax.lax.scan(token, *a))(arrays["state"], (tokens, valid))
    wanted, last = run(cut(arrays, 0, length), valid.T.astype(np.int32), arrays["state"])
    assert_close(out.swapaxes(0, 1), wanted, 1e-6)
    assert_close(state, last, 1e-6)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("op", OPS)
def test_no_output_depends_on_a_later_token(op, chunk):
    arrays, _ = make(op=op, length=30, dtype=np.float32)
    run = jax.jit(lambda a: OPS[op](**a, chunk_size=chunk)[0])
    before = np.asarray(run(arrays))
    for t in (1, 7, 8, 29):
        changed = jax.tree.map(lambda x, t=t: x.at[:, t:].set(x[:, t:] * 0.5 + 0.1), arrays)
        after = np.asarray(run(changed))
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("op", OPS)
def test_padding_changes_no_state_whatever_it_holds(op):
    arrays, _ = make(op=op, length=10, state=True, dtype=np.float32)
    ids = np.zeros((BATCH, 10), np.int32)
    holes = {k: x if k == "state" else x.at[:].set(jnp.nan) for k, x in arrays.items()}
    out, state = jax.jit(OPS[op])(**holes, segment_ids=ids)
    jax.tree.map(np.testing.assert_array_equal, state, arrays["state"])
    assert not np.any(out)

    def loss(arrays):
        out, state = OPS[op](**arrays, segment_ids=ids)
        return out.sum() + jax.tree.leaves(state)[-1].sum()

    gradients = jax.jit(jax.grad(loss))(holes)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_300_are_exact_in_float32(sign, chunk):
    """Rising or falling scores: a sum of exp(s - max s) would lose every early or late token."""
    arrays, _ = make(length=64, dtype=np.float32)
    arrays["scores"] = jnp.broadcast_to(
        sign * jnp.linspace(-300, 300, 64, dtype=jnp.float32)[None, :, None], (BATCH, 64, 2)
    )
    got, gradients = outputs_and_gradients("softmax", arrays, {}, chunk_size=chunk)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), np.float64), arrays)
        wanted = outputs_and_gradients("softmax", wide, {}, implementation="reference")
    assert_close((got, gradients), wanted, 1e-5)


def test_equal_scores_give_the_running_mean_and_no_score_gives_zero():
    arrays, _ = make(length=12, dtype=np.float32)
    values = np.asarray(arrays["values"])
    mean = np.cumsum(values, axis=1) / np.arange(1, 13)[:, None, None]
    out, _ = softmax_scan(jnp.full(values.shape[:3], -1e30), values)
    assert_close(out, mean, 1e-6)
    out, state = softmax_scan(jnp.full(values.shape[:3], -jnp.inf), values)
    assert not np.any(out)
    jax.tree.map(np.testing.assert_array_equal, state, init_softmax_state(BATCH, 2, 3))


def recurrence_error(op, **case):
    """(error of the op, error of the float32 recurrence) against a float64 recurrence, of the
    state after 65,536 tokens and of the largest output."""
    arrays, _ = make(op=op, length=65_536, dtype=np.float32, **case)
    results = []
    for how in ({}, {"chunk_size": 256}, {"implementation": "reference"}):
        results.append(jax.jit(lambda a, how=how: OPS[op](**a, **how))(arrays))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), np.float64), arrays)
        exact = jax.jit(lambda a: OPS[op](**a, implementation="reference"))(wide)

    def error(got):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)
        return max(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y))) for x, y in pairs)

    return [error(r) for r in results]


@pytest.mark.parametrize(
    "case",
    [
        dict(op="softmax", heads=1, spread=0.0),
        dict(op="softmax", heads=1, spread=3.0),
        dict(op="gated", channels=(2,)),
    ],
    ids=lambda case: f"{case['op']}-{case.get('spread', '')}",
)
def test_65536_tokens_in_float32_are_as_exact_as_the_recurrence(case):
    *errors, recurrence = recurrence_error(**case)
    for error in errors:
        assert error <= 2 * recurrence


# ---- transformations


@pytest.mark.parametrize("op", OPS)
def test_vmap_and_checkpoint_change_nothing(op):
    arrays, _ = make(op=op, length=21, state=True, dtype=np.float32)

    def loss(arrays):
        out, state = OPS[op](**arrays, chunk_size=8)
        return (out**2).sum() + (jax.tree.leaves(state)[-1] ** 2).sum()

    def one_row(arrays):
        return loss(jax.tree.map(lambda x: x[None], arrays))

    wanted = jax.jit(jax.grad(loss))(arrays)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), wanted, 1e-6)
    assert_close(jax.jit(jax.vmap(jax.grad(one_row)))(arrays), wanted, 1e-6)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("op", OPS)
def test_shard_map_over_rows_gives_the_same_with_a_shared_state(op, chunk):
    """The 8 simulated devices hold a row each; the state belongs to all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays, _ = make(op=op, length=21, state=True, dtype=np.float32)
    state = jax.tree.map(lambda x: x[:1], arrays.pop("state"))
    arrays = jax.tree.map(lambda x: jnp.tile(x, (4, *[1] * (x.ndim - 1))), arrays)
    arrays = jax.tree.map(lambda x: x * jnp.arange(1, 9).reshape(-1, *[1] * (x.ndim - 1)), arrays)

    def gradient(arrays, state):
        def loss(arrays, state):
            rows = jax.tree.leaves(arrays)[0].shape[0]
            state = jax.tree.map(lambda x: jnp.tile(x, (rows, *[1] * (x.ndim - 1))), state)
            return (OPS[op](**arrays, state=state, chunk_size=chunk)[0] ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(arrays, state)

    wanted = jax.jit(gradient)(arrays, state)
    split = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P())
    )
    assert_close(jax.jit(split)(arrays, state), wanted, 1e-5)


# ---- dispatch and errors


def test_explain_names_every_backend_in_order():
    for op, explain in (("softmax", explain_softmax_scan), ("gated", explain_gated_scan)):
        arrays, others = make(op=op, dtype=np.float32)
        lines = explain(**arrays, **others).splitlines()
        assert lines == ["xla: taken by auto", "reference: could run"]


MISTAKES = {
    "values": ("softmax", dict(values=np.zeros((2, 20, 3, 3))), r"values: expected .* h is 2"),
    "state": (
        "softmax",
        dict(state=SoftmaxState(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2, 5)))),
        r"state.numerator: expected .* e is 3 from `values`",
    ),
    "chunk": ("softmax", dict(chunk_size=0), "chunk_size: got 0, expected at least 1"),
    "segments": ("softmax", dict(segment_ids=np.ones((2, 3), int)), "segment_ids: expected .*s=20"),
    "implementation": ("softmax", dict(implementation="xlo"), "implementation: got 'xlo'.*xla"),
    "no tokens": (
        "softmax",
        dict(scores=np.zeros((2, 0, 2)), values=np.zeros((2, 0, 2, 3))),
        "seq_len: got 0",
    ),
    "gate": ("gated", dict(gate=np.zeros((2, 20, 3))), r"gate: expected the axes of `x`.*20, 3"),
    "gate axes": ("gated", dict(gate=np.zeros((2, 20))), "gate: expected the axes of `x`"),
    "gated state": ("gated", dict(state=np.zeros((2, 3))), r"state: expected \(2, 4\), got"),
    "gated segments": ("gated", dict(segment_ids=np.ones((2, 3), int)), "segment_ids: expected"),
    "x": ("gated", dict(x=np.zeros(3)), r"x: expected \[batch, seq_len"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    op, wrong, message = MISTAKES[name]
    arrays, others = make(op=op, dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        OPS[op](**{**arrays, **others, **wrong})


def test_a_mistake_in_a_step_is_named():
    state = init_softmax_state(2, 2, 3)
    s, v = jnp.zeros((2, 2)), jnp.zeros((2, 2, 3))
    with pytest.raises(ValueError, match=r"valid: expected \[b=2\]"):
        softmax_scan_step(s, v, state, valid=jnp.ones((3,), bool))
    with pytest.raises(ValueError, match="state.maximum: expected"):
        softmax_scan_step(s, v, init_softmax_state(2, 3, 3))
    with pytest.raises(ValueError, match="state: expected"):
        gated_scan_step(s, s, jnp.zeros((2, 3)))
