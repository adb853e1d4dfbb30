"""Halting: the distribution over depths, its losses, early exits, easy rows and hard ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn.batch import whole_rows
from effattn.models.halting import (
    HaltingClassifier,
    HaltingConfig,
    log_exit,
    log_geometric,
    log_survival,
    ponder_loss,
    q_exit,
)

SMALL: dict[str, Any] = {
    "max_depth": 6,
    "width": 16,
    "embedding_width": 8,
    "num_heads": 2,
    "mlp_width": 32,
    "halting_width": 8,
    "initializer_range": 0.3,
    "norm_eps": 1e-6,
}


def build(**options: Any) -> HaltingClassifier:
    config = HaltingConfig(**{**SMALL, **options})
    return config.build(vocab_size=11, num_classes=3, rngs=nnx.Rngs(0))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# ---- the distribution over depths


def test_depths_are_distributed_as_the_papers_say():
    halts = draw(4, 3)
    stops = np.float64(jax.nn.sigmoid(halts))
    stops[-1] = 1
    alive = np.cumprod(1 - stops, axis=0)
    p = stops * np.concatenate([np.ones((1, 3)), alive[:-1]])
    np.testing.assert_allclose(np.exp(log_exit(halts)), p, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_exit(halts)).sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_survival(halts)), alive, rtol=1e-5, atol=1e-12)
    for threshold in (0.2, 0.5, 0.9):
        wanted = np.argmax(np.cumsum(p, axis=0) > threshold, axis=0)
        np.testing.assert_array_equal(q_exit(halts, threshold), wanted)


def test_certain_logits_give_finite_losses():
    halts = jnp.array([[200.0, -200.0], [200.0, -200.0], [0.0, 0.0]])
    for divergence in ("p_prior", "prior_p"):
        options = {"prior": 0.1, "beta": 0.5, "divergence": divergence}
        value, gradient = jax.value_and_grad(
            lambda h, o=options: ponder_loss(jnp.ones((3, 2)), h, **o).total
        )(halts)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_loss_is_expected_loss_and_a_divergence_either_way():
    losses, halts = jnp.abs(draw(4, 5)), draw(4, 5, seed=1)
    p, prior = np.exp(np.float64(log_exit(halts))), 0.9 ** np.arange(4)[:, None]
    prior = prior / prior.sum()
    for divergence, apart in (
        ("p_prior", (p * np.log(p / prior)).sum(0)),
        ("prior_p", (prior * np.log(prior / p)).sum(0)),
    ):
        out = ponder_loss(losses, halts, prior=0.1, beta=0.5, divergence=divergence)
        np.testing.assert_allclose(out.divergence, apart.mean(), rtol=1e-5)
        np.testing.assert_allclose(out.expected, (p * np.float64(losses)).sum(0).mean(), rtol=1e-5)
        np.testing.assert_allclose(out.total, out.expected + 0.5 * out.divergence, rtol=1e-6)
        np.testing.assert_allclose(out.depth, (p.T @ np.arange(1, 5)).mean(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_geometric(4, 0.1)), prior[:, 0], rtol=1e-6)


# ---- leaving early


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_an_early_exit_says_what_the_full_depth_says_there(threshold):
    tokens = np.random.default_rng(0).integers(0, 11, (16, 9), dtype=np.int32)
    info = whole_rows(tokens, np.random.default_rng(1).integers(1, 10, 16))

    @jax.jit
    def run() -> Any:
        model = build(threshold=threshold)
        return model(tokens, info), model.classify(tokens, info)

    every, early = run()
    at = q_exit(every.halts, threshold)
    np.testing.assert_array_equal(early.depth, at + 1)
    assert len(np.unique(early.depth)) > 1 and early.steps == np.max(early.depth)
    # The same arithmetic, in a loop and in a scan.
    np.testing.assert_allclose(early.logits, every.logits[at, np.arange(16)], rtol=0, atol=1e-5)


def test_sampled_exits_follow_their_probabilities():
    tokens = np.zeros((2000, 2), np.int32)  # rows all alike, which draw apart
    info = whole_rows(tokens)

    @jax.jit
    def run() -> Any:
        model = build(max_depth=3)
        halts = model(tokens[:1], info._replace(**{n: getattr(info, n)[:1] for n in info._fields}))
        return jnp.exp(log_exit(halts.halts)), model.classify(tokens, info, key=jax.random.key(0))

    p, drawn = run()
    shares = np.bincount(np.asarray(drawn.depth), minlength=4)[1:] / 2000
    np.testing.assert_allclose(shares, p[:, 0], atol=0.04)  # 0.011 is the largest deviation


def test_padding_and_other_rows_change_nothing():
    tokens = np.random.default_rng(0).integers(0, 11, (4, 9), dtype=np.int32)
    lengths = np.array([9, 3, 5, 7])
    other = np.where(np.arange(9) < lengths[:, None], tokens, (tokens + 1) % 11)
    other[3] = 0

    @jax.jit
    def run() -> Any:
        model = build()
        return [model.classify(t, whole_rows(t, lengths)) for t in (tokens, other)]

    one, two = run()
    np.testing.assert_array_equal(one.depth[:3], two.depth[:3])
    np.testing.assert_allclose(one.logits[:3], two.logits[:3], rtol=0, atol=1e-6)


# ---- learning


def relay(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, distance): token 0 asks, one of the next four is the class, others blank.

    A layer that sees one neighbour to either side brings the answer one token nearer.
    """
    distance = rng.integers(1, 5, batch)
    labels = rng.integers(0, 2, batch)
    tokens = np.zeros((batch, 5), np.int32)
    tokens[:, 0] = 3
    tokens[np.arange(batch), distance] = 1 + labels
    return tokens, labels, distance


@pytest.mark.slow
def test_a_trained_model_leaves_easy_rows_earlier():
    config = HaltingConfig(
        **{**SMALL, "initializer_range": 0.1, "max_depth": 6}, window=1, prior=0.4, beta=0.02
    )

    def make() -> HaltingClassifier:
        return config.build(vocab_size=4, num_classes=2, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    batches = jax.tree.map(lambda *a: np.stack(a), *[relay(rng, 32) for _ in range(600)])
    schedule = optax.cosine_decay_schedule(5e-3, 600)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def train() -> tuple[Any, Any]:
        def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            tokens, labels, _ = batch

            def loss(params: Any) -> jax.Array:
                model = nnx.merge(graphdef, params)
                return model.losses(tokens, whole_rows(tokens), labels).total

            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        params = nnx.to_pure_dict(nnx.state(make()))
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)

    (params, _), _ = train()
    tokens, labels, distance = relay(rng, 256)
    out = jax.jit(lambda p: nnx.merge(graphdef, p).classify(tokens, whole_rows(tokens)))(params)
    accuracy = np.mean(np.argmax(out.logits, axis=-1) == labels)
    depths = [float(np.mean(out.depth[distance == d])) for d in range(1, 5)]
    assert accuracy > 0.95
    assert depths[0] + 1 < depths[3] and depths == sorted(depths)


# ---- configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": 0}, "model.max_depth: got 0"),
        ({"divergence": "kl"}, "model.divergence: got 'kl', expected one of p_prior, prior_p"),
        ({"prior": 0.0}, r"model.prior: got 0.0, expected a probability in \(0, 1\)"),
        ({"threshold": 1.0}, "model.threshold: got 1.0"),
        ({"num_heads": 3}, "model.width: got 16, expected a multiple of model.num_heads=3"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**options))
