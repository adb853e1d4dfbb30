"""Evaluation: every target once, the same figures for any batch size and placement."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import Batch, TokenInfo
from effattn.evaluate import evaluate
from effattn.models.transformer import TransformerConfig
from effattn.parallel.mesh import MeshConfig, batch_sharding

VOCAB, ROWS, SEQ_LEN = 40, 13, 12


class Rows:
    """A split of ROWS random rows, some targets without weight."""

    vocab_size = VOCAB

    def __init__(self, num_bytes=None, weight=1.0, place=lambda batch: batch):
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(0, VOCAB, (ROWS, SEQ_LEN)).astype(np.int32)
        self.targets = rng.integers(0, VOCAB, (ROWS, SEQ_LEN)).astype(np.int32)
        self.weights = (rng.random((ROWS, SEQ_LEN)) < 0.7).astype(np.float32) * weight
        self._num_bytes, self._place = num_bytes, place

    def num_bytes(self, split):
        return self._num_bytes

    def evaluation_batches(self, split, batch_size=None):
        size = 4 if batch_size is None else batch_size
        for first in range(0, ROWS, size):
            rows = np.arange(first, first + size)
            there = (rows < ROWS)[:, None]
            rows = np.minimum(rows, ROWS - 1)
            positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), (size, SEQ_LEN))
            valid = np.broadcast_to(there, (size, SEQ_LEN))
            info = TokenInfo(positions, valid.astype(np.int32), valid)
            weights = self.weights[rows] * there
            yield self._place(Batch(self.tokens[rows], self.targets[rows], weights, info))


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(num_layers=1, width=16, num_heads=2)
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), params)
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module")
def by_hand(model):
    """(loss, accuracy, tokens) from all logits at once, in float64."""
    split = Rows()
    (batch,) = split.evaluation_batches("validation", ROWS)
    logits = np.asarray(jax.jit(lambda m, b: m.logits(m(b.tokens, b.info).hidden))(model, batch))
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, split.targets[..., None], -1)[..., 0]
    right = logits.argmax(-1) == split.targets
    weight = split.weights.sum()
    return (nats * split.weights).sum() / weight, (right * split.weights).sum() / weight, weight


@pytest.mark.parametrize("batch_size", [1, 4, 13, 16])
def test_any_batch_size_gives_the_figures_computed_by_hand(model, by_hand, batch_size):
    result = evaluate(model, Rows(), batch_size=batch_size)
    assert result.loss == pytest.approx(by_hand[0], rel=1e-6)
    assert result.accuracy == pytest.approx(by_hand[1], rel=1e-9)
    assert result.tokens == by_hand[2] and result.bits_per_byte is None
    assert result.perplexity == pytest.approx(math.exp(by_hand[0]), rel=1e-6)


def test_the_same_call_gives_the_same_bits(model):
    assert evaluate(model, Rows()) == evaluate(model, Rows())


def test_small_tiles_of_logits_change_nothing(model, by_hand, monkeypatch):
    monkeypatch.setattr("effattn.evaluate.tile_length", lambda **_: 5)
    assert evaluate(model, Rows()).loss == pytest.approx(by_hand[0], rel=1e-6)


def test_a_mesh_changes_nothing(model, by_hand):
    mesh = MeshConfig(data=2, fsdp=2).build(jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = Rows(place=lambda batch: jax.device_put(batch, batch_sharding(mesh)))
        result = evaluate(model, split)
    assert result.loss == pytest.approx(by_hand[0], rel=1e-6)


def test_bits_per_byte_count_all_nats_over_the_bytes(model, by_hand):
    result = evaluate(model, Rows(num_bytes=50))
    assert result.bits_per_byte == pytest.approx(by_hand[0] * by_hand[2] / math.log(2) / 50)


def test_progress_counts_the_targets(model, by_hand):
    seen = []
    evaluate(model, Rows(), on_tokens=seen.append)
    assert len(seen) == 4 and seen == sorted(seen) and seen[-1] == by_hand[2]


def test_a_split_without_a_target_is_a_sentence(model):
    with pytest.raises(ValueError, match="'validation' holds no target"):
        evaluate(model, Rows(weight=0.0))


def test_a_loss_that_is_not_finite_is_not_averaged(model):
    graphdef, params = nnx.split(model)
    broken = nnx.merge(graphdef, jax.tree.map(lambda p: p * jnp.nan, params))
    with pytest.raises(FloatingPointError, match="row 0 of the validation split is not finite"):
        evaluate(broken, Rows())
