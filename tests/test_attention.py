"""Attention: every backend against the definition, values and gradients, and the op's laws."""

import dataclasses
import functools
import itertools
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value, pairwise
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from effattn.blocks import BlockSizes, block_table, select_blocks
from effattn.masks import EMPTY, FULL, Causal, Full, Neighborhood, Sink, Window
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.attention import attention, explain, merge

SMALL = BlockSizes(16, 8)
HEAD_DIM, BATCH = 16, 2

# Nearly all the time of these tests goes to the compiler: spare its optimizations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FACTORS = {
    "mask": (
        Causal(),
        Full(),
        Causal() & (Window(left=9) | Sink(3)),
        Neighborhood((60,), (7,), stride=(3,), dilation=(2,)),
        (Causal(), Window(left=6, right=2), Causal(), Causal()),
    ),
    "heads": ((4, 4), (4, 2), (4, 1)),
    "dtype": ("float32", "bfloat16", "float64"),
    "lengths": ((48, 48), (37, 37), (29, 50)),
    "value_dim": (16, 24),
    "soft_cap": (None, 3.0),
    "segments": (None, "packed", "one padded row"),
    "extra": (0, 3),
    "positions": ("default", "numpy", "traced"),
    "blocks": (None, "per kv head", "per head"),
    "sizes": (SMALL, None),
}


def case_id(case):
    short = {**case, "mask": "per head" if isinstance(case["mask"], tuple) else str(case["mask"])}
    return "-".join(str(value) for value in short.values())


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def arrays_of(case, rng):
    (t, s), (h, k), e, x = case["lengths"], case["heads"], case["value_dim"], case["extra"]
    shapes = {
        "query": (BATCH, t, h, HEAD_DIM),
        "key": (BATCH, s, k, HEAD_DIM),
        "value": (BATCH, s, k, e),
        "extra_key": (BATCH, x, k, HEAD_DIM),
        "extra_value": (BATCH, x, k, e),
    }
    arrays = {name: normal(rng, *shape, dtype=case["dtype"]) for name, shape in shapes.items()}
    return arrays if x else {name: arrays[name] for name in ("query", "key", "value")}


def arguments_of(case, rng):
    (t, s), (h, k) = case["lengths"], case["heads"]
    arguments = {"mask": case["mask"], "logit_soft_cap": case["soft_cap"]}
    if case["positions"] != "default":
        as_array = jnp.asarray if case["positions"] == "traced" else np.asarray
        # Unsorted, repeated, and with queries before every key: some rows see nothing.
        arguments["q_positions"] = as_array(rng.integers(0, 60, (BATCH, t)), jnp.int32)
        arguments["kv_positions"] = as_array(rng.integers(5, 60, (1, s)), jnp.int32)
    if case["segments"] is not None:
        ids = [np.sort(rng.integers(0, 4, (BATCH, n)), 1) for n in (t, s)]
        if case["segments"] == "one padded row":
            ids = [np.stack([np.ones_like(x[0]), np.zeros_like(x[1])]) for x in ids]
        arguments["q_segment_ids"], arguments["kv_segment_ids"] = ids
    if case["blocks"] is not None:
        rows, heads = (BATCH, k) if case["blocks"] == "per kv head" else (1, h)
        nq, nk = SMALL.count(t, s)
        chosen = np.where(rng.random((rows, heads, nq, nk)) < 0.6, FULL, EMPTY).astype(np.int32)
        arguments["blocks"] = select_blocks(chosen, SMALL)
    return arguments


def objective(out, lse, rng):
    """A number that reads every entry of out and every finite entry of lse."""
    weight_out = jnp.asarray(rng.standard_normal(out.shape), out.dtype)
    weight_lse = jnp.asarray(rng.standard_normal(lse.shape), lse.dtype)
    seen = lse > -jnp.inf
    return (out * weight_out).astype(lse.dtype).sum() + jnp.where(seen, lse * weight_lse, 0).sum()


def value_and_gradients(arrays, arguments, **options):
    traced = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
    static = {n: a for n, a in arguments.items() if n not in traced}

    @quick_jit
    def run(arrays, traced):
        def loss(arrays):
            out, lse = attention(**arrays, **traced, **static, **options, return_lse=True)
            return objective(out, lse, np.random.default_rng(7)), (out, lse)

        gradients, result = jax.grad(loss, has_aux=True)(arrays)
        return *result, gradients

    return run(arrays, traced)


def definition(case, arrays, arguments):
    """The op in numpy float64, one head and one row at a time, extra keys as keys."""
    t, s = case["lengths"]
    q, k, v = (np.asarray(arrays[n], np.float64) for n in ("query", "key", "value"))
    q_pos = np.broadcast_to(arguments.get("q_positions", np.arange(t)), (BATCH, t))
    kv_pos = np.broadcast_to(arguments.get("kv_positions", np.arange(s)), (BATCH, s))
    q_ids = arguments.get("q_segment_ids", np.ones((BATCH, t), int))
    kv_ids = arguments.get("kv_segment_ids", np.ones((BATCH, s), int))
    h, group = q.shape[2], q.shape[2] // k.shape[2]
    out = np.zeros((BATCH, t, h, v.shape[-1]))
    lse = np.full((BATCH, t, h), -np.inf)
    masks = case["mask"] if isinstance(case["mask"], tuple) else (case["mask"],) * h
    for b, n in itertools.product(range(BATCH), range(h)):
        allowed = np.array(masks[n].allowed(q_pos[b][:, None], kv_pos[b][None]))
        allowed &= (q_ids[b][:, None] == kv_ids[b][None]) & (q_ids[b] != 0)[:, None]
        if "blocks" in arguments:
            blocks = arguments["blocks"]
            row = b if len(blocks.counts) > 1 else 0
            head = n * blocks.counts.shape[1] // h
            visited = np.zeros(allowed.shape, bool)
            for i in range(blocks.counts.shape[2]):
                for j in blocks.kv_blocks[row, head, i, : blocks.counts[row, head, i]]:
                    visited[i * 16 : i * 16 + 16, j * 8 : j * 8 + 8] = True
            allowed &= visited
        keys, values = k[b, :, n // group], v[b, :, n // group]
        if case["extra"]:
            extra = [np.asarray(arrays[x], np.float64) for x in ("extra_key", "extra_value")]
            keys = np.concatenate([keys, extra[0][b, :, n // group]])
            values = np.concatenate([values, extra[1][b, :, n // group]])
            real = np.repeat((q_ids[b] != 0)[:, None], case["extra"], 1)
            allowed = np.concatenate([allowed, real], 1)
        logits = q[b, :, n] @ keys.T / np.sqrt(HEAD_DIM)
        if case["soft_cap"] is not None:
            logits = case["soft_cap"] * np.tanh(logits / case["soft_cap"])
        weights = np.where(allowed, np.exp(logits), 0)
        seen = weights.sum(1) > 0
        lse[b, seen, n] = np.log(weights[seen].sum(1))
        out[
            b,
            seen,
            :,
        ][:, n] = 0
        out[b, seen, n] = weights[seen] @ values / weights[seen].sum(1, keepdims=True)
    return out, lse


# float32 sums of about 50 terms; bfloat16 keeps 8 bits of each out and gradient.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12, "bfloat16": 3e-2}


def assert_near(got, wanted, dtype, what):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance, err_msg=what)


CASES = pairwise(FACTORS)


@pytest.mark.parametrize("case", each_value(CASES), ids=case_id)
def test_xla_equals_the_definition_in_out_lse_and_all_gradients(case):
    with jax.enable_x64(case["dtype"] == "float64"):
        rng = np.random.default_rng(0)
        arrays, arguments = arrays_of(case, rng), arguments_of(case, rng)
        sizes = None if case["blocks"] else case["sizes"]
        out, lse, gradients = value_and_gradients(
            arrays, arguments, implementation="xla", block_sizes=sizes
        )
        ref_out, ref_lse, ref_gradients = value_and_gradients(
            arrays, arguments, implementation="reference"
        )
        wanted_out, wanted_lse = definition(case, arrays, arguments)
        assert out.dtype == case["dtype"]
        assert lse.dtype == ("float64" if case["dtype"] == "float64" else "float32")
        lse_dtype = "float32" if case["dtype"] == "bfloat16" else case["dtype"]
        for name, got in (("reference", (ref_out, ref_lse)), ("xla", (out, lse))):
            assert_near(got[0], wanted_out, case["dtype"], f"{name} out")
            assert_near(got[1], wanted_lse, lse_dtype, f"{name} lse")
        for name, wanted in ref_gradients.items():
            assert gradients[name].dtype == arrays[name].dtype
            assert_near(gradients[name], wanted, case["dtype"], f"gradient of {name}")


def test_the_cases_hold_fully_masked_rows():
    empty = 0
    for case in CASES:
        rng = np.random.default_rng(0)
        arrays = arrays_of({**case, "dtype": "float32"}, rng)
        _, lse = definition(case, arrays, arguments_of(case, rng))
        empty += bool((lse == -np.inf).any())
    assert empty >= len(CASES) // 4


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_fully_masked_row_is_zero_with_zero_gradients_through_any_cotangent(implementation):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 40, 2, 16) for _ in range(3))
    ids = np.repeat([[1, 0, 2]], [10, 20, 10], axis=1)

    def loss(q, k, v):
        out, lse = attention(
            q,
            k,
            v,
            q_segment_ids=ids,
            implementation=implementation,
            return_lse=True,
            block_sizes=SMALL,
        )
        # The square sends an infinite cotangent into the rows whose lse is -inf.
        return (out**2).sum() + (lse**2).sum(), (out, lse)

    gradients, (out, lse) = quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    padded = ids[0] == 0
    assert (out[:, padded] == 0).all() and (lse[:, padded] == -jnp.inf).all()
    assert jnp.isfinite(out).all() and jnp.isfinite(lse[:, ~padded]).all()
    for gradient in gradients:
        assert (gradient[:, padded] == 0).all() and jnp.isfinite(gradient).all()
        assert (gradient[:, ~padded] != 0).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_neither_overflow_nor_vanish(sign):
    rng = np.random.default_rng(0)
    # All logits of one sign and far from 0; 37 leaves padded key slots, whose logits are 0.
    q, k, v = (jnp.abs(30 * normal(rng, 1, 37, 2, 16)) for _ in range(3))
    arrays = {"query": q, "key": sign * k, "value": v}
    wanted = value_and_gradients(arrays, {}, implementation="reference")
    for sizes in (SMALL, None):
        got = value_and_gradients(arrays, {}, implementation="xla", block_sizes=sizes)
        for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-2)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v = (normal(rng, 1, 11, h, 4, dtype="float64") for h in (4, 2, 2))
        check_grads(
            jax.jit(
                lambda q, k, v: attention(
                    q, k, v, logit_soft_cap=2.0, return_lse=True, block_sizes=BlockSizes(4, 4)
                )
            ),
            (q, k, v),
            order=1,
            modes=["rev"],
            rtol=1e-6,
        )


@pytest.mark.parametrize("positions", ["static", "traced"])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(left=12)], ids=str)
def test_future_tokens_do_not_change_past_outputs(mask, positions):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 45, 2, 16) for _ in range(3))
    pos = np.arange(45) if positions == "static" else jnp.arange(45)
    run = quick_jit(
        lambda q, k, v: attention(q, k, v, mask=mask, q_positions=pos, block_sizes=SMALL)
    )
    cut = 21
    late = jnp.arange(45)[None, :, None, None] >= cut
    changed = run(q, *(jnp.where(late, 1e4, x) for x in (k, v)))
    np.testing.assert_array_equal(changed[:, :cut], run(q, k, v)[:, :cut])
    assert (changed[:, cut:] != run(q, k, v)[:, cut:]).any()


@pytest.mark.parametrize("positions", ["static", "traced"])
def test_empty_blocks_are_not_visited(positions):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 64, 1, 16) for _ in range(3))
    poison = jnp.where(jnp.arange(64)[None, :, None, None] < 24, jnp.nan, 0)
    pos = np.arange(64) if positions == "static" else jnp.arange(64)
    out = attention(
        q,
        k + poison,
        v + poison,
        mask=Causal() & Window(left=8),
        q_positions=pos,
        block_sizes=BlockSizes(8, 8),
    )
    assert jnp.isfinite(out[:, 40:]).all() and jnp.isnan(out[:, :24]).all()


@pytest.mark.parametrize("sizes", [SMALL, None])
def test_packed_documents_equal_documents_alone(sizes):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 50, 2, 16) for _ in range(3))
    lengths = (7, 23, 15)
    ids = np.repeat([[1, 2, 3, 0]], [*lengths, 5], axis=1)
    pos = np.concatenate([np.arange(n) for n in (*lengths, 5)])[None]
    mask = Causal() & Window(left=10)
    packed = quick_jit(
        lambda pos, ids: attention(
            q, k, v, mask=mask, q_positions=pos, q_segment_ids=ids, block_sizes=sizes
        )
    )(pos, ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = attention(q[:, part], k[:, part], v[:, part], mask=mask)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)
        start += length
    assert (packed[:, start:] == 0).all()


def test_merge_of_two_key_sets_is_one_softmax_with_its_gradients():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 2, 30, 2, 16) for _ in range(3))
    pos = np.arange(30)

    def whole(q, k, v):
        return attention(q, k, v, return_lse=True, block_sizes=SMALL)

    def halves(q, k, v):
        # The second half is invisible to the first queries: their second lse is -inf.
        parts = [
            attention(
                q,
                k[:, part],
                v[:, part],
                q_positions=pos,
                kv_positions=pos[part],
                return_lse=True,
                block_sizes=SMALL,
            )
            for part in (slice(0, 13), slice(13, 30))
        ]
        return merge(*parts[0], *parts[1])

    @functools.partial(quick_jit, static_argnums=0)
    def both(f, *x):
        loss = lambda *x: objective(*f(*x), np.random.default_rng(1))  # noqa: E731
        return f(*x), jax.grad(loss, (0, 1, 2))(*x)

    got, wanted = (jax.tree.leaves(both(f, q, k, v)) for f in (halves, whole))
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_merge_of_nothing_with_nothing_is_nothing_with_zero_gradients():
    out = jnp.ones((1, 2, 1, 4))
    lse = jnp.array([[[-jnp.inf], [0.0]]])
    nothing = jnp.full((1, 2, 1), -jnp.inf)

    def loss(*x):
        merged, merged_lse = merge(*x)
        return merged.sum() + (merged_lse**2).sum(), (merged, merged_lse)

    gradients, (merged, merged_lse) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
        out, lse, 2 * out, nothing
    )
    np.testing.assert_array_equal(merged[0, :, 0, 0], [0, 1])
    np.testing.assert_array_equal(merged_lse[0, :, 0], [-np.inf, 0])
    for gradient in gradients:
        assert jnp.isfinite(gradient).all() and (gradient[:, 0] == 0).all()


def test_a_mask_per_head_is_each_head_with_its_mask():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 33, h, 16) for h in (6, 2, 2))
    masks = [Causal(), Full(), Causal(), Full(), Full(), Window(left=3)]
    out, lse = attention(q, k, v, mask=masks, return_lse=True)
    for head, mask in enumerate(masks):
        kv = slice(head // 3, head // 3 + 1)
        one = attention(
            q[:, :, head : head + 1], k[:, :, kv], v[:, :, kv], mask=mask, return_lse=True
        )
        np.testing.assert_allclose(out[:, :, head : head + 1], one[0], atol=1e-6)
        np.testing.assert_allclose(lse[:, :, head : head + 1], one[1], atol=1e-6)


def test_selecting_every_block_changes_nothing_and_a_policy_cannot_leak_the_future():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 1, 40, 2, 16) for _ in range(3))
    everything = select_blocks(np.full((1, 1, 3, 5), FULL, np.int32), SMALL)
    np.testing.assert_allclose(attention(q, k, v, blocks=everything), attention(q, k, v), atol=1e-6)
    pos = np.arange(40)[None]
    by_mask = select_blocks(block_table(Causal(), pos, pos, sizes=SMALL)[:, None], SMALL)
    np.testing.assert_allclose(attention(q, k, v, blocks=by_mask), attention(q, k, v), atol=1e-6)


def test_works_under_vmap_and_scan_and_checkpoint():
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 3, 2, 40, 2, 16) for _ in range(3))
    pos = jnp.asarray(rng.permuted(np.tile(np.arange(40), (3, 2, 1)), axis=2))

    def loss(q, k, v, pos):
        return (attention(q, k, v, q_positions=pos, block_sizes=SMALL) ** 2).sum()

    def in_one_batch(*x):
        return loss(*(y.reshape(6, *y.shape[2:]) for y in x))

    def gradients(f):
        return quick_jit(jax.grad(lambda q, k, v: f(q, k, v, pos).sum(), (0, 1, 2)))(q, k, v)

    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    wanted = gradients(in_one_batch)
    for f in (
        jax.vmap(loss),
        lambda *x: jax.lax.map(lambda row: loss(*row), x),
        jax.vmap(jax.checkpoint(loss, policy=policy)),
    ):
        for x, y in zip(gradients(f), wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_named_residuals_spare_the_second_forward_pass():
    q = jnp.ones((1, 40, 2, 16))

    def products(policy):
        f = jax.checkpoint(lambda q: attention(q, q, q).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f))(q)).count("dot_general")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    everything = jax.checkpoint_policies.everything_saveable
    assert products(names) == products(everything) < products(None)


@pytest.mark.parametrize("traced", [False, True])
def test_a_batch_sharded_over_devices_gives_the_values_of_one_device(traced):
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 4, 40, 2, 16) for _ in range(3))
    pos = np.tile(np.arange(40, dtype=np.int32), (4, 1))
    ids = np.sort(rng.integers(0, 3, (4, 40)), 1).astype(np.int32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def run(q, k, v, pos, ids):
        tokens = {"q_positions": pos, "q_segment_ids": ids} if traced else {}
        loss = lambda *x: (attention(*x, **tokens, block_sizes=SMALL) ** 2).sum()  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    arguments = (q, k, v, pos, ids)
    wanted = quick_jit(run)(*arguments)
    rows = NamedSharding(mesh, P("data"))
    sharded = quick_jit(run, out_shardings=rows)(*jax.device_put(arguments, rows))
    manual = quick_jit(jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(
        *arguments
    )
    for got in (sharded, manual):
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_temporary_memory_doubles_when_the_length_doubles(traced):
    def temporary_bytes(length):
        def loss(q, k, v, pos):
            out, lse = attention(
                q, k, v, q_positions=pos if traced else None, return_lse=True, implementation="xla"
            )
            return out.sum() + lse.sum()

        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        pos = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, pos).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert long <= 2.2 * short
    assert long < 4096 * 4096 * 4  # less than the logits of one head


def test_explain_lists_every_backend_and_auto_logs_its_choice_once(caplog):
    q = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.float32)
    tpu, cudnn, *portable = explain(q, q, q).splitlines()[:4]
    assert tpu == "tpu: refuses: it is a TPU kernel and this call is lowered for cpu"
    assert cudnn == "cudnn: refuses: it is for NVIDIA GPUs and this call is lowered for cpu"
    assert portable == ["xla: taken by auto", "reference: could run"]
    huge = jax.ShapeDtypeStruct((8, 65536, 2, 16), jnp.bfloat16)
    lines = explain(huge, huge, huge).splitlines()
    assert lines[3].startswith("reference: refuses: it would hold all 68719476736 logits")
    per_head = explain(q, q, q, mask=(Causal(), Full()))
    assert per_head.count("taken by auto") == 2 and "Causal():" in per_head
    with pytest.raises(ValueError, match="explain: got 'maks', .*did you mean mask"):
        explain(q, q, q, maks=Causal())
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="effattn.dispatch"):
        for _ in range(3):
            jax.eval_shape(attention, q, q, q)
    assert [r.getMessage() for r in caplog.records] == [
        f"attention: auto takes xla (tpu refuses: {tpu.removeprefix('tpu: refuses: ')}; "
        f"cudnn refuses: {cudnn.removeprefix('cudnn: refuses: ')})"
    ]


def test_a_named_backend_that_refuses_raises_its_sentence():
    huge = jax.ShapeDtypeStruct((8, 65536, 2, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="'reference' refuses this attention: it would hold all"):
        jax.eval_shape(lambda x: attention(x, x, x, implementation="reference"), huge)


FUSSY = dispatch.Backend("fussy", lambda call: f"{call} is too big", None, None)
EASY = dispatch.Backend("easy", lambda call: None, None, None)


def test_auto_takes_the_first_backend_that_does_not_refuse_and_says_why(caplog):
    table = {"fussy": f"{__name__}:FUSSY", "easy": f"{__name__}:EASY"}
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="effattn.dispatch"):
        assert dispatch.choose("op", table, 7, "auto") is EASY
    assert caplog.records[0].getMessage() == "op: auto takes easy (fussy refuses: 7 is too big)"
    assert dispatch.explain(table, 7) == "fussy: refuses: 7 is too big\neasy: taken by auto"
    with pytest.raises(ValueError, match="no backend takes this op: fussy refuses: 7 is too big"):
        dispatch.choose("op", {"fussy": table["fussy"]}, 7, "auto")


GOOD = {
    "query": jnp.zeros((2, 20, 4, 16)),
    "key": jnp.zeros((2, 20, 2, 16)),
    "value": jnp.zeros((2, 20, 2, 8)),
}
BLOCKS = select_blocks(np.full((1, 1, 2, 3), FULL, np.int32), SMALL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": jnp.zeros((2, 20, 64))}, "query: expected"),
        ({"key": jnp.zeros((2, 20, 2, 8))}, "key: expected [b=2, s=any, k=any, h=16]"),
        ({"value": jnp.zeros((2, 19, 2, 8))}, "s is 20 from `key`"),
        (
            {"key": jnp.zeros((2, 20, 3, 16)), "value": jnp.zeros((2, 20, 3, 8))},
            "query: got 4, expected a multiple of num_kv_heads=3",
        ),
        ({"query": jnp.zeros((2, 20, 4, 16), int)}, "query: got dtype int32"),
        ({"query": jnp.zeros((2, 0, 4, 16))}, "no axis of length 0"),
        ({"mask": (Causal(), Full())}, "mask: got 2 entries, expected 4, one per query head"),
        ({"mask": "causal"}, "expected a Mask or one Mask per query head"),
        ({"q_positions": np.arange(19)}, "q_positions: expected"),
        ({"q_positions": np.zeros((3, 20), int)}, "b is 2 from `query`"),
        ({"q_positions": np.arange(20.0)}, "q_positions: got dtype float64"),
        ({"kv_segment_ids": np.ones((2, 20), int)}, "q_segment_ids: got None"),
        ({"kv_segment_ids": np.ones((2, 19), int), "q_segment_ids": np.ones((2, 20), int)}, "kv_s"),
        ({"extra_key": jnp.zeros((2, 3, 2, 16))}, "extra_value: got None"),
        (
            {"extra_key": jnp.zeros((2, 3, 4, 16)), "extra_value": jnp.zeros((2, 3, 4, 8))},
            "extra_key: expected [b=2, x=any, k=2, h=16]",
        ),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap: got 0.0"),
        ({"implementation": "xlaa"}, "did you mean xla?"),
        ({"blocks": BLOCKS, "block_sizes": SMALL}, "block_sizes: blocks already sets them"),
        (
            {"blocks": dataclasses.replace(BLOCKS, q_block=8)},
            "blocks.kv_blocks: expected [batch=1 or 2, heads=1, 2 or 4, num_q_blocks=3",
        ),
        ({"blocks": dataclasses.replace(BLOCKS, counts=BLOCKS.counts[..., :1])}, "blocks.counts"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(changes, words):
    with pytest.raises(ValueError) as error:
        attention(**(GOOD | changes))
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_the_key_side_must_be_given_when_lengths_differ(name):
    shorter = {"query": GOOD["query"][:, :5]}
    with pytest.raises(ValueError, match=f"kv_{name}: got None, expected them because q_{name}"):
        attention(**(GOOD | shorter), **{f"q_{name}": np.ones((1, 5), int)})


def test_importing_the_op_is_cheap():
    code = (
        "import time, jax; start = time.perf_counter(); import effattn.pallas_kernels.attention;"
        "import sys; seconds = time.perf_counter() - start;"
        "heavy = [m for m in ('flax', 'optax', 'jax.experimental.pallas', 'scipy', 'orbax')"
        " if m in sys.modules];"
        "from jax._src import xla_bridge; print(seconds, heavy, xla_bridge._backends)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, rest = run.stdout.split(maxsplit=1)
    assert rest.strip() == "[] {}"
    assert float(seconds) < 1.0  # 0.3 s on an idle machine; the margin is for a busy one
