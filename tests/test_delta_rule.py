"""The delta rule: chunks against the recurrence, values and gradients, and the op's laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned

from effattn.pallas_kernels.delta_rule import delta_rule, delta_rule_step, explain

BATCH, KEY_DIM, VALUE_DIM = 2, 4, 3

CASES = {
    "one-token-chunks": dict(chunk=1, length=7, state=True),
    "ragged": dict(chunk=16, length=37, heads=(1, 3), state=True),
    "ragged-decay": dict(chunk=16, length=45, heads=(2, 4), decay=True),
    "beyond-64": dict(chunk=64, length=70, decay=True, state=True),
    "longer-than-the-row": dict(chunk=100, length=33, decay=True, state=True),
    "one-piece-without-state": dict(length=33),
    "packed-decay": dict(chunk=8, length=41, heads=(1, 3), packed=True, decay=True, state=True),
    "packed-one-piece": dict(length=41, packed=True, state=True),
}


def segments_of(length):
    """Two packed rows: documents of unequal length, padding left, right and inside a document."""
    ids = np.zeros((BATCH, length), np.int32)
    ids[0] = np.repeat([3, 0, 3, 2, 5, 0], -(-length // 6))[:length]
    ids[1] = np.repeat([0, 1, 1, 1, 7, 7, 7], -(-length // 7))[:length]
    return ids


def make(seed=0, *, length=20, heads=(2, 2), decay=False, packed=False, state=False, chunk=None,
         dtype=np.float64):  # fmt: skip
    """(differentiable arrays, other arguments) of one call; keys are unit vectors."""
    rng = np.random.default_rng(seed)
    g, h = heads
    lead = (BATCH, length)
    key = rng.normal(size=(*lead, g, KEY_DIM))
    arrays = {
        "query": rng.normal(size=(*lead, g, KEY_DIM)),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": rng.normal(size=(*lead, h, VALUE_DIM)),
        "beta": rng.uniform(0, 2, size=(*lead, h)),
    }
    if decay:
        arrays["log_decay"] = -0.3 * rng.exponential(size=(*lead, h))
    if state:
        arrays["state"] = rng.normal(size=(BATCH, h, KEY_DIM, VALUE_DIM))
    others = {"segment_ids": segments_of(length)} if packed else {}
    return {k: jnp.asarray(x, dtype) for k, x in arrays.items()}, others


def outputs_and_gradients(arrays, others, **how):
    """((out, state), gradients of a random contraction of both), in one compiled program."""

    def contraction(arrays):
        results = delta_rule(**arrays, **others, **how)
        weights = [np.random.default_rng(i).normal(size=x.shape) for i, x in enumerate(results)]
        return sum((x * w).sum() for x, w in zip(results, weights, strict=True)), results

    (_, results), gradients = jax.jit(jax.value_and_grad(contraction, has_aux=True))(arrays)
    return results, gradients


def assert_close(got, wanted, tolerance):
    """Largest difference relative to max(1, largest number), leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


# --- the definition -----------------------------------------------------------------------------


def by_hand(query, key, value, beta, *, log_decay=None, state=None, segment_ids=None):
    """(out, state) with numpy, one row, head and token at a time."""
    b, s, h, e = value.shape
    r = h // key.shape[2]
    out = np.zeros(value.shape)
    final = np.zeros((b, h, key.shape[3], e))
    for row, head in np.ndindex(b, h):
        sums = np.zeros((key.shape[3], e)) if state is None else state[row, head]
        document = None
        for t in range(s):
            if segment_ids is not None:
                if segment_ids[row, t] == 0:
                    continue
                if document not in (None, segment_ids[row, t]):
                    sums = np.zeros_like(sums)
                document = segment_ids[row, t]
            k, v = key[row, t, head // r], value[row, t, head]
            if log_decay is not None:
                sums = np.exp(log_decay[row, t, head]) * sums
            # The transition matrix of the paper, I - beta k k^T, and the new pair.
            sums = sums - beta[row, t, head] * np.outer(k, k) @ sums
            sums = sums + beta[row, t, head] * np.outer(k, v)
            out[row, t, head] = query[row, t, head // r] @ sums / np.sqrt(len(k))
        final[row, head] = sums
    return out, final


@pytest.mark.parametrize("name", thinned(CASES))
def test_chunks_equal_the_recurrence_in_outputs_states_and_gradients(name):
    case = CASES[name]
    with jax.enable_x64(True):
        arrays, others = make(**case)
        wanted = outputs_and_gradients(arrays, others, implementation="reference")
        assert_close(wanted[0], by_hand(**jax.tree.map(np.asarray, arrays), **others), 1e-12)
        how = dict(chunk_size=case.get("chunk"), implementation="xla")
        assert_close(outputs_and_gradients(arrays, others, **how), wanted, 1e-10)


def test_float32_is_near_float64_and_bfloat16_near_float32():
    case = dict(decay=True, length=150, packed=True, state=True)
    with jax.enable_x64(True):
        exact = outputs_and_gradients(*make(**case), implementation="reference")
    arrays, others = make(**case, dtype=np.float32)
    single = outputs_and_gradients(arrays, others)
    assert_close(single, exact, 2e-5)

    # Rounded inputs against the same in float32: what is left are roundings of the outputs.
    halves = {k: x if k == "state" else x.astype(jnp.bfloat16) for k, x in arrays.items()}
    (out, state), gradients = outputs_and_gradients(halves, others)
    assert out.dtype == gradients["query"].dtype == gradients["beta"].dtype == jnp.bfloat16
    assert state.dtype == gradients["state"].dtype == jnp.float32
    rounded = {k: x.astype(jnp.float32) for k, x in halves.items()}
    single = outputs_and_gradients(rounded, others)
    assert_close((out, state), single[0], 1e-2)
    assert_close(gradients, single[1], 1e-2)


def test_the_float32_error_is_that_of_the_recurrence():
    """At S = 4096: sums over chunks lose no more digits than sums over tokens."""
    run = jax.jit(lambda a, how: delta_rule(**a, implementation=how), static_argnums=1)
    for rate in (1.0, 1e-2, 1e-6, 0.0):
        with jax.enable_x64(True):
            arrays, _ = make(length=4096, heads=(1, 1))
            # Slow learning too, so that the state remembers thousands of tokens.
            arrays["beta"] = arrays["beta"] * jnp.asarray([1.0, 0.01])[:, None, None] / 2
            arrays["log_decay"] = jnp.full(arrays["beta"].shape, -rate)
            single = {k: x.astype(jnp.float32) for k, x in arrays.items()}
            rounded = {k: x.astype(jnp.float64) for k, x in single.items()}
            _, exact = run(rounded, "reference")
            states = run(single, "reference")[1], run(single, "xla")[1]
            errors = [float(np.abs(np.asarray(x) - exact).max()) for x in states]
        # Where both are exact to the last digits, their ratio means nothing.
        assert errors[1] <= max(2 * errors[0], 1e-6), (rate, errors)


# --- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 13])
def test_a_sequence_cut_anywhere_with_its_state_handed_on_equals_the_whole(split):
    with jax.enable_x64(True):
        arrays, _ = make(decay=True, length=20, heads=(1, 2), state=True)
        state = arrays.pop("state")

        def cut(arrays, state):
            outs = []
            for part in (slice(0, split), slice(split, None)):
                piece = {k: x[:, part] for k, x in arrays.items()}
                out, state = delta_rule(**piece, state=state, chunk_size=8)
                outs.append(out)
            return jnp.concatenate(outs, axis=1), state

        wanted = by_hand(**jax.tree.map(np.asarray, arrays), state=np.asarray(state))
        assert_close(jax.jit(cut)(arrays, state), wanted, 1e-12)


@pytest.mark.parametrize("decay", [False, True])
def test_steps_equal_the_full_pass_and_skip_rows_that_are_not_valid(decay):
    with jax.enable_x64(True):
        arrays, _ = make(length=12, heads=(1, 3), decay=decay, state=True)
        start = arrays.pop("state")
        valid = np.ones((BATCH, 12), bool)
        valid[1, [0, 3, 4, 11]] = False

        def step(state, x):
            token, valid = x
            out, state = delta_rule_step(**token, state=state, valid=valid)
            return state, out

        tokens = {k: jnp.moveaxis(x, 1, 0) for k, x in arrays.items()}
        state, out = jax.jit(lambda s, t: jax.lax.scan(step, s, (t, valid.T)))(start, tokens)
        arrays = jax.tree.map(np.asarray, arrays)
        full = by_hand(**arrays, state=np.asarray(start), segment_ids=valid)
        assert_close((jnp.moveaxis(out, 0, 1), state), full, 1e-12)


def test_packed_rows_equal_their_documents():
    with jax.enable_x64(True):
        arrays, others = make(decay=True, length=41, packed=True, state=True)
        ids, state = others["segment_ids"], np.asarray(arrays.pop("state"))
        out, after = jax.jit(lambda a, s: delta_rule(**a, **others, state=s, chunk_size=16))(
            arrays, state
        )
        arrays, out = jax.tree.map(np.asarray, (arrays, out))
        for row in range(BATCH):
            before = state[row : row + 1]
            for document in dict.fromkeys(x for x in ids[row] if x):
                at = np.flatnonzero(ids[row] == document)
                own = {k: x[row : row + 1, at] for k, x in arrays.items()}
                alone, end = by_hand(**own, state=before)
                assert_close(out[row, at], alone[0], 1e-12)
                before = np.zeros_like(before)
            assert_close(after[row], end[0], 1e-12)
        assert np.all(out[ids == 0] == 0)


def test_padding_is_as_good_as_absent_whatever_stands_there():
    arrays, _ = make(length=9, state=True, dtype=np.float32)
    ids = np.ones((BATCH, 9), np.int32)
    ids[:, [0, 4, 8]] = 0
    rubbish = {k: x if k == "state" else x.at[:, [0, 4, 8]].set(jnp.nan) for k, x in arrays.items()}
    wanted = outputs_and_gradients(arrays, {"segment_ids": ids})
    got = outputs_and_gradients(rubbish, {"segment_ids": ids})
    assert_close(got, wanted, 0)
    for name in arrays.keys() - {"state"}:
        assert not np.any(np.asarray(got[1][name])[:, [0, 4, 8]]), name
    nothing = delta_rule(**arrays, segment_ids=np.zeros((BATCH, 9), np.int32))
    assert_close(nothing, (jnp.zeros_like(arrays["value"]), arrays["state"]), 0)


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [False, True])
def test_future_tokens_do_not_change_a_bit_of_past_outputs(decay):
    arrays, _ = make(decay=decay, length=45, dtype=np.float32)
    run = jax.jit(lambda a: delta_rule(**a, chunk_size=20)[0])
    before = np.asarray(run(arrays))
    for t in (1, 17, 20, 44):
        changed = {k: x.at[:, t:].multiply(0.7) for k, x in arrays.items()}
        after = np.asarray(run(changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.any(after[:, t] != before[:, t])


@pytest.mark.parametrize("rate", [-7.0, -np.inf])
def test_strong_decay_gives_exact_values_and_finite_gradients(rate):
    arrays, _ = make(decay=True, length=128, dtype=np.float32)
    # Strong and weak by turns, so that large sums stand beside small differences.
    arrays["log_decay"] = arrays["log_decay"].at[:, ::3].set(rate)
    results, gradients = outputs_and_gradients(arrays, {})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(np.asarray(x), jnp.float64) for k, x in arrays.items()}
        assert_close(results, by_hand(**jax.tree.map(np.asarray, exact)), 2e-6)


def test_a_key_that_comes_back_is_overwritten_with_beta_1_and_added_where_keys_are_orthogonal():
    with jax.enable_x64(True):
        value = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 1, VALUE_DIM)))
        key = jnp.tile(jnp.eye(KEY_DIM), (2, 1))[None, :, None]
        out, state = delta_rule(key, key, value, jnp.ones((1, 8, 1)), scale=1.0, chunk_size=3)
        assert_close(out, value, 1e-15)  # a query that equals the key reads what was just written
        assert_close(state[0, 0], value[0, 4:, 0], 1e-15)  # the first four are forgotten


def test_memory_grows_linearly_with_the_sequence():
    temporary = []
    for length in (512, 1024):
        arrays, _ = make(decay=True, length=length, dtype=np.float32)
        loss = jax.grad(lambda a: delta_rule(**a)[0].sum())
        temporary.append(jax.jit(loss).lower(arrays).compile().memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 2.2 * temporary[0]


def test_vmap_checkpoint_and_shard_map_change_nothing():
    arrays, _ = make(length=11, state=True, dtype=np.float32)

    def loss(arrays):
        out, state = delta_rule(**arrays, chunk_size=4)
        return (out**2).sum() + (state**2).sum()

    def one_row(arrays):
        return loss(jax.tree.map(lambda x: x[None], arrays))

    gradient = jax.grad(loss)
    wanted = jax.jit(gradient)(arrays)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), wanted, 1e-6)
    assert_close(jax.jit(jax.vmap(jax.grad(one_row)))(arrays), wanted, 1e-6)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    del arrays["state"]
    wanted = jax.jit(gradient)(arrays)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows)
    assert_close(jax.jit(mapped)(arrays), wanted, 1e-6)


# --- dispatch and errors ------------------------------------------------------------------------


def test_explain_names_every_backend_in_order():
    arrays, others = make(dtype=np.float32)
    assert explain(**arrays, **others).splitlines() == [
        "xla: taken by auto",
        "reference: could run",
    ]


def zeros(*shape, dtype=np.float32):
    return jnp.zeros(shape, dtype)


MISTAKES = {
    "key": (dict(key=zeros(2, 20, 2, 5)), r"key: expected .* d is 4 from `query`"),
    "value heads": (
        dict(value=zeros(2, 20, 3, 3), beta=zeros(2, 20, 3)),
        "value: got 3 heads, expected a multiple of the 2",
    ),
    "beta": (dict(beta=zeros(2, 20)), r"beta: expected \[b=2, s=20, h=2\]"),
    "decay": (dict(log_decay=zeros(2, 20, 3)), r"log_decay: expected \[b=2, s=20, h=2\]"),
    "growth": (dict(log_decay=zeros(2, 20, 2) + 0.5), "log_decay: got 0.5, expected at most 0"),
    "nan": (dict(log_decay=zeros(2, 20, 2) + np.nan), "log_decay: got nan, expected at most 0"),
    "chunk": (dict(chunk_size=0), "chunk_size: got 0, expected at least 1"),
    "implementation": (dict(implementation="xlo"), "implementation: got 'xlo'.*xla"),
    "segments": (dict(segment_ids=np.ones((2, 3), int)), r"segment_ids: expected \[b=2, s=20\]"),
    "state": (dict(state=zeros(2, 2, 5, 3)), r"state: expected .* d is 4 from `query`"),
    "state dtype": (
        dict(state=zeros(2, 2, 4, 3, dtype=jnp.bfloat16)),
        "state: got bfloat16, expected float32",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    wrong, message = MISTAKES[name]
    arrays, others = make(dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        delta_rule(**{**arrays, **others, **wrong})


def test_numbers_that_a_trace_closes_over_are_checked_too():
    arrays, _ = make(dtype=np.float32)
    decay, grown = zeros(2, 20, 2), zeros(2, 20, 2) + 1
    jax.eval_shape(lambda a: delta_rule(**a, log_decay=decay), arrays)
    with pytest.raises(ValueError, match="log_decay: got 1"):
        jax.eval_shape(lambda a: delta_rule(**a, log_decay=grown), arrays)


def test_a_mistake_in_a_step_is_named():
    q, v, b = zeros(2, 2, 4), zeros(2, 2, 3), zeros(2, 2)
    with pytest.raises(ValueError, match=r"state: expected .* e is 3 from `value`"):
        delta_rule_step(q, q, v, b, zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match=r"valid: expected \[b=2\]"):
        delta_rule_step(q, q, v, b, zeros(2, 2, 4, 3), valid=jnp.ones((3,), bool))
    with pytest.raises(ValueError, match=r"log_decay: got 1\.0"):
        delta_rule_step(q, q, v, b, zeros(2, 2, 4, 3), log_decay=b + 1)
