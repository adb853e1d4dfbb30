"""The tiled cross entropy against the plain one, in value, gradients and memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.train.loss import MAX_LOGITS, cross_entropy, tile_length


class Model(NamedTuple):
    """What the loss asks of a model."""

    head: jax.Array

    def logits(self, hidden):
        return (hidden @ self.head).astype(hidden.dtype)


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 13, 8))
    head = jax.random.normal(keys[1], (8, 11))
    targets = jax.random.randint(keys[2], (3, 13), 0, 11)
    weights = jax.random.uniform(keys[3], (3, 13)).at[1].set(0.0)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights):
    logits = hidden @ head
    log_probs = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    z = jax.nn.logsumexp(logits, -1) ** 2
    correct = logits.argmax(-1) == targets
    return tuple(jnp.sum(x * weights) for x in (losses, jnp.ones_like(losses), correct, z))


@pytest.mark.parametrize("tile", [None, 1, 4, 13, 50])
def test_tiles_change_nothing(case, tile):
    hidden, head, targets, weights = case

    def tiled(hidden, head):
        return cross_entropy(Model(head), hidden, targets, weights, tile=tile)

    def total(function):
        return jax.grad(lambda h, w: function(h, w)[0] + 0.1 * function(h, w)[3], argnums=(0, 1))

    np.testing.assert_allclose(
        tiled(hidden, head), plain(hidden, head, targets, weights), rtol=1e-5
    )
    grads = total(tiled)(hidden, head)
    wanted = total(lambda h, w: plain(h, w, targets, weights))(hidden, head)
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_gradient_holds_one_tile_of_logits_at_a_time():
    seq_len, vocab = 512, 2048
    hidden = jnp.zeros((1, seq_len, 16))
    head = jnp.zeros((16, vocab))
    targets = jnp.zeros((1, seq_len), jnp.int32)

    def peak(tile):
        def loss(hidden, head):
            weights = jnp.ones((1, seq_len))
            return cross_entropy(Model(head), hidden, targets, weights, tile=tile).loss

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = seq_len * vocab * 4
    assert peak(None) >= logits
    assert peak(32) < logits / 4


def test_small_vocabularies_take_one_tile_and_large_ones_are_bounded():
    assert tile_length(batch=8, seq_len=256, vocab_size=264) == 256
    assert tile_length(batch=8, seq_len=2048, vocab_size=50_000) == 128
    assert tile_length(batch=4096, seq_len=64, vocab_size=50_000) == 1
    # Four devices hold a quarter of the rows each.
    assert tile_length(batch=8, seq_len=2048, vocab_size=50_000, shards=4) == 512
    assert 8 * tile_length(batch=8, seq_len=10**6, vocab_size=264) * 264 <= MAX_LOGITS


def test_low_precision_logits_are_summed_in_float32(case):
    hidden, head, targets, weights = case
    sums = cross_entropy(Model(head), hidden.astype(jnp.bfloat16), targets, weights)
    assert all(x.dtype == jnp.float32 for x in sums)
    np.testing.assert_allclose(sums.loss, plain(hidden, head, targets, weights)[0], rtol=2e-2)


def test_float64_stays_float64(case):
    with jax.enable_x64(True):
        hidden, head, targets, weights = (jnp.asarray(np.asarray(x)) for x in case)
        sums = cross_entropy(
            Model(head),
            hidden.astype(jnp.float64),
            targets,
            weights,
            tile=4,
        )
        assert sums.loss.dtype == jnp.float64
