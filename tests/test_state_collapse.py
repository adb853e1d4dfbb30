"""The remedies against state collapse: what they compute, and that decoding has them too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import whole_rows
from effattn.nn.mixers.ssd import SSDConfig
from effattn.pallas_kernels.linear_attention import linear_attention
from scripts.state_collapse import SlidingSums

CONFIG = SSDConfig(head_dim=8, state_dim=4)


def built(**changes):
    with jax.enable_x64(True):
        return dataclasses.replace(CONFIG, **changes).build(16, dtype=jnp.float64, rngs=nnx.Rngs(0))


def test_sliding_sums_see_the_last_tokens_alone():
    """Against the explicit sum over pairs less than a window apart."""
    rng = np.random.default_rng(0)
    window, lead = 5, (2, 23)
    query, key = (rng.normal(size=(*lead, 1, 4)) for _ in range(2))
    value, log_decay = rng.normal(size=(*lead, 2, 3)), -rng.exponential(size=(*lead, 2))
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, (query, key, value))
        out, _ = SlidingSums(window=window).linear_attention(
            *arrays, log_decay=jnp.asarray(log_decay), segment_ids=None
        )
        whole, _ = linear_attention(*arrays, log_decay=jnp.asarray(log_decay))
    total = np.cumsum(log_decay, axis=1)
    distance = np.arange(lead[1])[:, None] - np.arange(lead[1])
    fade = np.exp(np.minimum(total[:, :, None] - total[:, None], 0))  # [b, t, s, h]
    fade = fade * ((distance >= 0) & (distance < window))[..., None]
    expected = np.einsum("btd,bsd,btsh,bshe->bthe", query[:, :, 0], key[:, :, 0], fade, value)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(out[:, :window], whole[:, :window], atol=1e-12)
    assert np.abs(out - whole).max() > 1e-3


def test_decay_scale_is_a_faster_rate_and_write_scale_a_smaller_value():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 16)))
        info = whole_rows(x)
        scaled = built(decay_scale=2.0)
        faster = built()
        faster.log_rate[...] = faster.log_rate[...] + np.float32(np.log(2))
        # The parameter is float32, and so is the rounding of its sum.
        np.testing.assert_allclose(scaled(x, info)[0], faster(x, info)[0], atol=1e-6)
        assert np.abs(scaled(x, info)[0] - built()(x, info)[0]).max() > 1e-4

        # The norm that follows takes a common factor out: half of the sums and of the skip.
        less = built(write_scale=0.5)
        less.skip[...] = 0.5 * less.skip[...]
        less.eps = built().eps / 4
        np.testing.assert_allclose(less(x, info)[0], built()(x, info)[0], atol=1e-12)


@pytest.mark.slow
def test_decoding_scales_as_the_full_pass_does():
    with jax.enable_x64(True):
        mixer = built(decay_scale=3.0, write_scale=0.7)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 16)))
        info = whole_rows(x)
        whole, _ = mixer(x, info)
        state = mixer.init_state(2, 9, jnp.float64)
        first = jax.tree.map(lambda field: field[:, :6], info)
        out, state = mixer.prefill(x[:, :6], first, state)
        outs = [*jnp.moveaxis(out, 1, 0)]
        for t in range(6, 9):
            now = jax.tree.map(lambda field, t=t: field[:, t], info)
            out, state = mixer.step(x[:, t], now, state)
            outs.append(out)
        np.testing.assert_allclose(jnp.stack(outs, 1), whole, atol=1e-12)


def test_a_negative_decay_scale_is_refused():
    with pytest.raises(ValueError, match="decay_scale: got -1.0, expected at least 0"):
        built(decay_scale=-1.0)
