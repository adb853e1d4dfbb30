"""The jitted step: accumulation, extra losses, precision, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn.batch import Batch, whole_rows
from effattn.nn.mixer import Output
from effattn.train.state import TrainState
from effattn.train.step import make_train_step

VOCAB, WIDTH, BATCH, SEQ_LEN = 11, 8, 4, 6


class Tiny(nnx.Module):
    """Embeds, perturbs with its key, and carries an extra loss with a weight of its own."""

    def __init__(self, rngs, *, noise=0.0, extra_loss=False, dtype=jnp.float32):
        with nnx.use_eager_sharding(False):
            self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, WIDTH)))
        self.noise, self.extra_loss, self.dtype = noise, extra_loss, dtype

    def __call__(self, tokens, info, *, key=None, extra=None):
        hidden = jnp.tanh(self.table[...][tokens]).astype(self.dtype)
        if self.noise:
            hidden += self.noise * jax.random.normal(key, hidden.shape)
        losses = {}
        if self.extra_loss:
            # Of odd tokens only: its weight has nothing to do with the loss weights.
            odd = (tokens % 2).astype(jnp.float32)
            losses["odd"] = (jnp.sum(odd[..., None] * hidden**2), jnp.sum(odd))
        extra = None if extra is None else extra + jnp.sum(tokens)
        return Output(hidden, losses, {"mean": hidden.mean()}, extra)

    def logits(self, hidden):
        return (hidden @ self.table[...].T.astype(self.dtype)).astype(jnp.float32)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, VOCAB, (2, BATCH, SEQ_LEN)).astype(np.int32)
    # Rows of very unequal weight, one of them padding: averaging means would show.
    weights = rng.random((BATCH, SEQ_LEN)).astype(np.float32)
    weights[1] = 0
    weights[2, 1:] = 0
    return Batch(tokens, targets, weights, whole_rows(tokens))


def run(batch, *, steps=1, accumulation=1, extra=None, **options):
    model = {k: options.pop(k) for k in ("noise", "extra_loss", "dtype") if k in options}
    graphdef, params = nnx.split(Tiny(nnx.Rngs(0), **model))
    params = nnx.to_pure_dict(params)
    optimizer = optax.sgd(0.5)
    step = make_train_step(graphdef, optimizer, lambda s: 0.5, accumulation=accumulation, **options)
    state = TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), extra, jax.random.key(7)
    )
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append(jax.tree.map(float, metrics))
    return state, history


@pytest.mark.parametrize("options", [{}, {"extra_loss": True}, {"z_loss": 0.1}, {"tile": 2}])
def test_microbatches_add_up_to_the_batch(batch, options):
    whole, (want,) = run(batch, **options)
    for accumulation in (2, 4):
        parts, (got,) = run(batch, accumulation=accumulation, **options)
        assert got == pytest.approx(want, rel=1e-5)
        np.testing.assert_allclose(
            parts.params["table"], whole.params["table"], rtol=1e-5, atol=1e-6
        )


def test_loss_is_the_weighted_mean_and_extra_losses_have_their_own(batch):
    _, (plain,) = run(batch)
    _, (with_extra,) = run(batch, extra_loss=True)
    table = Tiny(nnx.Rngs(0)).table[...]
    hidden = jnp.tanh(table[batch.tokens])
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, batch.targets)
    want = jnp.sum(losses * batch.loss_weights) / batch.loss_weights.sum()
    odd = batch.tokens % 2 == 1
    assert plain["loss"] == pytest.approx(float(want), rel=1e-5)
    assert with_extra["loss"] == pytest.approx(float(want), rel=1e-5)
    assert with_extra["odd"] == pytest.approx(float((hidden[odd] ** 2).sum() / odd.sum()), rel=1e-5)
    assert with_extra["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)
    assert plain["learning_rate"] == 0.5


def test_z_loss_is_reported_beside_the_loss_and_pulls_the_normaliser_down(batch):
    _, plain = run(batch, steps=20)
    _, pulled = run(batch, steps=20, z_loss=0.3)
    assert pulled[0]["loss"] == plain[0]["loss"]
    assert pulled[-1]["z_loss"] < 0.5 * pulled[0]["z_loss"]


def test_low_precision_compute_keeps_float32_parameters(batch):
    state, (metrics,) = run(batch, dtype=jnp.bfloat16)
    exact, (want,) = run(batch)
    assert state.params["table"].dtype == jnp.float32
    assert metrics["loss"] == pytest.approx(want["loss"], rel=2e-2)
    np.testing.assert_allclose(state.params["table"], exact.params["table"], atol=2e-2)


def test_every_step_and_microbatch_draws_anew_and_a_repeat_draws_the_same(batch):
    """With a learning rate of nothing, only the noise differs between steps."""
    _, first = run(batch, steps=2, noise=0.5)
    _, again = run(batch, steps=2, noise=0.5)
    assert first == again
    assert first[0]["mean"] != first[1]["mean"]
    same_rows = jax.tree.map(lambda x: np.repeat(x[:1], BATCH, 0), batch)
    _, (one,) = run(same_rows, noise=0.5)
    _, (four,) = run(same_rows, noise=0.5, accumulation=4)
    assert one["loss"] != four["loss"]


def test_untrained_state_passes_from_microbatch_to_microbatch_and_step_to_step(batch):
    state, _ = run(batch, steps=2, accumulation=2, extra=jnp.zeros((), jnp.int32))
    assert state.extra == 2 * batch.tokens.sum()


def test_a_batch_of_padding_alone_changes_nothing(batch):
    empty = batch._replace(loss_weights=np.zeros_like(batch.loss_weights))
    state, (metrics,) = run(empty)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
    np.testing.assert_array_equal(state.params["table"], Tiny(nnx.Rngs(0)).table[...])
