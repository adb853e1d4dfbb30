"""JRT's prefix: its limits, its place in a model, and generation that holds to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn import generate as generation
from effattn.batch import whole_rows
from effattn.generate import generate, read_twice
from effattn.models.based import BasedModelConfig
from effattn.models.nat import NATConfig
from effattn.nn.mixers.based import BasedConfig
from effattn.nn.mixers.jrt import JRTConfig
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention

ROUNDING = 1e-5  # float32 sums of numbers around 1 in another order

LEN, WIDTH, PREFIX, VOCAB = 9, 8, 4, 13
SIZES = {"num_heads": 2, "feature_dim": 3, "init_std": 0.3}


def build(config):
    return config.build(WIDTH, dtype=jnp.float32, rngs=nnx.Rngs(0))


def draw(rows: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(rows, LEN, WIDTH)), jnp.float32)


def test_without_a_prefix_it_is_based():
    jrt, based = build(JRTConfig(enc_length=0, **SIZES)), build(BasedConfig(**SIZES))
    for name in ("query", "key", "value", "out"):
        setattr(based, name, getattr(jrt, name))
    x = draw()
    np.testing.assert_array_equal(jrt(x, whole_rows(x))[0], based(x, whole_rows(x))[0])
    assert jrt.causal and not build(JRTConfig(enc_length=1, **SIZES)).causal


def test_a_prefix_of_zero_keys_and_values_adds_its_length_to_the_denominator():
    mixer = build(JRTConfig(enc_length=PREFIX, **SIZES))
    for projection in (mixer.prefix_key, mixer.prefix_value):
        projection.kernel[...] = jnp.zeros_like(projection.kernel[...])
    x = draw()
    query, key, value = mixer._project(x)
    features = 1 + 3 + 6
    zero_keys = LinearState(
        jnp.zeros((2, 2, features, 4)), jnp.zeros((2, 2, features)).at[..., 0].set(PREFIX)
    )
    y, _ = linear_attention(
        query, key, value, feature_map="taylor", normalize=True, state=zero_keys
    )
    wanted = mixer.out(y.reshape(2, LEN, -1))
    np.testing.assert_allclose(mixer(x, whole_rows(x))[0], wanted, atol=ROUNDING)


def test_padding_counts_for_nothing_unless_its_keys_are_asked_for():
    lengths = np.array([LEN, LEN - 2])
    x = draw()
    # On the left, as the authors pad: documents begin later, positions do not.
    info = whole_rows(x)._replace(valid=jnp.arange(LEN) >= LEN - lengths[:, None])
    plain, theirs = (
        build(JRTConfig(enc_length=PREFIX, padding_as_zero_keys=flag, **SIZES))
        for flag in (False, True)
    )
    rubbish = jnp.where(info.valid[..., None], x, 7.0)
    y = plain(x, info)[0]
    np.testing.assert_array_equal(plain(rubbish, info)[0][info.valid], y[info.valid])
    np.testing.assert_array_equal(theirs(x, info)[0][0], y[0])
    assert np.abs(theirs(x, info)[0][1] - y[1])[2:].max() > 1e-3


@pytest.fixture(scope="module")
def model():
    config = BasedModelConfig(
        num_layers=2, width=16, num_heads=2, feature_dim=4, pattern=("prefix", "conv"), enc_length=9
    )
    return config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))


def test_a_model_says_that_it_sees_its_prefix(model):
    assert (model.causal, model.decodes, model.prefix_length) == (False, True, 9)
    with pytest.raises(ValueError, match="enc_length: got -1, expected at least 0"):
        build(JRTConfig(enc_length=-1, **SIZES))


def test_generation_reads_a_prefix_in_one_piece(model, monkeypatch):
    """Prompts are read in pieces of 4, which would cut a prefix of 9."""
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 4)
    monkeypatch.setattr(generation, "SHORTEST_CHUNK", 4)
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.4, p.shape), p.dtype), params)
    redrawn = nnx.merge(graphdef, params)
    prompt = rng.integers(0, VOCAB, 11).tolist()
    new = generate(redrawn, [prompt], max_new_tokens=6).completions[0].tokens
    row = jnp.asarray([prompt + new])
    logits = redrawn.logits(redrawn(row, whole_rows(row)).hidden)[0]
    assert np.argmax(logits[10:-1], axis=-1).tolist() == new


def test_a_model_that_sees_later_tokens_is_refused_generation():
    config = NATConfig(axes=(2, 2), channels=1, depths=(1,), head_dim=8, stem_strides=(1,))
    nat = config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model: got NAT with decodes=False, expected one that"):
        generate(nat, [[1]], max_new_tokens=1)


def test_a_prompt_read_twice():
    assert read_twice([1, 2, 3], [9]) == [1, 2, 3, 9, 1, 2, 3, 9]
    with pytest.raises(ValueError, match="times: got 0"):
        read_twice([1], [2], times=0)
