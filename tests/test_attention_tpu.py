"""The TPU flash kernels: their arithmetic interpreted, races, and the compiler's opinion."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value, pairwise
from jax.experimental.pallas import tpu as pltpu

from effattn.blocks import BlockSelection, BlockSizes, select_blocks
from effattn.masks import (
    EMPTY,
    FULL,
    Causal,
    Dilated,
    Full,
    Neighborhood,
    PrefixLM,
    Sink,
    Window,
)
from effattn.pallas_kernels.attention import (
    attention,
    explain,
    tpu,
    tpu_backward,
    tpu_plan,
    tpu_sizes,
)
from effattn.pallas_kernels.attention.api import _attend_rule
from effattn.pallas_kernels.attention.call import check_arrays, check_tokens, describe
from effattn.pallas_kernels.tuning import flash_tuning
from effattn.static.hlo import pallas_calls
from effattn.static.tpu import compile_for

BATCH = 2
SIZES = BlockSizes(256, 128)
MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(left=70),
    "window and sink": Causal() & (Window(left=40) | Sink(4)),
    "both sides": Window(left=9, right=20),
    "prefix": PrefixLM(100),
    "dilated": Dilated(3) & Causal(),
    "not": ~Window(left=100),
    "neighborhood": Neighborhood((20, 20), (5, 7), stride=(1, 2), dilation=(2, 1)),
}
FACTORS = {
    "mask": tuple(MASKS),
    "dtype": ("float32", "bfloat16"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "lengths": ((128, 128), (301, 301), (139, 270)),
    "dims": ((128, 128), (16, 64), (64, 16), (80, 128), (256, 80)),
    "soft_cap": (None, 4.0),
    "segments": (None, "packed", "one padded row"),
    "positions": ("default", "shifted", "numpy", "traced"),
    "blocks": (None, "per kv head", "per head"),
}
CASES = pairwise(FACTORS)
# Against the reference on the same inputs. bfloat16 keeps 8 bits of the weights, of the gradients
# of the logits and of the scaled queries, which the reference keeps in float32.
TOLERANCE = {"float32": 3e-5, "bfloat16": 6e-2}

# Nearly all the time of these tests goes to the compiler: spare its optimizations.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def arrays_of(case, rng):
    (t, s), (h, k), (d, e) = case["lengths"], case["heads"], case["dims"]
    shapes = (BATCH, t, h, d), (BATCH, s, k, d), (BATCH, s, k, e)
    return [jnp.asarray(rng.standard_normal(shape), case["dtype"]) for shape in shapes]


def arguments_of(case, rng):
    (t, s), (h, k) = case["lengths"], case["heads"]
    arguments = {"mask": MASKS[case["mask"]], "logit_soft_cap": case["soft_cap"]}
    if case["positions"] == "shifted":
        arguments.update(q_positions=np.arange(t) + 50, kv_positions=np.arange(s) + 20)
    elif case["positions"] != "default":
        as_array = jnp.asarray if case["positions"] == "traced" else np.asarray
        # Unsorted, repeated, and with queries before every key: some rows see nothing.
        arguments["q_positions"] = as_array(rng.integers(0, 400, (BATCH, t)), jnp.int32)
        arguments["kv_positions"] = as_array(rng.integers(50, 400, (1, s)), jnp.int32)
    if case["segments"] is not None:
        ids = [np.sort(rng.integers(0, 4, (BATCH, n)), 1) for n in (t, s)]
        if case["segments"] == "one padded row":
            ids = [np.stack([np.ones_like(x[0]), np.zeros_like(x[1])]) for x in ids]
        arguments["q_segment_ids"], arguments["kv_segment_ids"] = ids
    if case["blocks"] is not None:
        rows, heads = (BATCH, k) if case["blocks"] == "per kv head" else (1, h)
        chosen = np.where(rng.random((rows, heads, *SIZES.count(t, s))) < 0.6, FULL, EMPTY)
        arguments["blocks"] = select_blocks(chosen.astype(np.int32), SIZES)
    else:
        arguments["block_sizes"] = SIZES
    return arguments


def value_and_gradients(arrays, arguments, implementation):
    traced = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
    static = {n: a for n, a in arguments.items() if n not in traced}
    static["implementation"] = implementation

    @quick_jit
    def run(arrays, traced):
        def loss(arrays):
            out, lse = attention(*arrays, **traced, **static, return_lse=True)
            rng = np.random.default_rng(7)
            weights = [jnp.asarray(rng.standard_normal(x.shape), "float32") for x in (out, lse)]
            seen = jnp.where(lse > -jnp.inf, lse, 0)
            return (out * weights[0]).sum() + (seen * weights[1]).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, (out, lse) = run(arrays, traced)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out, lse, *gradients), strict=True))


def assert_equals_the_reference(case):
    rng = np.random.default_rng(0)
    arrays, arguments = arrays_of(case, rng), arguments_of(case, rng)
    got = value_and_gradients(arrays, arguments, "tpu_interpret")
    arguments.pop("block_sizes", None)
    wanted = value_and_gradients(arrays, arguments, "reference")
    for name, x in wanted.items():
        assert got[name].dtype == x.dtype, name
        tolerance = TOLERANCE["bfloat16" if x.dtype == jnp.bfloat16 else case["dtype"]]
        if name == "lse" and case["dtype"] == "bfloat16":
            tolerance = 2e-2  # the scaled query is rounded to 8 bits
        a, b = (np.asarray(y, np.float64) for y in (got[name], x))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def case_id(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", each_value(CASES), ids=case_id)
def test_it_equals_the_reference_in_out_lse_and_all_gradients(case):
    assert_equals_the_reference(case)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", FACTORS["dtype"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_equals_the_reference_over_the_whole_matrix(mask, dtype, head_dim):
    plain = dict(soft_cap=None, segments=None, positions="default", blocks=None)
    for heads, lengths in itertools.product(((2, 2), (4, 2)), ((256, 256), (301, 301))):
        case = dict(mask=mask, dtype=dtype, heads=heads, lengths=lengths)
        assert_equals_the_reference(case | plain | {"dims": (head_dim, head_dim)})


def test_the_two_kernels_of_a_long_backward_pass_give_what_the_one_gives(monkeypatch):
    case = dict(CASES[0], mask="causal", heads=(4, 2), lengths=(301, 301), positions="default")
    case.update(dtype="float32", dims=(64, 80), segments=None, blocks=None)
    rng = np.random.default_rng(0)
    arrays, arguments = arrays_of(case, rng), arguments_of(case, rng)
    one = value_and_gradients(arrays, arguments, "tpu_interpret")
    monkeypatch.setattr(tpu_backward, "_dq_bytes", lambda plan, dtype: 2**40)
    jax.clear_caches()
    two = value_and_gradients(arrays, arguments, "tpu_interpret")
    for name, x in one.items():
        # The same float32 terms, summed in another order.
        np.testing.assert_allclose(two[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


def test_lists_too_long_for_a_group_are_walked_head_by_head(monkeypatch):
    case = dict(CASES[0], mask="causal", heads=(4, 2), lengths=(301, 301), positions="default")
    case.update(dtype="float32", dims=(16, 64), segments=None, blocks=None)
    monkeypatch.setattr(tpu, "MAX_ENTRIES", 10)
    jax.clear_caches()
    assert_equals_the_reference(case)


def test_own_block_sizes_cover_any_length():
    rng = np.random.default_rng(0)
    for length in (1, 129, 700, 1100):
        q, k, v = (jnp.asarray(rng.standard_normal((1, length, 1, 16)), "float32") for _ in "qkv")
        out = quick_jit(functools.partial(attention, implementation="tpu_interpret"))(q, k, v)
        wanted = attention(q, k, v, implementation="reference")
        np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-5)  # float32 sums, base 2


# --- memory and races -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["static", "segments", "gathered"])
def test_no_races_and_nothing_uninitialised(kind):
    """Pallas' own simulation of a TPU: memory starts as nan, copies are checked against uses."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 200, 2, 16)), "float32")
    k, v = (jnp.asarray(rng.standard_normal((1, 200, 1, 16)), "float32") for _ in "kv")
    ids = np.repeat([[1, 2, 0]], [90, 100, 10], axis=1) if kind == "segments" else None
    sizes, blocks = BlockSizes(128, 128), None
    if kind == "gathered":
        kinds = jnp.array([[[[FULL, EMPTY], [FULL, FULL]], [[EMPTY, EMPTY], [EMPTY, FULL]]]])
        blocks = select_blocks(kinds, sizes)  # one list a head
    tokens = check_tokens(check_arrays(q, k, v), None, None, ids, None, blocks)
    options = dict(scale=None, logit_soft_cap=None, block_sizes=sizes)
    call, tokens = describe(q, k, v, Causal(), tokens, **options)
    simulated = dataclasses.replace(
        tpu.INTERPRETED,
        forward=functools.partial(tpu.forward, interpret=params),
        backward=functools.partial(tpu.backward, interpret=params),
    )

    def loss(q, k, v, rule):
        out, lse = rule(q, k, v)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    def simulate(q, k, v):
        return _attend_rule(simulated, call, q, k, v, tokens)

    def define(q, k, v):
        return attention(
            q, k, v, q_segment_ids=ids, blocks=blocks, implementation="reference", return_lse=True
        )

    got = jax.grad(loss, (0, 1, 2))(q, k, v, simulate)
    wanted = jax.grad(loss, (0, 1, 2))(q, k, v, define)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)  # float32 sums, base 2
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


# --- the compiler ---------------------------------------------------------------------------------


def compile_case(chip, case):
    rng = np.random.default_rng(0)
    arguments = arguments_of(case, rng)
    static = {n: a for n, a in arguments.items() if not isinstance(a, jax.Array)}
    traced = {n: a for n, a in arguments.items() if isinstance(a, jax.Array)}
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays_of(case, rng)]

    def loss(arrays, traced):
        out, lse = attention(*arrays, **static, **traced, implementation="tpu", return_lse=True)
        return out.astype("float32").sum() + lse.sum()

    return compile_for(chip, jax.grad(loss), arrays, traced)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("case", CASES[:4], ids=case_id)
def test_it_compiles_for_a_tpu(case, chip):
    assert "effattn_flash_backward" in compile_case(chip, case).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("case", CASES[4:], ids=case_id)
def test_every_case_compiles_for_a_tpu(case, chip):
    compile_case(chip, case)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_memory_stays_linear_in_length(chip):
    """By shape only, at 262,144 tokens: not even a table of pairs of tokens would fit."""
    x = jax.ShapeDtypeStruct((1, 2**18, 1, 128), jnp.bfloat16)

    def loss(q, k, v):
        out = attention(q, k, v, mask=Causal() & Window(left=4095), implementation="tpu")
        return out.astype("float32").sum()

    memory = compile_for(chip, jax.grad(loss, (0, 1, 2)), x, x, x).memory_analysis()
    assert memory.temp_size_in_bytes < 16 * x.size * x.dtype.itemsize


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 128), ("float32", 256)])
def test_the_model_of_vmem_is_within_a_quarter_of_the_compilers_count(dtype, head_dim):
    # Large arrays: XLA keeps small ones in VMEM, where a kernel needs no buffers of its own.
    x = jax.ShapeDtypeStruct((4, 8192, 8, head_dim), dtype)
    tokens = check_tokens(check_arrays(x, x, x), None, None, None, None, None)
    call, _ = describe(x, x, x, Causal(), tokens, scale=None, logit_soft_cap=None, block_sizes=None)
    tiles = flash_tuning("TPU v5 lite").backward
    plan = tpu_plan.make_plan(call, call.with_positions(tokens), tiles)
    model = tpu_sizes.vmem_bytes(call, tpu_sizes.block_sizes(call, tiles), tiles)
    model += tpu_backward._dq_bytes(plan, x.dtype)

    def loss(q, k, v):
        return attention(q, k, v, implementation="tpu").astype("float32").sum()

    kernels = pallas_calls(compile_for("v5e", jax.grad(loss, (0, 1, 2)), x, x, x).as_text())
    (used,) = [kernel.vmem_bytes for kernel in kernels if "backward" in kernel.name]
    assert 0.75 < model / used < 1.25


def test_an_id_out_of_range_is_an_error():
    x = jnp.zeros((1, 256, 1, 16))
    kinds, counts = np.full((1, 1, 2, 1), FULL), np.ones((1, 1, 2), np.int32)
    ids = np.array([1, 2], np.int32).reshape(1, 1, 2, 1)
    blocks = BlockSelection(128, 128, ids, kinds, counts)
    message = "blocks.kv_blocks: got block 2, expected ids from 0 to 1"
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, mask=Full(), blocks=blocks)

    def run(ids):
        traced = dataclasses.replace(blocks, kv_blocks=ids)
        return attention(x, x, x, mask=Full(), blocks=traced, implementation="tpu_interpret")

    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(run)(jnp.asarray(ids)))
        jax.effects_barrier()


# --- who is taken ---------------------------------------------------------------------------------


def test_the_kernel_refuses_in_a_sentence_what_it_cannot_do():
    x = jnp.zeros((1, 128, 2, 64))
    with pytest.raises(ValueError, match="'tpu' refuses.*lowered for cpu"):
        attention(x, x, x, implementation="tpu")
    with pytest.raises(ValueError, match="head_dim must be at most 256, got 320"):
        wide = jnp.zeros((1, 8, 1, 320))
        attention(wide, wide, wide, implementation="tpu_interpret")
    with pytest.raises(ValueError, match="must all be float32 or all bfloat16"):
        half = x.astype("float16")
        attention(half, half, half, implementation="tpu_interpret")
    with pytest.raises(ValueError, match="multiples of 128, got q=64, kv=128"):
        sizes = BlockSizes(64, 128)
        attention(x, x, x, implementation="tpu_interpret", block_sizes=sizes)
    with pytest.raises(ValueError, match="q=8192, kv=8192 need .* MiB of VMEM and the kernel may"):
        attention(x, x, x, implementation="tpu_interpret", block_sizes=BlockSizes(8192, 8192))
    with pytest.raises(ValueError, match="lists of .* entries, and the scalar memory holds 65536"):
        long = jnp.zeros((1, 2**17, 1, 16))
        attention(
            long, long, long, implementation="tpu_interpret", block_sizes=BlockSizes(128, 128)
        )
    assert "tpu: refuses: it is a TPU kernel" in explain(x, x, x)
    assert "xla: taken by auto" in explain(x, x, x)
