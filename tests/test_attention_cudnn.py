"""Other people's kernels behind `attention`: what they may take, what they are told, what returns.

cuDNN cannot run here. What is lowered for it is read back; the arithmetic around it runs against a
stand-in that takes `out` at its word, as cuDNN does. One test compares numbers on a GPU.
"""

import contextlib
import importlib.util
import itertools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from effattn.blocks import BlockSizes, select_blocks
from effattn.masks import FULL, Causal, Dilated, Full, PrefixLM, Sink, Window
from effattn.pallas_kernels.attention import attention, cudnn, explain
from effattn.pallas_kernels.attention.band import OPEN, Band, band_of_call, band_of_mask
from effattn.pallas_kernels.attention.call import check_arrays, check_tokens, describe
from effattn.pallas_kernels.target import NvidiaTarget, nvidia_target

CAUSAL_WINDOW = Causal() & Window(left=8)
MASKS = {
    "full": (Full(), OPEN),
    "causal": (Causal(), Band(None, 0)),
    "causal, spelled as a window": (Window(right=0), Band(None, 0)),
    "an open window": (Window() & Full(), OPEN),
    "window": (CAUSAL_WINDOW, Band(8, 0)),
    "window, spelled alone": (Window(left=8, right=0), Band(8, 0)),
    "two windows": (Window(left=8) & (Causal() & Window(left=20, right=4)), Band(8, 0)),
    "window as long as the queries": (Causal() & Window(left=39), Band(None, 0)),
    "window as long as everything": (Window(left=39, right=47), OPEN),
}
OTHERS = [Causal() | Window(left=8), ~Causal(), Dilated(2), PrefixLM(4), CAUSAL_WINDOW & Sink(3)]


def shapes(q_len=40, kv_len=48, head_dim=64, value_dim=None, dtype=jnp.bfloat16, heads=(4, 2)):
    value_dim = head_dim if value_dim is None else value_dim
    dims = (q_len, heads[0], head_dim), (kv_len, heads[1], head_dim), (kv_len, heads[1], value_dim)
    return tuple(jax.ShapeDtypeStruct((2, *d), dtype) for d in dims)


def call_of(mask, q_len=40, kv_len=48, **positions):
    arrays = shapes(q_len, kv_len)
    both = {"q_positions": None, "kv_positions": None, **positions}
    tokens = check_tokens(check_arrays(*arrays), *both.values(), None, None, None)
    return describe(*arrays, mask, tokens, scale=None, logit_soft_cap=None, block_sizes=None)[0]


@contextlib.contextmanager
def lowering_for(kind, platform):
    """As in a program that is compiled for a device that is not here."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A GPU that jax does not know well; it would ask the CUDA plugin for cuDNN's version.

    Not a described device: jax lowers cuDNN's rule for splitting over devices for real ones only.
    """
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "nvidia_target", lambda: NvidiaTarget("some GPU", None))
    monkeypatch.setattr(cudnn, "not_an_nvidia_gpu", lambda: None)


@pytest.mark.parametrize("name", MASKS)
def test_a_band_allows_what_its_mask_allows(name):
    mask, wanted = MASKS[name]
    band = band_of_call(call_of(mask))
    assert band == wanted
    distance = np.arange(40)[:, None] - np.arange(48)[None]
    left, right = (100 if side is None else side for side in band)
    allowed = np.array(mask.allowed(np.arange(40)[:, None], np.arange(48)[None]))
    np.testing.assert_array_equal(allowed, (distance <= left) & (-distance <= right))


@pytest.mark.parametrize("mask", OTHERS, ids=str)
def test_other_masks_are_no_bands(mask):
    assert band_of_mask(mask) is None
    assert "must be made of Full, Causal, Window and &" in band_of_call(call_of(mask))


def test_a_band_needs_positions_that_count_up_together():
    rows = np.arange(40)[None] + np.array([[3], [9]])
    keys = np.arange(48)[None] + np.array([[3], [9]])
    for q, kv, good in (
        (rows, keys, True),
        (rows, keys[::-1], False),
        (rows[:1], keys, False),
        (2 * rows, 2 * keys, False),
        (jnp.asarray(rows), keys, False),
    ):
        call = call_of(Causal(), q_positions=q, kv_positions=kv)
        assert isinstance(band_of_call(call), Band) == good
        # Without a mask, positions say nothing.
        assert band_of_call(call_of(Full(), q_positions=q, kv_positions=kv)) == OPEN
    assert "see none of 48 keys" in band_of_call(call_of(CAUSAL_WINDOW, q_len=57))
    assert band_of_call(call_of(CAUSAL_WINDOW, q_len=56)) == Band(8, 0)


def lowered(arrays, gradient=False, return_lse=False, **options):
    def run(*arrays):
        return attention(*arrays, **options, return_lse=return_lse)

    def loss(*arrays):
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(run(*arrays)))

    traced = jax.jit(jax.grad(loss, (0, 1, 2)) if gradient else run).trace(*arrays)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text):
    """(target, what cuDNN is told) of every custom call for cuDNN."""
    found = re.findall(r'custom_call @(__cudnn\S+?)\(.*?backend_config = "(.*?)", ', text)
    found = [(name, config.replace("\\22", '"').replace("\\", "")) for name, config in found]
    return [(name, json.loads(config)["cudnn_fmha_backend_config"]) for name, config in found]


@pytest.mark.parametrize("name", MASKS)
def test_auto_takes_cudnn_on_a_gpu_and_tells_it_the_mask(name, on_a_gpu):
    mask, band = MASKS[name]
    text = lowered(shapes(), mask=mask)
    ((target, told),) = custom_calls(text)
    assert target == "__cudnn$fmhaSoftmax"
    assert told["mask_type"] == ("NO_MASK" if band == OPEN else "CAUSAL")
    # cuDNN counts the query's own token; a window always comes with the causal mask.
    assert told["sliding_window_length"] == (0 if band.left is None else band.left + 1)
    assert told["fmha_scale"] == 64**-0.5


def test_the_backward_pass_keeps_the_residuals_and_runs_once_more_for_lse(on_a_gpu):
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    for return_lse, number in ((False, 1), (True, 2)):
        text = lowered(shapes(), gradient=True, return_lse=return_lse, mask=CAUSAL_WINDOW)
        calls = custom_calls(text)
        assert [name for name, _ in calls] == [forward] + [backward] * number
        assert all(told["sliding_window_length"] == 9 for _, told in calls)
        assert all(told["mask_type"] == "CAUSAL" for _, told in calls)


BLOCKS = select_blocks(np.full((1, 1, 3, 3), FULL, np.int32), BlockSizes(16, 16))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"dtype": jnp.float32}, {}, "all be bfloat16 or all float16, got float32"),
        ({"head_dim": 20}, {}, "head_dim must be a multiple of 8 up to 128, got 20"),
        ({"head_dim": 192}, {}, "head_dim must be a multiple of 8 up to 128, got 192"),
        ({"value_dim": 32}, {}, "value_dim must equal head_dim=64, got 32"),
        ({"q_len": 39}, {}, "q_len must be even, as training wants it, got 39"),
        ({"kv_len": 49}, {}, "kv_len must be even"),
        ({}, {"logit_soft_cap": 30.0}, "no logit_soft_cap"),
        (
            {},
            {"q_segment_ids": np.ones((2, 40), int), "kv_segment_ids": np.ones((2, 48), int)},
            "no segment ids",
        ),
        ({}, {"blocks": BLOCKS}, "no block lists"),
        ({}, {"block_sizes": BlockSizes(16, 16)}, "chooses its own block sizes"),
        ({}, {"mask": Causal() | Sink(2)}, "must be made of Full, Causal, Window and &"),
        ({}, {"mask": Window(left=8)}, "of windows it has only the causal one"),
        ({}, {"mask": Window(left=8, right=3)}, "of windows it has only the causal one"),
        ({"q_len": 50}, {"mask": CAUSAL_WINDOW}, "no more queries than keys, got 50 and 48"),
        ({"q_len": 60}, {"mask": CAUSAL_WINDOW}, "see none of 48 keys"),
        (
            {},
            {"q_positions": np.arange(40) + 8, "kv_positions": np.arange(48)},
            "must count up by one from the same start",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_cudnn_must_not_take_is_refused_and_goes_to_xla(changes, options, words, on_a_gpu):
    arrays = shapes(**changes)
    _, second, third, *_ = explain(*arrays, **options).splitlines()
    assert second.startswith("cudnn: refuses: ") and words in second
    assert third == "xla: taken by auto"
    with pytest.raises(ValueError, match="'cudnn' refuses this attention"):
        jax.eval_shape(lambda *x: attention(*x, **options, implementation="cudnn"), *arrays)


@pytest.mark.parametrize(
    ("kind", "platform", "words"),
    [
        ("TPU v5 lite", "tpu", "for NVIDIA GPUs and this call is lowered for tpu"),
        ("AMD Instinct MI300X", "gpu", "for NVIDIA GPUs and this call is lowered for gpu"),
        ("NVIDIA H100", "cuda", "cuDNN is not detected"),
    ],
)
def test_other_machines_are_refused(kind, platform, words):
    # The last one is a machine without the CUDA plugin, as this one is.
    with lowering_for(kind, platform):
        assert words in explain(*shapes()).splitlines()[1]
        target = nvidia_target()
    assert target == (NvidiaTarget(kind, None) if platform == "cuda" else None)


def test_the_generation_of_the_gpu_bounds_the_head_dim(monkeypatch, on_a_gpu):
    line = {}
    for capability in ((7, 5), (8, 0), (9, 0), (10, 0)):
        target = NvidiaTarget("some GPU", capability)
        monkeypatch.setattr(cudnn, "nvidia_target", lambda target=target: target)
        line[capability] = explain(*shapes(head_dim=256)).splitlines()[1]
    assert "some GPU is too old" in line[7, 5]
    assert "up to 128, got 256" in line[8, 0] and "up to 128, got 256" in line[10, 0]
    assert line[9, 0] == "cudnn: taken by auto"


def stand_in():
    """cuDNN's entries, computed by XLA, of the jax that is installed: same names, same order."""
    real = fused_attention_stablehlo

    def logits(q, k, scale, mask_type, window):
        group = q.shape[2] // k.shape[2]
        q, k = q.astype(jnp.float32), jnp.repeat(k.astype(jnp.float32), group, 2)
        x = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
        distance = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])[None]
        allowed = np.ones_like(distance, bool)
        if mask_type == real.MaskType.CAUSAL:
            allowed &= distance >= 0
        if window is not None:
            allowed &= distance < window
        return jnp.where(allowed, x, -jnp.inf)

    def dot_product_attention(q, k, v, *, scale, mask_type, sliding_window_length, return_residual):
        assert return_residual
        x = logits(q, k, scale, mask_type, sliding_window_length)
        v = jnp.repeat(v.astype(jnp.float32), q.shape[2] // v.shape[2], 2)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(x), v)
        return out.astype(q.dtype), jax.nn.logsumexp(x, -1)

    def rule(named):
        q, k, v, *unused, lse, out = named["res"]
        assert all(x.size == 0 for x in jax.tree.leaves(unused))
        assert named["variadic_args"] == (False, False) and named["dropout_rate"] == 0
        dout, group = named["grad_output"].astype(jnp.float32), q.shape[2] // k.shape[2]
        window = named["sliding_window_length"]
        x = logits(q, k, named["scale"], named["mask_type"], window)
        weights = jnp.exp(x - lse[..., None])
        values = jnp.repeat(v.astype(jnp.float32), group, 2)
        delta = (dout * out).sum(-1).swapaxes(1, 2)[..., None]
        dlogits = weights * (jnp.einsum("btnh,bsnh->bnts", dout, values) - delta)
        keys = jnp.repeat(k.astype(jnp.float32), group, 2)
        dq = named["scale"] * jnp.einsum("bnts,bsnh->btnh", dlogits, keys)
        dk = named["scale"] * jnp.einsum("bnts,btnh->bsnh", dlogits, q.astype(jnp.float32))
        dv = jnp.einsum("bnts,btnh->bsnh", weights, dout)
        dk, dv = (x.reshape(*k.shape[:3], group, -1).sum(3) for x in (dk, dv))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    parameters = fused_attention_stablehlo._dot_product_attention_bwd_rule.__code__
    names = parameters.co_varnames[: parameters.co_argcount]
    scope = {"rule": rule}
    source = f"def bwd({', '.join(names)}): return rule(dict(locals()))"
    exec(source, scope)
    return types.SimpleNamespace(
        AttentionLayout=real.AttentionLayout,
        MaskType=real.MaskType,
        check_cudnn_version=lambda: 91200,
        dot_product_attention=dot_product_attention,
        _dot_product_attention_bwd_rule=scope["bwd"],
    )


def results(arrays, implementation, mask, return_lse):
    def loss(*arrays):
        out = attention(*arrays, mask=mask, implementation=implementation, return_lse=return_lse)
        out, lse = out if return_lse else (out, jnp.zeros(1))
        rng = np.random.default_rng(7)
        total = (out.astype(jnp.float32) * rng.standard_normal(out.shape)).sum()
        return total + (lse * rng.standard_normal(lse.shape)).sum(), (out, lse)

    (_, result), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return *result, *gradients


def normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def assert_same(got, wanted):
    # bfloat16 keeps 8 bits of each gradient and of the weights.
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, wanted, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=3e-2, atol=3e-2, err_msg=name)


@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_through_out_and_lse_are_those_of_the_reference(
    return_lse, monkeypatch, on_a_gpu
):
    fused = stand_in()
    monkeypatch.setattr(cudnn, "_fused", lambda: fused)
    rng = np.random.default_rng(0)
    arrays = [normal(rng, x.shape, x.dtype) for x in shapes(head_dim=16)]
    got = results(arrays, "cudnn", CAUSAL_WINDOW, return_lse)
    assert_same(got, results(arrays, "reference", CAUSAL_WINDOW, return_lse))


@pytest.mark.device
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_equals_the_reference_on_a_gpu():
    rng = np.random.default_rng(0)
    kinds = (
        ((4, 2), (40, 48), jnp.bfloat16),
        ((4, 4), (512, 512), jnp.float16),
        ((4, 1), (130, 512), jnp.bfloat16),
    )
    for (mask, _), (heads, lengths, dtype) in itertools.product(MASKS.values(), kinds):
        arrays = [normal(rng, x.shape, x.dtype) for x in shapes(*lengths, heads=heads, dtype=dtype)]
        got = results(arrays, "cudnn", mask, True)
        assert_same(got, results(arrays, "reference", mask, True))


def test_tokamax_takes_what_it_can_and_only_by_name():
    arrays = shapes(heads=(2, 2), dtype=jnp.float32)
    line = explain(*arrays, mask=CAUSAL_WINDOW).splitlines()[-1]
    if importlib.util.find_spec("tokamax") is None:
        assert line == "tokamax: refuses: not installed: pip install 'effattn[peers]'"
        with pytest.raises(ValueError, match=r"'tokamax' refuses .*effattn\[peers\]"):
            jax.eval_shape(lambda *x: attention(*x, implementation="tokamax"), *arrays)
        return
    assert line == "tokamax: could run"
    assert "gives no log-sum-exp" in explain(*arrays, return_lse=True)
    rng = np.random.default_rng(0)
    arrays = [normal(rng, x.shape, x.dtype) for x in arrays]
    for mask in (Full(), Causal(), CAUSAL_WINDOW, Window(left=8, right=5), Window(left=8)):
        got = results(arrays, "tokamax", mask, False)
        assert_same(got, results(arrays, "reference", mask, False))
