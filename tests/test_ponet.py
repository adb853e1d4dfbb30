"""PoNet's poolings: limits of the paper, segments by count and by boundaries, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.mixers.ponet import PoNetConfig, local_max, segment_index, segment_max

ROUNDING = 1e-5  # float32 sums of numbers around 1 in another order

LEN, WIDTH = 12, 8


@pytest.fixture(scope="module")
def mixer():
    return PoNetConfig(num_heads=2, num_segments=3, init_std=0.5).build(WIDTH, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def run(mixer):
    return jax.jit(lambda x, info, boundaries=None: mixer(x, info, boundaries=boundaries)[0])


def draw(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, LEN, WIDTH)).astype(np.float32)


def test_one_segment_is_the_maximum_of_the_document():
    x = draw()
    info = whole_rows(x, np.array([LEN, 7]))
    got = segment_max(x, segment_index(info, 1), info)
    for row, length in enumerate((LEN, 7)):
        wanted = np.broadcast_to(x[row, :length].max(0), (length, WIDTH))
        np.testing.assert_array_equal(got[row, :length], wanted)
        assert not np.any(got[row, length:])


def test_the_outputs_of_equal_tokens_are_equal(run):
    x = np.broadcast_to(draw()[:, :1], (2, LEN, WIDTH))
    y = np.asarray(run(x, whole_rows(x)))
    np.testing.assert_allclose(y, np.broadcast_to(y[:, :1], y.shape), atol=ROUNDING)


def test_the_order_within_a_segment_matters_to_the_local_maximum_only(mixer):
    x = draw()
    info = whole_rows(x)
    swapped = x[:, [1, 0, *range(2, LEN)]]  # segments have 5 tokens

    def without_local(x):
        still = nnx.merge(*nnx.split(mixer))
        still.local = lambda x: jnp.zeros_like(x)
        return still(x, info)[0]

    before, after = without_local(x), without_local(swapped)
    np.testing.assert_allclose(after[:, [1, 0, *range(2, LEN)]], before, atol=ROUNDING)
    assert np.abs(mixer(x, info)[0] - mixer(swapped, info)[0])[:, 2].max() > 1e-3


def test_a_window_ends_at_the_row_and_at_the_document():
    x = np.arange(LEN, dtype=np.float32)[None, :, None] * np.float32([1, -1])
    ids = np.repeat([[1, 2]], [5, LEN - 5], axis=1).astype(np.int32)
    info = TokenInfo(np.arange(LEN)[None] % 5, ids, np.ones((1, LEN), bool))
    got = np.asarray(local_max(x, 5, info))[0]
    for t in range(LEN):
        around = [j for j in range(t - 2, t + 3) if 0 <= j < LEN and ids[0, j] == ids[0, t]]
        assert tuple(got[t]) == (max(around), -min(around))


def test_boundaries_are_segments_of_their_own_and_no_part_of_any_pooling(run):
    x = draw()
    info = whole_rows(x)
    ends = np.zeros((2, LEN), bool)
    ends[:, [0, 4, 11]] = True
    index = segment_index(info, 3, ends)
    assert np.asarray(index[0]).tolist() == [1, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4, 5]
    pooled = np.asarray(segment_max(x, index, info, ends))
    np.testing.assert_array_equal(pooled[:, 1:4], x[:, 1:4].max(1, keepdims=True).repeat(3, 1))
    np.testing.assert_array_equal(pooled[:, 5:11], x[:, 5:11].max(1, keepdims=True).repeat(6, 1))
    near = np.asarray(local_max(x, 3, info, ends))
    np.testing.assert_array_equal(near[:, 5], x[:, 5:7].max(1))  # without the boundary before it
    assert not np.any(pooled[ends]) and not np.any(near[ends])
    assert np.abs(run(x, info, ends) - run(x, info)).max() > 1e-3


def test_padded_inputs_get_no_gradient_and_change_nothing(run):
    x = draw()
    info = whole_rows(x, np.array([LEN - 3, 0]))

    def loss(x):
        return jnp.sum(jnp.where(info.valid[..., None], jnp.tanh(run(x, info)), 0))

    gradient = np.asarray(jax.grad(loss)(x))
    assert not np.any(gradient[0, LEN - 3 :]) and not np.any(gradient[1])
    assert np.all(np.isfinite(gradient)) and np.any(gradient[0])
    rubbish = np.where(np.asarray(info.valid)[..., None], x, 1e6).astype(np.float32)
    np.testing.assert_array_equal(run(rubbish, info)[0, : LEN - 3], run(x, info)[0, : LEN - 3])


def test_it_refuses_to_decode_and_an_even_window(mixer):
    x = draw()
    with pytest.raises(ValueError, match="mixer: got PoNet with causal=False, but decoding wants"):
        mixer.init_state(2, LEN, jnp.float32)
    with pytest.raises(ValueError, match="causal=False"):
        mixer.prefill(x, whole_rows(x), None)
    with pytest.raises(ValueError, match="window: got 4, expected an odd number"):
        PoNetConfig(window=4).build(WIDTH, rngs=nnx.Rngs(0))
