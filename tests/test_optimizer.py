"""Parameter groups by name, and optimizers that treat stacked layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effattn.experiment import OPTIMIZERS, OptimizerConfig
from effattn.train.optimizer import (
    decay_mask,
    group,
    groups,
    make_optimizer,
    per_layer,
    state_shardings,
)

LAYERS = 3
# What one layer has, and what stands outside of the stack.
LAYER = {
    "up": ((4, 6), ("embed", "mlp")),
    "down": ((6, 4), ("mlp", "embed")),
    "conv": ((3, 4), (None, "conv")),
    "norm": ((4,), ("embed",)),
    "bias": ((6,), ("mlp",)),
}
OUTSIDE = {
    "embedding": ((8, 4), ("vocab", "embed")),
    "head": ((4, 8), ("embed", "vocab")),
    "final_norm": ((4,), ("embed",)),
}


def axes(stacked):
    if stacked:
        layers = {name: ("layers", *names) for name, (_, names) in LAYER.items()}
    else:
        layers = {i: {name: names for name, (_, names) in LAYER.items()} for i in range(LAYERS)}
    return {"layers": layers, **{name: names for name, (_, names) in OUTSIDE.items()}}


def draw(seed):
    """The same numbers stacked and unstacked; each layer at a scale of its own."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        return rng.standard_normal(shape).astype(np.float32)

    layers = {
        i: {name: 10**i * normal(shape) for name, (shape, _) in LAYER.items()}
        for i in range(LAYERS)
    }
    outside = {name: normal(shape) for name, (shape, _) in OUTSIDE.items()}
    stack = {name: np.stack([layers[i][name] for i in range(LAYERS)]) for name in LAYER}
    return {"layers": stack, **outside}, {"layers": layers, **outside}


def run(config, params, names, grads):
    """The parameters after one update per gradient."""
    optimizer = make_optimizer(config, names, lambda step: 0.01 / (step + 1))

    @jax.jit
    def whole(params, grads):
        state = optimizer.init(params)
        for grad in grads:
            updates, state = optimizer.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return jax.tree.map(np.asarray, whole(params, grads))


def config_of(name, **fields):
    return OptimizerConfig(name=name, adafactor_min_dim=4, clip=1e3, **fields)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stack_of_layers_is_updated_as_its_layers_alone(name):
    stacked_params, params = draw(0)
    grads = [draw(seed) for seed in (1, 2)]
    stacked = run(config_of(name), stacked_params, axes(True), [g[0] for g in grads])
    alone = run(config_of(name), params, axes(False), [g[1] for g in grads])
    for leaf in LAYER:
        want = np.stack([alone["layers"][i][leaf] for i in range(LAYERS)])
        np.testing.assert_allclose(stacked["layers"][leaf], want, rtol=2e-5, atol=1e-6)
    for leaf in OUTSIDE:
        np.testing.assert_allclose(stacked[leaf], alone[leaf], rtol=2e-5, atol=1e-6)


def test_optax_itself_takes_a_stack_for_one_tensor():
    """Why `per_layer` exists: LAMB and Adafactor of optax on a stacked leaf differ from ours."""
    params, _ = draw(0)
    grads, _ = draw(1)
    leaf, grad = params["layers"]["up"], grads["layers"]["up"]
    ours = per_layer(optax.scale_by_trust_ratio(), ("layers", "embed", "mlp"))
    theirs = optax.scale_by_trust_ratio()
    got, _ = ours.update(grad, ours.init(leaf), leaf)
    other, _ = theirs.update(grad, theirs.init(leaf), leaf)
    ratios = jnp.linalg.norm(leaf, axis=(1, 2)) / jnp.linalg.norm(grad, axis=(1, 2))
    np.testing.assert_allclose(got, grad * ratios[:, None, None], rtol=1e-5)
    assert not np.allclose(got, other, rtol=1e-2)


def test_muon_updates_have_the_same_size_for_every_shape_and_layer():
    params, _ = draw(0)
    grads, _ = draw(1)
    config = config_of("muon", weight_decay=0.0, muon_rms=0.2)
    after = run(config, params, axes(True), [grads])
    for leaf in ("up", "down"):
        step = (params["layers"][leaf] - after["layers"][leaf]) / 0.01
        rms = jnp.sqrt(jnp.mean(step**2, axis=(1, 2)))
        # Newton-Schulz leaves singular values within about 0.7 to 1.2; rank 4 of [4, 6]. Scales of
        # 1, 10 and 100 in float32 cost some digits of the difference.
        np.testing.assert_allclose(rms, 0.2, rtol=0.35)
        singular = jnp.linalg.svd(step / (0.2 * 6**0.5), compute_uv=False)
        assert (singular > 0.5).all() and (singular < 1.5).all()


def test_muons_other_parameters_are_adams_at_their_own_ratio():
    params, _ = draw(0)
    grads, _ = draw(1)
    muon = run(config_of("muon", adam_ratio=0.5, weight_decay=0.0), params, axes(True), [grads])
    adam = run(config_of("adamw", weight_decay=0.0), params, axes(True), [grads])
    for leaf in OUTSIDE:
        np.testing.assert_allclose(
            muon[leaf] - params[leaf], (adam[leaf] - params[leaf]) / 2, rtol=1e-3, atol=1e-7
        )


def test_groups_follow_names():
    assert group(("layers", "embed", "heads")) == "matrix"
    assert group(("embed", "kv_heads")) == "matrix"
    assert group(("layers", "embed", "conv")) == "matrix"  # a projection onto the channels
    assert group(("layers", None, "conv")) == "kernel"
    assert group(("layers", "embed")) == "vector"  # two axes, and still a norm
    assert group(("vocab", "embed")) == "embedding"
    assert group(("embed", "vocab")) == "head"
    assert group(("vocab",)) == "vector"
    assert groups(axes(True))["layers"]["norm"] == "vector"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_leaves_norms_biases_and_embeddings_alone(name):
    """Without gradients only weight decay moves a parameter."""
    params, _ = draw(0)
    zeros = jax.tree.map(np.zeros_like, params)
    after = run(config_of(name, weight_decay=0.1), params, axes(True), [zeros])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, after)
    assert moved == {
        "layers": {"up": True, "down": True, "conv": True, "norm": False, "bias": False},
        "embedding": False,
        "head": True,
        "final_norm": False,
    }
    mask = decay_mask(axes(True), config_of(name, decay_embeddings=True))
    assert mask["embedding"] and not mask["final_norm"]


def test_clipping_bounds_the_global_norm():
    params, _ = draw(0)
    grads, _ = draw(1)
    config = OptimizerConfig(name="adamw", clip=1e-3, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0)
    after = run(config, params, axes(True), [grads])
    # With eps = 1 Adam passes small gradients on: the step is the clipped gradient itself.
    step = optax.tree.norm(jax.tree.map(jnp.subtract, params, after)) / 0.01
    assert step <= 1.1e-3


def test_adafactor_keeps_rows_and_columns_of_each_layer():
    params, _ = draw(0)
    optimizer = make_optimizer(config_of("adafactor"), axes(True), lambda step: 0.01)
    state = jax.eval_shape(optimizer.init, params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (LAYERS, 4) in shapes and (LAYERS, 6) in shapes
    assert (LAYERS, 4, 6) not in shapes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_lies_where_its_parameter_does(name):
    params, _ = draw(0)
    optimizer = make_optimizer(config_of(name), axes(True), lambda step: 0.01)
    state = jax.eval_shape(optimizer.init, params)
    marks = jax.tree.map(lambda x: f"like {x.shape}", params)
    found = state_shardings(state, params, marks, "whole")
    large = [
        (leaf.shape, mark)
        for leaf, mark in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    ]
    assert all(mark in (f"like {shape}", "whole") for shape, mark in large)
    if name != "adafactor":
        assert all(mark != "whole" for shape, mark in large if shape == (LAYERS, 4, 6))


def test_an_unknown_optimizer_is_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"optimizer\.name: got 'adam'.*did you mean adamw"):
        make_optimizer(OptimizerConfig(name="adam"), axes(True), lambda step: 0.01)
