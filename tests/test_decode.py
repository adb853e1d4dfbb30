"""Decode attention: every backend against `attention`'s definition, and what it may not read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value

from effattn.masks import Causal, Dilated, Full, Neighborhood, Sink, Window
from effattn.pallas_kernels.attention import attention, decode_attention, explain_decode
from effattn.pallas_kernels.attention import decode_tpu as tpu_backend
from effattn.pallas_kernels.attention import decode_xla as xla_backend
from effattn.static.tpu import compile_for

LOCAL = Causal() & (Window(left=30) | Sink(3))
CHIPS = ("v5e", "v5p", "v6e")
# Nearly all the time of these tests goes to the compiler: spare its optimizations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DEFAULTS = {
    "lengths": (0, 61, 150),
    "cache": 150,
    "mask": Causal(),
    "heads": (4, 2),
    "q_len": 1,
    "dims": (16, 16),
    "dtype": "float32",
    "cap": None,
    "positions": None,
    "splits": None,
}
CASES = {
    "one token": {},
    "a few, grouped, values wider": {"q_len": 4, "heads": (6, 2), "dims": (16, 24)},
    "window and sink": {"mask": LOCAL, "lengths": (4, 61, 150), "q_len": 4},
    "soft cap, bfloat16": {"cap": 3.0, "dtype": "bfloat16", "heads": (4, 4)},
    "one kv head, odd cache": {"heads": (4, 1), "cache": 263, "lengths": (263, 260, 1)},
    "three kv heads, odd cache": {"heads": (3, 3), "cache": 259, "lengths": (255, 0, 259)},
    "a ring": {"positions": "ring", "mask": Causal() & Window(left=140), "lengths": (150, 9, 150)},
    "shuffled slots": {"positions": "shuffled", "mask": LOCAL, "q_len": 2, "splits": 3},
    "everything, in splits": {"mask": Full(), "splits": 4},
    "cache shorter than a block": {"cache": 65, "lengths": (65, 3, 0), "dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a short cache has several blocks, the last of which overlaps its neighbour."""
    monkeypatch.setattr(xla_backend, "BLOCK_CPU", 32)
    monkeypatch.setattr(tpu_backend, "PIECE", 64 * 1024)


def interpret(**options):
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options))


def arguments_of(case, seed=0):
    """(query, key, value, arguments); the cache holds nan wherever no token is."""
    case = DEFAULTS | case
    rng = np.random.default_rng(seed)
    (n, k), (h, e), s, t = case["heads"], case["dims"], case["cache"], case["q_len"]
    lengths = np.array(case["lengths"])
    b = len(lengths)
    held = (np.arange(s) < lengths[:, None])[..., None, None]
    query = jnp.asarray(rng.standard_normal((b, t, n, h)), case["dtype"])
    key, value = (
        jnp.asarray(np.where(held, rng.standard_normal((b, s, k, d)), np.nan), case["dtype"])
        for d in (h, e)
    )
    arguments = {"lengths": lengths, "mask": case["mask"], "logit_soft_cap": case["cap"]}
    if case["positions"] == "ring":
        # Row 0 has written 3 * s - 7 tokens, so its newest stands in slot s - 8.
        last = np.where(lengths == s, 3 * s - 8, lengths - 1)[:, None]
        arguments["kv_positions"] = last - (last - np.arange(s)) % s
        arguments["q_positions"] = last
    elif case["positions"] == "shuffled":
        arguments["kv_positions"] = rng.permutation(s)
        arguments["q_positions"] = rng.integers(0, s, (b, t))
    return query, key, value, arguments


def definition(query, key, value, arguments):
    """`attention` by its definition: slots past the length are padding, and hold zeros."""
    lengths = arguments["lengths"]
    (b, t), s = query.shape[:2], key.shape[1]
    held = np.arange(s) < lengths[:, None]
    key, value = (jnp.where(held[..., None, None], x, 0) for x in (key, value))
    return attention(
        query,
        key,
        value,
        mask=arguments["mask"],
        q_positions=arguments.get("q_positions", lengths[:, None] - t + np.arange(t)),
        kv_positions=arguments.get("kv_positions", np.arange(s)),
        q_segment_ids=np.ones((b, t), int),
        kv_segment_ids=held.astype(int),
        logit_soft_cap=arguments["logit_soft_cap"],
        implementation="reference",
        return_lse=True,
    )


def assert_close(got, wanted, dtype):
    # bfloat16: weights are rounded before they meet the values, and the result once more.
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-6
    for a, b in zip(got, wanted, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "implementation"), each_value([(n, i) for n in CASES for i in ("xla", "tpu")])
)
def test_it_is_attention_over_the_slots_that_hold_tokens(name, implementation):
    case = DEFAULTS | CASES[name]
    query, key, value, arguments = arguments_of(case)
    run = functools.partial(
        decode_attention,
        **arguments,
        num_splits=case["splits"],
        implementation=implementation,
        return_lse=True,
    )
    with interpret():
        got = quick_jit(run)(query, key, value)
    assert got[0].dtype == query.dtype and got[1].dtype == jnp.float32
    assert_close(got, definition(query, key, value, arguments), case["dtype"])


def test_float64_stays_float64():
    with jax.enable_x64(True):
        query, key, value, arguments = arguments_of({"dtype": "float64", "q_len": 2})
        got = decode_attention(query, key, value, **arguments, return_lse=True)
        wanted = definition(query, key, value, arguments)
        assert got[0].dtype == got[1].dtype == jnp.float64
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_kernel_has_no_race():
    query, key, value, arguments = arguments_of({"mask": LOCAL, "lengths": (150, 0, 70)})
    with interpret(detect_races=True, num_cores_or_threads=2):
        got = decode_attention(
            query, key, value, **arguments, num_splits=2, implementation="tpu", return_lse=True
        )
        jax.block_until_ready(got)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert interpreter.races is not None and not interpreter.races.races_found
    assert_close(got, definition(query, key, value, arguments), "float32")


@pytest.mark.parametrize("num_splits", [1, 2, 5, 40])
def test_the_number_of_splits_does_not_change_the_result(num_splits):
    query, key, value, arguments = arguments_of({"lengths": (150, 0, 33), "q_len": 2})
    run = functools.partial(decode_attention, **arguments, return_lse=True)
    got = quick_jit(functools.partial(run, num_splits=num_splits))(query, key, value)
    assert_close(got, definition(query, key, value, arguments), "float32")


def test_a_window_bounds_the_blocks_that_are_read():
    """Values outside of the blocks that the window touches are infinite, and are not met."""
    query, key, value, arguments = arguments_of(
        {"mask": Causal() & Window(left=20), "lengths": (150, 149), "cache": 150}
    )
    far = np.arange(150)[None, :, None, None] < 96  # three blocks of 32 before the window's
    key, value = jnp.where(far, jnp.inf, key), jnp.where(far, jnp.inf, value)
    run = functools.partial(decode_attention, **arguments, return_lse=True)
    got = quick_jit(run)(query, key, value)
    wanted = definition(query, *(jnp.where(far, 0, x) for x in (key, value)), arguments)
    assert_close(got, wanted, "float32")


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_vmap_over_batches(implementation):
    query, key, value, arguments = arguments_of({"lengths": (150, 3)})
    lengths = np.stack([arguments.pop("lengths"), [0, 70]])
    batches = [jnp.stack([x, jnp.flip(x, 2)]) for x in (query, key, value)]
    batches[1:] = (jnp.nan_to_num(x) for x in batches[1:])

    def run(query, key, value, lengths):
        return decode_attention(
            query, key, value, lengths=lengths, implementation=implementation, return_lse=True
        )

    with interpret():
        got = quick_jit(jax.vmap(run))(*batches, jnp.asarray(lengths))
    for i in range(2):
        wanted = definition(*(x[i] for x in batches), {**arguments, "lengths": lengths[i]})
        assert_close([x[i] for x in got], wanted, "float32")


def test_gradients_are_those_of_attention():
    query, key, value, arguments = arguments_of({"mask": LOCAL, "q_len": 2})

    def loss(function, query, key, value):
        out, lse = function(query, key, value)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    mine = functools.partial(decode_attention, **arguments, return_lse=True)
    theirs = functools.partial(definition, arguments=arguments)
    got, wanted = (
        quick_jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(query, key, value)
        for f in (mine, theirs)
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # sums in another order
    assert not np.asarray(got[1])[0].any()  # a row of length 0


MODES = {
    "plain": {},
    "float32, a few tokens, window and sink": {"dtype": "float32", "t": 4, "mask": LOCAL},
    "positions, soft cap": {"positions": True, "cap": 30.0, "mask": LOCAL},
    "head_dim 64": {"h": 64, "e": 64},
    "head_dim 80, value_dim 24": {"h": 80, "e": 24, "dtype": "float32"},
    "head_dim 256, four kv heads": {"h": 256, "e": 256, "heads": (4, 4)},
    "one kv head, odd cache": {"heads": (8, 1), "s": 1001},
    "three kv heads, odd cache, positions": {"heads": (6, 3), "s": 777, "positions": True},
    "as many kv heads as heads": {"heads": (32, 32)},
    "the most rows": {"heads": (128, 8), "t": 4},
    "everything, in splits": {"mask": Full(), "splits": 3},
    "dilated": {"mask": Dilated(3)},
    "neighborhood": {"mask": Neighborhood((4096,), (7,), (2,), (3,)), "s": 4096},
    "short cache, large batch": {"b": 64, "s": 64},
}


def compile_mode(chip, b=8, t=1, s=4096, heads=(32, 8), h=128, e=128, dtype="bfloat16", **mode):
    n, k = heads
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, e))
    ]
    shapes.append(jax.ShapeDtypeStruct((b,), jnp.int32))
    if mode.pop("positions", False):
        shapes += [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((b, t), (b, s))]

    def run(query, key, value, lengths, q_positions=None, kv_positions=None):
        return decode_attention(
            query,
            key,
            value,
            lengths=lengths,
            q_positions=q_positions,
            kv_positions=kv_positions,
            mask=mode.get("mask", Causal()),
            logit_soft_cap=mode.get("cap"),
            num_splits=mode.get("splits"),
            return_lse=True,
        )

    return compile_for(chip, run, *shapes)


@pytest.fixture
def real_blocks(monkeypatch, small_blocks):
    monkeypatch.undo()


@pytest.mark.parametrize("chip", CHIPS)
def test_it_compiles_for_a_tpu_without_a_copy_of_the_cache(chip, real_blocks):
    compiled = compile_mode(chip, s=16384)
    assert "effattn_decode" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20  # the cache has 2**29 bytes


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_compiles_for_a_tpu(mode, chip, real_blocks):
    assert "effattn_decode" in compile_mode(chip, **MODES[mode]).as_text()


def test_explain_names_every_backend_and_its_reason():
    query, key, value, arguments = arguments_of({})
    lines = explain_decode(query, key, value, **arguments).splitlines()
    assert lines[0].startswith("tpu: refuses: it is a TPU kernel")
    assert lines[1] == "xla: taken by auto"
    with interpret():
        assert "tpu: taken by auto" in explain_decode(query, key, value)
        assert "prefill" in explain_decode(jnp.zeros((3, 300, 4, 16)), key, value)
        assert "float16" in explain_decode(query.astype(jnp.float16), key, value)
        assert "at least 128 keys" in explain_decode(query, key[:, :40], value[:, :40])
    with pytest.raises(ValueError, match="explain_decode: got 'length'.*lengths"):
        explain_decode(query, key, value, length=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": None}, "lengths: got None"),
        ({"lengths": np.array([0, 61, 151])}, r"lengths: got \[151\], expected 0 to cache_len=150"),
        ({"lengths": np.zeros(4, int)}, r"lengths: expected \[b=3\], got \(4,\)"),
        ({"lengths": np.zeros(3)}, "lengths: got dtype float64, expected an integer"),
        ({"kv_positions": np.arange(150)}, "q_positions: got None"),
        ({"q_positions": np.arange(2)}, r"q_positions: expected \[1=any, t=1\], got \(1, 2\)"),
        ({"mask": [Causal()] * 4}, "mask: got .*, expected one Mask"),
        ({"logit_soft_cap": 0.0}, "logit_soft_cap: got 0.0"),
        ({"num_splits": 0}, "num_splits: got 0, expected at least 1"),
        ({"implementation": "tpu"}, "'tpu' refuses this decode_attention: .*lowered for cpu"),
        ({"implementation": "xls"}, "did you mean xla"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, key, value, arguments = arguments_of({})
    with pytest.raises(ValueError, match=message):
        decode_attention(query, key, value, **(arguments | change))
