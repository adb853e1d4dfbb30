"""ACM and Duo-LLM: choices and their gradients, sparse forms, labels, budgets, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import whole_rows
from effattn.models.adaptive_width import AdaptiveWidthConfig
from effattn.nn.adaptive_mlp import (
    ACM,
    DuoMLP,
    budget_loss,
    choose,
    distillation_errors,
    gate_labels,
)
from effattn.nn.compact import CapacityConfig
from effattn.train.flops import forward_flops

WIDTH = 8
OPTIONS: dict[str, Any] = {"dtype": jnp.float32, "init_std": 0.5}
SMALL = {"num_layers": 2, "width": 16, "num_heads": 2}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def acm(**options: Any) -> ACM:
    made = ACM(WIDTH, learner_width=3, **{**OPTIONS, **options}, rngs=nnx.Rngs(0))
    made.bias[...] = draw(made.learners + 1, WIDTH, seed=1)
    return made


def duo(**options: Any) -> DuoMLP:
    return DuoMLP(WIDTH, mlp_width=12, small_width=3, **{**OPTIONS, **options}, rngs=nnx.Rngs(0))


def test_a_choice_is_hard_and_has_the_gradient_of_the_softmax():
    logits, cotangent = draw(5, 4), draw(5, 4, seed=1)
    weights = choose(logits, key=None, temperature=2.0)
    np.testing.assert_array_equal(weights, jax.nn.one_hot(jnp.argmax(logits, -1), 4))
    got = jax.grad(lambda x: jnp.sum(choose(x, key=None, temperature=2.0) * cotangent))(logits)
    want = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x / 2.0) * cotangent))(logits)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_with_a_key_choices_are_drawn_from_the_softmax():
    logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
    weights = choose(jnp.tile(logits, (20000, 1)), key=jax.random.key(0))
    # The standard deviation of a share of 20000 draws is below 0.0036.
    np.testing.assert_allclose(weights.mean(0), [0.1, 0.6, 0.3], atol=0.015)


def test_acm_gives_the_prefix_that_it_chooses_and_says_what_it_cost():
    module, x = acm(learners=3), draw(2, 7, WIDTH)
    y, share = module(x)
    choice = jnp.argmax(module.gate_logits(x), axis=-1)
    wanted = jnp.take_along_axis(module.prefix_sums(x), choice[..., None, None], axis=-2)
    np.testing.assert_allclose(y, wanted[..., 0, :], rtol=0, atol=1e-5)
    np.testing.assert_allclose(share, choice / 3, rtol=1e-6)
    assert len(np.unique(choice)) > 1


@pytest.mark.parametrize("make", [acm, duo])
def test_the_sparse_form_equals_the_masked_one(make):
    x = draw(3, 16, WIDTH)
    info = whole_rows(x, np.array([16, 9, 0]))
    masked, cost = jax.jit(lambda: make()(x, info))()
    capacity = CapacityConfig(mode="bucket").build()
    sparse, same_cost = jax.jit(lambda: make(capacity=capacity)(x, info))()
    seen = np.asarray(info.valid)
    np.testing.assert_allclose(sparse[seen], masked[seen], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cost, same_cost)
    assert len(np.unique(np.asarray(cost)[seen])) > 1


def test_a_trained_call_reaches_the_gate_even_of_a_sparse_module():
    graphdef, params = nnx.split(acm(capacity=CapacityConfig(mode="bucket").build()))
    x = draw(2, 5, WIDTH)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(x, whole_rows(x), key=jax.random.key(0))[0] ** 2)

    assert np.any(nnx.to_pure_dict(gradient(params))["gate"]["kernel"])


def test_distillation_teaches_every_prefix():
    module, x, teacher = acm(learners=2), draw(5, WIDTH), draw(5, WIDTH, seed=2)
    errors = distillation_errors(module, x, teacher)
    assert errors.shape == (5, 3)
    whole, _ = module(x)  # of one prefix per token
    choice = jnp.argmax(module.gate_logits(x), axis=-1)
    np.testing.assert_allclose(
        errors[np.arange(5), choice], jnp.mean((whole - teacher) ** 2, axis=-1), rtol=1e-5
    )


def test_labels_stop_where_one_learner_more_helps_little():
    errors = jnp.array(
        [
            [8.0, 4.0, 3.9, 1.0],  # the second learner helps little: one is enough
            [8.0, 7.9, 2.0, 1.0],  # the first already: still one, "1 + 0"
            [8.0, 4.0, 2.0, 1.0],  # all of them help
            [0.0, 0.0, 0.0, 0.0],  # nothing is left to help with: never small
        ]
    )
    np.testing.assert_array_equal(gate_labels(errors, 1.2), [2, 1, 3, 3])
    with pytest.raises(ValueError, match="factor: got 1.0, expected more than 1"):
        gate_labels(errors, 1.0)


def test_the_budget_is_one_number_for_batch_and_layers():
    cost = jnp.array([[[1.0, 0.5, 9.0]], [[0.0, 0.0, 9.0]]])  # two layers; the last is padding
    total, weight = budget_loss(cost, 0.5, jnp.array([[True, True, False]]))
    assert weight == 2 and total / weight == pytest.approx(abs(1.5 / 4 - 0.5))


def test_duo_takes_the_module_of_the_choice():
    module, x = duo(), draw(2, 3, WIDTH)
    choice = jnp.array([[0, 1, 2], [2, 1, 0]])
    y, cost = module(x, choice=choice)
    for number, wanted in enumerate([jnp.zeros_like(x), module.small(x), module.big(x)]):
        at = np.asarray(choice == number)
        np.testing.assert_allclose(y[at], wanted[at], rtol=1e-6)
    np.testing.assert_allclose(cost, jnp.array([0, 0.25, 1])[choice])


def test_random_routing_draws_evenly_in_training_and_takes_the_big_one_after():
    module, x = duo(routing="random"), draw(100, 60, WIDTH)
    _, cost = module(x, key=jax.random.key(0))
    shares = [np.mean(np.asarray(cost) == c) for c in module.costs]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    y, cost = module(x[0])
    np.testing.assert_allclose(y, module.big(x[0]), rtol=1e-6)
    assert np.all(cost == 1)


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["acm", "duo"])
def test_training_moves_the_share_to_the_budget(mlp):
    config = AdaptiveWidthConfig(**SMALL, mlp=mlp, mlp_width=24, budget=0.85, gate="linear")

    def make() -> Any:
        return config.build(vocab_size=11, rngs=nnx.Rngs(0))

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    tokens = np.random.default_rng(0).integers(0, 11, (4, 16), dtype=np.int32)
    info = whole_rows(tokens)

    def loss(params: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = nnx.merge(graphdef, params)(tokens, info, key=key)
        total, weight = out.losses["budget_loss"]
        return total / weight, out.metrics["mlp_share"]

    @jax.jit
    def train() -> jax.Array:
        def step(params: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            (_, share), gradient = jax.value_and_grad(loss, has_aux=True)(params, key)
            # Sign descent: the size of the gradient hangs on budget_weight.
            return jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), params, gradient), share

        params = nnx.to_pure_dict(nnx.state(make()))
        return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 40))[1]

    shares = train()
    assert abs(float(shares[-8:].mean()) - 0.85) < 0.1 < 0.85 - float(shares[:2].mean())


def test_a_sparse_model_computes_the_same():
    tokens = np.random.default_rng(0).integers(0, 11, (2, 16), dtype=np.int32)

    def logits(sparse: bool) -> jax.Array:
        config = AdaptiveWidthConfig(
            **SMALL, mlp_width=24, sparse=sparse, initializer_range=0.3, gate="linear"
        )
        model = config.build(vocab_size=11, rngs=nnx.Rngs(0))
        return model.logits(model(tokens, whole_rows(tokens)).hidden)

    masked, sparse = jax.jit(lambda: (logits(False), logits(True)))()
    np.testing.assert_allclose(sparse, masked, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(masked))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "moe"}, "model.mlp: got 'moe', expected one of acm, duo"),
        ({"learners": 0}, "model.learners: got 0"),
        ({"learners": 5}, "model.mlp_width: got 64, expected a multiple of model.learners=5"),
        ({"gate": "conv"}, "gate: got 'conv'"),
        ({"mlp": "duo", "routing": "all"}, "routing: got 'all', expected one of learned, random"),
        ({"mlp": "duo", "small_width": 99}, "mlp_width: got 64, expected at least 99"),
        ({"sparse": True, "capacity": CapacityConfig(mode="error")}, "capacity.mode: got 'error'"),
        ({"budget": 1.5}, "model.budget: got 1.5, expected a share from 0 to 1"),
    ],
)
def test_bad_config(options, message):
    config = AdaptiveWidthConfig(**SMALL, **options)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: config.build(vocab_size=29, rngs=nnx.Rngs(0)))


def test_flops_follow_the_budget():
    def count(budget: float) -> float:
        config = AdaptiveWidthConfig(**SMALL, mlp_width=24, budget=budget)
        return forward_flops(config, vocab_size=11, seq_len=5)

    assert count(1.0) - count(0.25) == pytest.approx(2 * 0.75 * 2 * 2 * 16 * 24)
