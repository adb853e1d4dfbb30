"""TokenFormer: published sizes, growth with and without a change of the function, errors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from flax import nnx

from effattn.batch import whole_rows
from effattn.models.tokenformer import TokenFormerConfig, grow
from effattn.nn.pattention import NORMALISATIONS, Pattention
from effattn.train.flops import forward_flops

SMALL = {"num_layers": 2, "width": 32, "num_heads": 4, "mlp_slots": 48}


def parameters(vocab_size: int, **options: Any) -> int:
    config = TokenFormerConfig(**options)
    model = nnx.eval_shape(lambda: config.build(vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))))


@pytest.mark.parametrize(
    ("layers", "width", "heads", "millions"),
    [(12, 768, 12, 150), (24, 1024, 16, 450), (32, 1280, 16, 900), (40, 1536, 16, 1500)],
)
def test_published_sizes(layers, width, heads, millions):
    """150M, 450M, 900M and 1.5B of the paper, with the vocabulary of its data (50304)."""
    count = parameters(50304, num_layers=layers, width=width, num_heads=heads)
    # Keys and values of 8 width slots, a tied embedding, a final norm; nothing else.
    assert count == layers * 2 * width * 8 * width + 50304 * width + 2 * width
    assert count == pytest.approx(millions * 1e6, rel=0.06)  # a name, rounded: 1.5B has 1.59


@pytest.mark.parametrize(
    ("attention_slots", "mlp_slots", "millions"), [(768, 3072, 354), (1792, 7168, 757)]
)
def test_published_growth(attention_slots, mlp_slots, millions):
    """The paper's growth from 354M to 757M parameters, 24 layers of width 1024."""
    slots = {"attention_slots": attention_slots, "mlp_slots": mlp_slots}
    count = parameters(50304, num_layers=24, width=1024, num_heads=16, **slots)
    assert count == pytest.approx(millions * 1e6, rel=0.002)


def logits(config: TokenFormerConfig, params: Any, tokens: np.ndarray) -> jax.Array:
    def make() -> Any:
        return config.build(vocab_size=29, rngs=nnx.Rngs(0))

    model = nnx.merge(nnx.graphdef(nnx.eval_shape(make)), params)
    return model.logits(model(tokens, whole_rows(tokens)).hidden)


@functools.cache
def grown(normalisation: str, tau: str) -> tuple[jax.Array, jax.Array, Any, Any]:
    """(logits before, logits after, gradient after, parameters before) of a small model."""
    config = TokenFormerConfig(**SMALL, normalisation=normalisation, tau=tau)
    tokens = np.random.default_rng(0).integers(0, 29, (2, 9), dtype=np.int32)

    @jax.jit
    def everything() -> Any:
        params = nnx.to_pure_dict(nnx.state(config.build(vocab_size=29, rngs=nnx.Rngs(0))))
        # Larger than at the start of training, where every layer's output is next to nothing.
        params = jax.tree.map(lambda x: 5 * x, params)
        more = {"attention_slots": 40, "mlp_slots": 100, "key": jax.random.key(0)}
        larger, wide = grow(config, params, **more)
        assert larger.base_mlp_slots == 48 and larger.slots() == (40, 100)
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(logits(larger, p, tokens))))(wide)
        return logits(config, params, tokens), logits(larger, wide, tokens), gradient, params

    return everything()


@pytest.mark.parametrize("normalisation", thinned(["l2_norm_gelu", "gelu_l2_norm"]))
def test_growth_with_a_fixed_scale_keeps_the_function_and_trains_on(normalisation):
    before, after, gradient, params = grown(normalisation, "fixed")
    # Sums over more slots, in another order.
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(before))))
    for block, old in zip(gradient["stack"]["blocks"].values(), [32] * 4, strict=False):
        new_keys = block["mixer"]["query"]["slot_keys"][..., old:, :]
        assert np.all(np.any(np.asarray(new_keys), axis=-1)), "a new key without a gradient"
    assert params["stack"]["blocks"][0]["mlp"]["slot_keys"].shape[-2] == 48


@pytest.mark.parametrize(
    ("normalisation", "tau"),
    thinned(
        [("l2_norm_gelu", "sqrt_slots"), ("gelu_l2_norm", "sqrt_slots"), ("softmax", "fixed")], 3
    ),
)
def test_growth_otherwise_changes_the_function(normalisation, tau):
    before, after, _, _ = grown(normalisation, tau)
    assert float(jnp.max(jnp.abs(after - before))) > 1e-2 * float(jnp.max(jnp.abs(before)))


def layer(slots: int, normalisation: str, **options: Any) -> Pattention:
    options = {"dtype": jnp.float32, "rngs": nnx.Rngs(0), **options}
    return Pattention(6, 5, slots, normalisation=normalisation, **options)


def test_zero_slots_scale_gelu_l2_norm_by_the_root_of_the_growth():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    small, large = (layer(n, "gelu_l2_norm", tau="sqrt_slots") for n in (8, 18))
    for name in ("slot_keys", "slot_values"):
        rows = getattr(small, name)[...]
        getattr(large, name)[...] = jnp.pad(rows, ((0, 10), (0, 0)))
    np.testing.assert_allclose(large(x), small(x) * 1.5, rtol=1e-5)  # sqrt(18 / 8)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_keys_of_zero_give_finite_values_and_gradients(normalisation):
    made = layer(8, normalisation)
    made.slot_keys[...] = jnp.zeros((8, 6))
    graphdef, params = nnx.split(made)
    value, gradient = jax.value_and_grad(lambda p: nnx.merge(graphdef, p)(jnp.ones((2, 6))).sum())(
        params
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, gradient)))


def test_a_layer_that_would_shrink_is_refused():
    config = TokenFormerConfig(**SMALL)
    params = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: config.build(vocab_size=29, rngs=nnx.Rngs(0))))
    )
    with pytest.raises(ValueError, match=r"mlp: got 47, expected at least 48"):
        jax.eval_shape(
            lambda p: grow(config, p, attention_slots=32, mlp_slots=47, key=jax.random.key(0))[1],
            params,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalisation": "l2"}, "normalisation: got 'l2'"),
        ({"tau": "sqrt"}, "tau: got 'sqrt', expected one of fixed, sqrt_slots"),
        ({"base_mlp_slots": 49}, "slots: got 48, expected at least 49"),
        ({"num_layers": 0}, "model.num_layers: got 0"),
        ({"num_heads": 5}, "model.width: got 32, expected a multiple of model.num_heads=5"),
        ({"rotary_fraction": 2.0}, "model.rotary_fraction: got 2.0"),
    ],
)
def test_bad_config(options, message):
    config = TokenFormerConfig(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: config.build(vocab_size=29, rngs=nnx.Rngs(0)))


def test_flops():
    """One layer of width 8, 4 slots four times and 16 once, 5 tokens, 11 words."""
    config = TokenFormerConfig(num_layers=1, width=8, num_heads=2, attention_slots=4, mlp_slots=16)
    slots = 2 * 2 * 8 * (4 * 4 + 16)  # scores and values
    pairs = 2 * 2 * 8 * 3  # of 3 visible keys on average
    assert forward_flops(config, vocab_size=11, seq_len=5) == slots + pairs + 2 * 8 * 11
