"""Lightning, GLA and Mamba-2 layers and models: slopes, forms, numerics, sizes, errors."""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from flax import nnx

from effattn.batch import whole_rows
from effattn.models.lightning import LightningModelConfig
from effattn.models.mamba2 import Mamba2Config
from effattn.nn.mixer import state_bytes
from effattn.nn.mixers.gla import GLAConfig
from effattn.nn.mixers.lightning import LightningConfig, slope_scale, slopes
from effattn.nn.mixers.ssd import SSDConfig
from effattn.pallas_kernels.linear_attention import linear_attention

ROUNDING = 1e-5  # float32 sums of numbers around 1 in another order

WIDTH = 16


def mixer_of(config: Any, **kwargs: Any) -> Any:
    return config.build(WIDTH, rngs=nnx.Rngs(0), **kwargs)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---- slopes


@pytest.mark.parametrize("num_heads", [1, 6, 8, 40])
def test_slopes_fall_from_head_to_head_within_a_power_of_two(num_heads):
    power = 1 << (num_heads.bit_length() - 1)
    rates = slopes(num_heads)
    assert len(rates) == len(set(rates)) == num_heads
    assert rates[power - 1] == 2.0**-8 and np.all(np.diff(rates[:power]) < 0)


def test_the_conventions_of_slopes_do_not_agree():
    assert slopes(4) == (2**-2, 2**-4, 2**-6, 2**-8)
    assert slopes(4, "paper") == slopes(4, "fla") == (0, 2, 4, 6)
    assert slope_scale(3, 4) == pytest.approx(1e-5) and slope_scale(0, 4) == 1 + 1e-5
    assert slope_scale(0, 1) == 1.0
    assert [slope_scale(layer, 4, "paper") for layer in range(4)] == [1, 0.75, 0.5, 0.25]


def test_fla_scales_scores_and_the_others_do_not():
    by_name = {name: mixer_of(LightningConfig(slopes=name)) for name in ("paper", "fla")}
    assert by_name["paper"].slopes == by_name["fla"].slopes
    assert by_name["paper"].scale == 1.0 and by_name["fla"].scale == 0.5  # head_dim 4


def test_the_config_and_the_call_set_the_slopes_alike():
    x, info = draw(2, 9, WIDTH), whole_rows(np.zeros((2, 9)))
    placed = mixer_of(LightningConfig(layer=2, num_layers=4))
    called = mixer_of(LightningConfig())
    scale = jnp.asarray(slope_scale(2, 4))
    np.testing.assert_allclose(
        called(x, info, slope_scale=scale)[0], placed(x, info)[0], rtol=1e-6, atol=1e-9
    )
    assert np.max(np.abs(called(x, info)[0] - placed(x, info)[0])) > 1e-5


def test_layers_of_one_kind_are_scanned_with_their_own_slopes():
    """24 layers compile as two blocks, and compute what 24 blocks of their own do."""
    config = LightningModelConfig(num_layers=24, width=WIDTH, num_heads=2, mlp_width=8)
    model = config.build(vocab_size=11, rngs=nnx.Rngs(0))
    assert [(len(g.pattern), g.repeats) for g in model.stack.plan] == [(1, 1), (1, 23)]
    x, info = draw(1, 7, WIDTH), whole_rows(np.zeros((1, 7)))
    y, _ = jax.jit(lambda m, x: m.stack(x, info))(model, x)

    def one_by_one(model: Any, x: jax.Array) -> jax.Array:
        for layer in range(24):
            block, place = (1, layer - 1) if layer else (0, 0)
            block = jax.tree.map(lambda p, i=place: p[i], model.stack.blocks[block])
            x, _ = block(x, info, slope_scale=jnp.asarray(slope_scale(layer, 24)))
        return x

    np.testing.assert_allclose(y, one_by_one(model, x), rtol=ROUNDING, atol=ROUNDING)


# ---- limits and numerics


def test_no_decay_is_a_running_sum_and_fast_decay_sees_the_token_itself():
    q, k, v = (draw(1, 6, 2, 4, seed=i) for i in range(3))
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    everything = jnp.einsum("bhts,bshd->bthd", jnp.tril(scores), v)
    itself = jnp.einsum("bhtt,bthd->bthd", scores, v)
    for rate, wanted in ((0.0, everything), (200.0, itself)):
        out, _ = linear_attention(q, k, v, log_decay=jnp.full(2, -rate))
        np.testing.assert_allclose(out, wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("lrpe", [False, True], ids=["plain", "lrpe"])
def test_tokens_without_a_value_change_nothing_after_them(lrpe):
    """Also with LRPE, whose scores depend on distances alone."""
    mixer = mixer_of(LightningConfig(lrpe=lrpe))
    x = draw(1, 6, WIDTH)
    longer = jnp.concatenate([draw(1, 5, WIDTH, seed=1), x], axis=1)
    query, key, value = mixer._project(longer, whole_rows(longer).positions)
    options = mixer._options(None)
    out, _ = linear_attention(query, key, value.at[:, :5].set(0), **options)
    alone, _ = linear_attention(*mixer._project(x, whole_rows(x).positions), **options)
    np.testing.assert_allclose(out[:, 5:], alone, rtol=1e-4, atol=1e-6)


RATE = 7.0  # e^(7 64) overflows float32 by far
FAST = {
    "lightning": LightningConfig(num_heads=2, chunk_size=64),
    "ssd": SSDConfig(head_dim=8, state_dim=4, chunk_size=64),
    "gla": GLAConfig(num_heads=2, gate_normalizer=1.0, chunk_size=64),
    "simple_gla": GLAConfig(num_heads=2, gate="scalar", gate_normalizer=1.0, chunk_size=64),
}


def fast(name: str, chunk_size: int) -> Any:
    """The layer with every decay near e^-7 per token."""
    config = dataclasses.replace(FAST[name], chunk_size=chunk_size)
    mixer = config.build(WIDTH, rngs=nnx.Rngs(0))
    if name == "lightning":
        mixer.slopes = (RATE, RATE / 2)
    elif name == "ssd":
        mixer.step_bias[...] = jnp.ones_like(mixer.step_bias[...])
        mixer.log_rate[...] = jnp.log(RATE / jax.nn.softplus(mixer.step_bias[...]))
    else:
        mixer.gate_up.bias[...] = jnp.full_like(mixer.gate_up.bias[...], -RATE)
    return mixer


@pytest.mark.parametrize("name", thinned(FAST))
def test_decay_of_seven_per_token_is_finite_and_chunks_equal_the_recurrence(name):
    x, info = draw(1, 150, WIDTH), whole_rows(np.zeros((1, 150)))

    def value_and_gradients(chunk_size: int) -> Any:
        graphdef, params = nnx.split(fast(name, chunk_size))

        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, _ = nnx.merge(graphdef, params)(x, info)
            return jnp.sum(y * draw(*y.shape, seed=2)), y

        grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return nnx.to_pure_dict(grads[0]), grads[1], y

    chunked, stepwise = value_and_gradients(64), value_and_gradients(1)
    for leaf in jax.tree.leaves(chunked):
        assert np.all(np.isfinite(leaf))

    def close(got: jax.Array, wanted: jax.Array) -> None:
        scale = max(1.0, float(np.max(np.abs(wanted))))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5 * scale)

    jax.tree.map(close, chunked, stepwise)


# ---- sizes

PUBLISHED = {  # vocabulary, parameters in millions
    "lightning_385m": (64000, 399.0),
    "lightning_7b": (64000, 6931.1),
    "mamba2_1b3": (50277, 1343.8),
}


@functools.cache
def published(name: str) -> Any:
    config = importlib.import_module(f"effattn.configs.{name}").get_config().model
    return nnx.eval_shape(lambda: config.build(vocab_size=PUBLISHED[name][0], rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameter_counts(name):
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(published(name)))) / 1e6
    assert count == pytest.approx(PUBLISHED[name][1], abs=0.06)


def test_state_bytes_do_not_grow_with_the_length():
    segment = 4
    for max_len in (2048, 65536):
        # 23 layers of 8 heads of 128 x 128, the first one, with LRPE, twice as many.
        got = state_bytes(published("lightning_385m"), 1, max_len, jnp.bfloat16)
        assert got == 13_107_200 + 24 * segment
        conv = 3 * (4096 + 2 * 128) * 2 + 3 * segment
        got = state_bytes(published("mamba2_1b3"), 1, max_len, jnp.bfloat16)
        assert got == 48 * (2_097_152 + segment + conv)


def test_mamba2_starts_with_steps_and_rates_in_their_ranges():
    mixer = SSDConfig(head_dim=1, state_dim=4).build(256, rngs=nnx.Rngs(0))
    steps, rates = jax.nn.softplus(mixer.step_bias[...]), jnp.exp(mixer.log_rate[...])
    assert 1e-3 <= np.min(steps) < 2e-3 and 0.05 < np.max(steps) <= 0.1001
    assert 1 <= np.min(rates) < 2 and 15 < np.max(rates) <= 16.001
    assert np.median(steps) == pytest.approx(1e-2, rel=0.2)  # log-uniform
    assert np.all(mixer.skip[...] == 1) and np.any(mixer.key_conv.bias[...])


# ---- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LightningConfig(num_heads=3), "width: got 16, expected a multiple of num_heads=3"),
        (LightningConfig(slopes="flat"), "slopes: got 'flat', expected one of transnormer"),
        (LightningConfig(layer=2, num_layers=2), "layer: got 2, expected 0 <= layer < num_layers"),
        (LightningConfig(version=3), "version: got 3, expected one of 1, 2"),
        (LightningConfig(chunk_size=0), "chunk_size: got 0, expected at least 1"),
        (SSDConfig(head_dim=5), "expand \\* width: got 32, expected a multiple of head_dim=5"),
        (SSDConfig(head_dim=8, num_groups=3), "num_heads: got 4, .* multiple of num_groups=3"),
        (SSDConfig(head_dim=8, chunk_size=0), "chunk_size: got 0"),
        (GLAConfig(gate="chanel"), "gate: got 'chanel', .* did you mean channel"),
        (GLAConfig(num_heads=3), "key_width: got 8, expected a multiple of num_heads=3"),
        (GLAConfig(chunk_size=-1), "chunk_size: got -1"),
    ],
)
def test_a_layer_that_does_not_fit_says_why(config, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: mixer_of(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LightningModelConfig(pattern=("lightning", "lite")), "model.pattern: got 'lite'"),
        (LightningModelConfig(pattern=()), r"len\(model.pattern\): got 0"),
        (LightningModelConfig(num_layers=2, lrpe_layers=(2,)), "model.lrpe_layers: got 2"),
        (LightningModelConfig(pattern=("softmax",)), "model.lrpe_layers: got 0"),
        (Mamba2Config(num_layers=0), "model.num_layers: got 0"),
    ],
)
def test_a_model_that_does_not_fit_says_why(config, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: config.build(vocab_size=11, rngs=nnx.Rngs(0)))
