"""Linear attention: chunks against the recurrence, values and gradients, and the op's laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from effattn.pallas_kernels.linear_attention import (
    LinearState,
    explain,
    init_linear_state,
    linear_attention,
    linear_attention_step,
)
from effattn.pallas_kernels.linear_attention.features import (
    num_features,
    taylor_features,
    taylor_features_full,
    unpack_taylor_state,
)

BATCH, KEY_DIM, VALUE_DIM = 2, 4, 3

# Pairs of: decay, feature map, normaliser, chunk and length, head groups, packing, state, prefix.
CASES = {
    "one-token-chunks": dict(decay="none", chunk=1, length=7, state=True),
    "none-tail": dict(decay="none", chunk=16, length=45, heads=(1, 3), normalize=True),
    "none-taylor-packed": dict(
        decay="none", map="taylor", chunk=16, length=40, normalize=True, packed=True, state=True
    ),
    "none-taylor-one-piece": dict(
        decay="none", map="taylor", length=70, heads=(1, 2), normalize=True, packed=True
    ),
    "none-taylor-prefix": dict(
        decay="none", map="taylor", chunk=16, length=30, normalize=True, prefix=9, state=True
    ),
    "head-whole-chunks": dict(decay="head", chunk=80, length=160, heads=(2, 4), state=True),
    "head-tail": dict(decay="head", map="taylor", chunk=16, length=37, normalize=True),
    "head-packed": dict(decay="head", chunk=16, length=37, heads=(1, 3), packed=True, prefix=5),
    "token-tail": dict(decay="token", chunk=64, length=150, heads=(1, 2), state=True),
    "token-packed": dict(
        decay="token", chunk=20, length=45, normalize=True, packed=True, state=True, prefix=6
    ),
    "token-taylor": dict(decay="token", map="taylor", chunk=100, length=37, packed=True),
    "channel-tail": dict(decay="channel", chunk=64, length=150, state=True),
    "channel-packed": dict(
        decay="channel", chunk=20, length=45, heads=(1, 3), normalize=True, packed=True, prefix=4
    ),
    "channel-one-piece": dict(decay="channel", length=33, heads=(2, 4), normalize=True, state=True),
}


def segments_of(length):
    """Two packed rows: documents of unequal length, padding left, right and inside a document."""
    ids = np.zeros((BATCH, length), np.int32)
    ids[0] = np.repeat([3, 0, 3, 2, 5, 0], -(-length // 6))[:length]
    ids[1] = np.repeat([0, 1, 1, 1, 7, 7, 7], -(-length // 7))[:length]
    return ids


def make(seed=0, *, decay="none", map="identity", length=20, heads=(2, 2), normalize=False,
         packed=False, state=False, prefix=0, chunk=None, dtype=np.float64):  # fmt: skip
    """(differentiable arrays, other arguments) of one call."""
    rng = np.random.default_rng(seed)
    g, h = heads
    lead = (BATCH, length)
    a = {
        "query": rng.normal(size=(*lead, g, KEY_DIM)),
        "key": rng.normal(size=(*lead, g, KEY_DIM)),
        "value": rng.normal(size=(*lead, h, VALUE_DIM)),
    }
    if decay != "none":
        shape = {"head": (h,), "token": (*lead, h), "channel": (*lead, h, KEY_DIM)}[decay]
        a["log_decay"] = -0.3 * rng.exponential(size=shape)
    if prefix:
        a["prefix_key"] = rng.normal(size=(BATCH, prefix, g, KEY_DIM))
        a["prefix_value"] = rng.normal(size=(BATCH, prefix, h, VALUE_DIM))
    if normalize and map == "identity":  # a denominator near 0 would drown any comparison
        a = {k: np.abs(x) if "query" in k or "key" in k else x for k, x in a.items()}
    if state:
        features = num_features(map, KEY_DIM)
        kv = rng.normal(size=(BATCH, h, features, VALUE_DIM))
        z = 0.1 * rng.uniform(size=(BATCH, h, features)) if normalize else None
        a["state"] = LinearState(kv, z)
    others = dict(feature_map=map, normalize=normalize)
    if packed:
        others["segment_ids"] = segments_of(length)
        if prefix:
            others["prefix_segment_ids"] = rng.choice([0, 1, 2, 3, 9], size=(BATCH, prefix))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), a), others


def outputs_and_gradients(arrays, others, **how):
    """(out, state, gradients of a random contraction of both), in one compiled program."""

    def contraction(arrays):
        results = linear_attention(**arrays, **others, **how)
        leaves = jax.tree.leaves(results)
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


# --- the definition -----------------------------------------------------------------------------


def dense(query, key, value, *, log_decay=None, feature_map="identity", normalize=False,
          state=None, segment_ids=None, prefix_key=None, prefix_value=None,
          prefix_segment_ids=None):  # fmt: skip
    """out by the quadratic formula, in numpy, one query and one earlier key at a time."""
    b, s, h, e = value.shape
    r = h // query.shape[2]
    query, key = np.repeat(query, r, 2), np.repeat(key, r, 2)
    ids = np.ones((b, s), int) if segment_ids is None else segment_ids
    g = np.zeros((b, s, h, 1)) if log_decay is None else np.asarray(log_decay)
    g = np.broadcast_to(g, (b, s, h))[..., None] if g.ndim == 1 else g
    g = g[..., None] if g.ndim == 3 else g
    g = np.broadcast_to(g, (*g.shape[:3], query.shape[3])) * (ids != 0)[..., None, None]
    out = np.zeros(value.shape)
    for row, head, i in np.ndindex(b, h, s):
        if ids[row, i] == 0:
            continue
        pairs = []
        start = min(j for j in range(s) if ids[row, j] == ids[row, i])
        first_document = next(x for x in ids[row] if x) == ids[row, i]
        for j in range(start, i + 1):
            if ids[row, j] == ids[row, i]:
                pairs.append((key[row, j, head], value[row, j, head], j + 1))
        if prefix_key is not None:
            for j in range(prefix_key.shape[1]):
                if prefix_segment_ids is None or prefix_segment_ids[row, j] == ids[row, i]:
                    k = prefix_key[row, j, head // r]
                    pairs.append((k, prefix_value[row, j, head], start))
        q = query[row, i, head]
        numerator, denominator = np.zeros(e), 1e-12
        for k, v, since in pairs:
            decay = np.exp(g[row, since : i + 1, head].sum(0))
            if feature_map == "taylor":
                score = q @ k / np.sqrt(len(q))
                score = (1 + score + score**2 / 2) * decay[0]
            else:
                score = (q * decay) @ k
            numerator, denominator = numerator + score * v, denominator + score
        if state is not None and first_document:
            phi = q if feature_map == "identity" else np.asarray(taylor_features(jnp.asarray(q)))
            decay = np.exp(g[row, : i + 1, head].sum(0))
            phi = phi * (decay if len(decay) == len(phi) else decay[0])
            numerator = numerator + phi @ state.kv[row, head]
            denominator += phi @ state.normalizer[row, head] if normalize else 0
        out[row, i, head] = numerator / denominator if normalize else numerator
    return out


@pytest.mark.parametrize("name", CASES)
def test_reference_equals_the_dense_formula(name):
    case = {**CASES[name], "length": 18}
    with jax.enable_x64(True):
        arrays, others = make(**case)
        out, _ = jax.jit(
            lambda a: linear_attention(**a, **others, implementation="reference")
        )(arrays)  # fmt: skip
        wanted = dense(**jax.tree.map(np.asarray, arrays), **others)
    assert_close(out, wanted, 1e-12)


@pytest.mark.parametrize("name", thinned(CASES))
def test_chunks_equal_the_recurrence_in_outputs_states_and_gradients(name):
    case = CASES[name]
    with jax.enable_x64(True):
        arrays, others = make(**case)
        wanted = outputs_and_gradients(arrays, others, implementation="reference")
        how = dict(chunk_size=case.get("chunk"), implementation="xla")
        assert_close(outputs_and_gradients(arrays, others, **how), wanted, 1e-10)


def test_float32_is_near_float64_and_bfloat16_near_float32():
    case = dict(decay="token", length=150, packed=True, state=True)
    with jax.enable_x64(True):
        exact = outputs_and_gradients(*make(**case), implementation="reference")
    arrays, others = make(**case, dtype=np.float32)
    single = outputs_and_gradients(arrays, others, chunk_size=64)
    assert_close(single, exact, 2e-5)

    arrays, others = make(length=150, map="taylor", normalize=True, dtype=np.float32)
    single = outputs_and_gradients(arrays, others, chunk_size=64)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    (out, state), gradients = outputs_and_gradients(halves, others, chunk_size=64)
    assert out.dtype == gradients["query"].dtype == jnp.bfloat16
    assert state.kv.dtype == state.normalizer.dtype == jnp.float32
    # Inputs rounded to 8 bits; sums and states are float32.
    assert_close(out, single[0][0], 2e-2)
    assert_close(state, single[0][1], 2e-2)
    assert_close(gradients, single[1], 5e-2)


# --- states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 16, 19])
def test_a_sequence_cut_anywhere_with_its_state_handed_on_equals_the_whole(split):
    with jax.enable_x64(True):
        arrays, others = make(decay="token", map="taylor", normalize=True, length=20, state=True)
        state = arrays.pop("state")

        def cut(arrays, state):
            first, second = ({k: x[:, s] for k, x in arrays.items()} for s in parts)
            left, state = linear_attention(**first, **others, state=state, chunk_size=8)
            right, state = linear_attention(**second, **others, state=state, chunk_size=8)
            return jnp.concatenate([left, right], axis=1), state

        parts = slice(0, split), slice(split, None)
        wanted = linear_attention(**arrays, **others, state=state, chunk_size=8)
        assert_close(jax.jit(cut)(arrays, state), wanted, 1e-12)


@pytest.mark.parametrize(
    "case",
    [
        dict(decay="head", heads=(1, 3)),
        dict(decay="token", map="taylor", normalize=True),
        dict(decay="channel", normalize=True),
    ],
)
def test_steps_equal_the_full_pass_and_skip_rows_that_are_not_valid(case):
    with jax.enable_x64(True):
        arrays, others = make(length=12, **case)
        valid = np.ones((BATCH, 12), bool)
        valid[1, [0, 3, 4, 11]] = False
        h = arrays["value"].shape[2]
        start = init_linear_state(BATCH, h, KEY_DIM, VALUE_DIM, dtype=jnp.float64, **others)

        def by_steps(arrays):
            arrays = dict(arrays)
            fixed = {}
            if arrays.get("log_decay", jnp.zeros((1, 1))).ndim == 1:
                fixed["log_decay"] = arrays.pop("log_decay")

            def step(state, x):
                out, state = linear_attention_step(
                    x["query"], x["key"], x["value"], state, **fixed, **others,
                    log_decay=x["log_decay"], valid=x["valid"],
                ) if "log_decay" in x else linear_attention_step(
                    x["query"], x["key"], x["value"], state, **fixed, **others, valid=x["valid"]
                )  # fmt: skip
                return state, out

            tokens = {k: jnp.moveaxis(x, 1, 0) for k, x in arrays.items()}
            state, out = jax.lax.scan(step, start, {**tokens, "valid": valid.T})
            return jnp.moveaxis(out, 0, 1), state

        full = linear_attention(**arrays, **others, segment_ids=valid.astype(np.int32))
        assert_close(jax.jit(by_steps)(arrays), full, 1e-12)


def test_packed_rows_equal_their_documents():
    with jax.enable_x64(True):
        arrays, others = make(
            decay="token", map="taylor", normalize=True, length=41, packed=True, state=True
        )
        ids = others.pop("segment_ids")
        state = arrays.pop("state")
        out, after = linear_attention(**arrays, **others, state=state, segment_ids=ids)
        for row in range(BATCH):
            first = True
            for document in dict.fromkeys(x for x in ids[row] if x):
                at = np.flatnonzero(ids[row] == document)
                own = {k: x[row : row + 1, at] for k, x in arrays.items()}
                before = jax.tree.map(lambda x, row=row: x[row : row + 1], state)
                alone, end = linear_attention(
                    **own, **others, state=before if first else None, implementation="reference"
                )
                assert_close(out[row, at], alone[0], 1e-12)
                first = False
            assert_close(jax.tree.map(lambda x, row=row: x[row], after),
                         jax.tree.map(lambda x: x[0], end), 1e-12)  # fmt: skip
        assert np.all(np.asarray(out)[ids == 0] == 0)


def test_a_row_of_padding_keeps_its_state():
    arrays, others = make(decay="token", normalize=True, length=6, state=True, dtype=np.float32)
    out, state = linear_attention(**arrays, **others, segment_ids=np.zeros((BATCH, 6), np.int32))
    assert_close(state, arrays["state"], 0)
    assert np.all(np.asarray(out) == 0)


def test_state_reports_its_bytes():
    state = init_linear_state(2, 16, 16, 64, feature_map="taylor", normalize=True)
    assert state.nbytes == 2 * 636_480  # BASED 360M, one layer, packed: 16 (64 + 1) 153 floats


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_future_tokens_do_not_change_a_bit_of_past_outputs(decay):
    arrays, others = make(decay=decay, normalize=True, length=45, dtype=np.float32)
    run = jax.jit(lambda a: linear_attention(**a, **others, chunk_size=20)[0])
    before = np.asarray(run(arrays))
    for t in (1, 17, 20, 44):
        changed = {k: x.at[:, t:].multiply(1.7) for k, x in arrays.items()}
        after = np.asarray(run(changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.any(after[:, t] != before[:, t])


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("rate", [-7.0, -300.0, -np.inf])
def test_strong_decay_gives_exact_values_and_finite_gradients(decay, rate):
    arrays, others = make(decay=decay, length=128, dtype=np.float32)
    if decay == "head":
        g = jnp.full_like(arrays["log_decay"], rate)
    else:  # strong and weak by turns, so that large sums stand beside small differences
        g = arrays["log_decay"].at[:, ::3].set(rate)
    arrays["log_decay"] = g
    (out, state), gradients = outputs_and_gradients(arrays, others, chunk_size=64)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), arrays)
        wanted = linear_attention(**exact, **others, implementation="reference")
    assert_close((out, state), wanted, 2e-6)


def test_limits_of_the_taylor_map():
    with jax.enable_x64(True):
        arrays, others = make(map="taylor", normalize=True, length=20)
        value = arrays["value"]
        running_mean = jnp.cumsum(value, 1) / jnp.arange(1, 21)[:, None, None]
        still = {**arrays, "key": 0 * arrays["key"]}
        assert_close(linear_attention(**still, **others)[0], running_mean, 1e-11)
        errors = []
        for size in (0.1, 0.05):  # softmax attention up to s^3
            small = {**arrays, "query": size * arrays["query"]}
            scores = jnp.einsum("bihd,bjhd->bhij", small["query"], small["key"]) / 2
            scores = jnp.where(np.tri(20, dtype=bool), scores, -jnp.inf)
            wanted = jnp.einsum("bhij,bjhe->bihe", jax.nn.softmax(scores), value)
            errors.append(np.abs(linear_attention(**small, **others)[0] - wanted).max())
        assert errors[1] < errors[0] / 6 and errors[0] < 5e-3  # halving s: 1/8 of the error


def test_feature_layouts_agree():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(2))
    s = (x * y).sum(-1) / np.sqrt(5)
    for phi in (taylor_features, taylor_features_full):
        assert_close((phi(x) * phi(y)).sum(-1), 1 + s + s**2 / 2, 1e-6)
    assert_close(unpack_taylor_state(taylor_features(x), 5, axis=-1), taylor_features_full(x), 1e-6)
    assert taylor_features(x).shape[-1] == num_features("taylor", 5) == 21
    with pytest.raises(ValueError, match="packed: got 21 rows, expected 15 for key_dim=4"):
        unpack_taylor_state(taylor_features(x), 4, axis=-1)


# --- cost ---------------------------------------------------------------------------------------


def compiled_gradient(arrays, others, *, repeat=False, **how):
    def loss(arrays):
        def layer(x, _):
            value = jax.checkpoint(
                lambda x: linear_attention(**{**arrays, "value": x}, **others, **how)[0]
            )(x)
            return value, None

        out = jax.lax.scan(layer, arrays["value"], None, length=2)[0] if repeat else None
        return (linear_attention(**arrays, **others, **how)[0] if out is None else out).sum()

    return jax.jit(jax.grad(loss)).lower(arrays).compile()


def test_a_row_of_one_piece_computes_no_state_that_nobody_reads():
    features = num_features("taylor", KEY_DIM)
    arrays, others = make(map="taylor", normalize=True, length=33, dtype=np.float32)
    for repeat in (False, True):
        text = compiled_gradient(arrays, others, repeat=repeat).as_text()
        assert f",{features}" not in text and f"[{features}" not in text


def test_memory_grows_linearly_with_the_sequence():
    temporary = []
    for length in (512, 1024):
        arrays, others = make(decay="token", length=length, dtype=np.float32)
        compiled = compiled_gradient(arrays, others, chunk_size=64)
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 2.2 * temporary[0]


# --- transformations ----------------------------------------------------------------------------


def test_vmap_and_checkpoint_change_nothing():
    arrays, others = make(decay="token", normalize=True, length=21, state=True, dtype=np.float32)

    def loss(arrays):
        out, state = linear_attention(**arrays, **others, chunk_size=8)
        return (out**2).sum() + (state.kv**2).sum()

    def one_row(arrays):
        return loss(jax.tree.map(lambda x: x[None], arrays))

    wanted = jax.jit(jax.grad(loss))(arrays)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays), wanted, 1e-6)
    assert_close(jax.jit(jax.vmap(jax.grad(one_row)))(arrays), wanted, 1e-6)


@pytest.mark.parametrize("manual", [False, True])
def test_batch_sharded_inputs_give_the_same(manual):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays, others = make(decay="token", normalize=True, length=21, dtype=np.float32)

    def gradient(arrays):
        return jax.grad(lambda a: (linear_attention(**a, **others, chunk_size=8)[0] ** 2).sum())(
            arrays
        )

    wanted = jax.jit(gradient)(arrays)
    sharded = jax.device_put(arrays, NamedSharding(mesh, P("data")))
    if manual:
        gradient = jax.shard_map(gradient, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(gradient)(sharded)
    assert_close(got, wanted, 1e-6)
    assert len(got["query"].sharding.device_set) == 2


# --- dispatch and errors ------------------------------------------------------------------------


def test_explain_names_every_backend_in_order():
    arrays, others = make(dtype=np.float32)
    assert explain(**arrays, **others).splitlines() == [
        "tpu: refuses: it is a TPU kernel and this call is lowered for cpu",
        "xla: taken by auto",
        "reference: could run",
        "tpu_interpret: could run",
    ]


MISTAKES = {
    "key": (dict(key=np.zeros((2, 20, 2, 5))), r"key: expected .* d is 4 from `query`"),
    "value heads": (dict(value=np.zeros((2, 20, 3, 3))), "value: got 3 heads, expected a multiple"),
    "value length": (dict(value=np.zeros((2, 19, 2, 3))), r"value: expected .* s is 20"),
    "decay heads": (dict(log_decay=np.zeros(3)), r"log_decay: expected \[h=2\]"),
    "decay axes": (dict(log_decay=np.zeros((2, 20))), r"log_decay: expected \[b=2, s=20, h=2\]"),
    "growing": (dict(log_decay=np.array([-1, 0.5])), "log_decay: got 0.5, expected at most 0"),
    "decay of taylor": (
        dict(log_decay=np.zeros((2, 20, 2, 4)), feature_map="taylor"),
        "log_decay: got one decay per key channel",
    ),
    "feature map": (dict(feature_map="tailor"), "feature_map: got 'tailor'.*did you mean taylor"),
    "scale": (dict(feature_map="taylor", scale=-1.0), "scale: got -1.0, expected more than 0"),
    "chunk": (dict(chunk_size=0), "chunk_size: got 0"),
    "implementation": (dict(implementation="xlo"), "implementation: got 'xlo'.*xla"),
    "segments": (dict(segment_ids=np.ones((2, 3), int)), r"segment_ids: expected \[b=2, s=20\]"),
    "state": (dict(state=LinearState(np.zeros((2, 2, 5, 3)))), r"state.kv: expected .* f is 4"),
    "missing normalizer": (
        dict(state=LinearState(np.zeros((2, 2, 4, 3))), normalize=True),
        "state.normalizer: got none, expected one with normalize=True",
    ),
    "rounded state": (
        dict(state=LinearState(jnp.zeros((2, 2, 4, 3), jnp.bfloat16))),
        "state.kv: got bfloat16, expected float32",
    ),
    "half a prefix": (dict(prefix_key=np.zeros((2, 3, 2, 4))), "prefix_value: got None"),
    "prefix ids": (
        dict(
            prefix_key=np.zeros((2, 3, 2, 4)),
            prefix_value=np.zeros((2, 3, 2, 3)),
            segment_ids=np.ones((2, 20), int),
        ),
        "prefix_segment_ids: got None",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    wrong, message = MISTAKES[name]
    arrays, others = make(dtype=np.float32)
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**arrays, **others, **wrong})


def test_a_mistake_in_a_step_is_named():
    state = init_linear_state(2, 2, 4, 3)
    q, v = jnp.zeros((2, 2, 4)), jnp.zeros((2, 2, 3))
    with pytest.raises(ValueError, match=r"valid: expected \[b=2\]"):
        linear_attention_step(q, q, v, state, valid=jnp.ones((3,), bool))
    with pytest.raises(ValueError, match="state.normalizer: got none"):
        linear_attention_step(q, q, v, state, normalize=True)
    with pytest.raises(ValueError, match="log_decay: got one decay per key channel"):
        taylor = init_linear_state(2, 2, 4, 3, feature_map="taylor")
        linear_attention_step(q, q, v, taylor, feature_map="taylor", log_decay=q)
