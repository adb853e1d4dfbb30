"""Optimizers over groups of parameters that are told apart by logical axis names, never by ndim.

A scanned model stacks its layers, and a mixture its experts: a leaf named ("layers", "embed",
"mlp") is a stack of matrices. Muon, LAMB and Adafactor act on each matrix of the stack; `per_layer`
and Muon's dimension numbers see to that.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from effattn.checks import check_in
from effattn.experiment import OPTIMIZERS, OptimizerConfig
from effattn.parallel.mesh import FOLDS, experts_axis
from effattn.train.schedule import Schedule

STACKED = ("layers", *map(experts_axis, FOLDS))
Names = tuple[str | None, ...]


def group(names: Names) -> str:
    """The group of a parameter with these axis names.

    "embedding"  a vocabulary table, ("vocab", ...)
    "head"       a projection onto the vocabulary, (..., "vocab")
    "matrix"     two named axes: what Muon orthogonalises
    "kernel"     any other parameter with two or more axes, such as a short convolution's
    "vector"     norm scales, biases, per-head numbers
    """
    names = tuple(name for name in names if name not in STACKED)
    if "vocab" in names:
        if len(names) < 2:
            return "vector"  # the bias of a head
        return "embedding" if names[0] == "vocab" else "head"
    if len(names) < 2:
        return "vector"
    return "matrix" if len(names) == 2 and None not in names else "kernel"


def groups(axes: Any) -> Any:
    """The tree of axis names as a tree of group names."""
    return jax.tree.map(group, axes, is_leaf=is_names)


def is_names(x: Any) -> bool:
    """Whether a pytree node is one parameter's tuple of axis names."""
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


def per_layer(transform: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`transform` applied to every layer of every leaf by itself.

    For transforms whose arithmetic spans a whole leaf (norms, factored moments): each leaf gets its
    own state, with a leading axis per stacked axis of the leaf. axes: the tree of axis names.
    """

    def layered(function: Any, names: Names) -> Any:
        for name in names:
            if name in STACKED:
                function = jax.vmap(function)
        return function

    treedef: Any = jax.tree.structure(axes, is_leaf=is_names)
    all_names = jax.tree.leaves(axes, is_leaf=is_names)

    def init(params: Any) -> Any:
        leaves = treedef.flatten_up_to(params)
        states = [layered(transform.init, n)(p) for n, p in zip(all_names, leaves, strict=True)]
        return treedef.unflatten(states)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("params: got None, per_layer wants the parameters")
        trees = (treedef.flatten_up_to(tree) for tree in (updates, state, params))
        pairs = [
            layered(transform.update, names)(*leaf)
            for names, *leaf in zip(all_names, *trees, strict=True)
        ]
        return tuple(treedef.unflatten(part) for part in zip(*pairs, strict=True))

    return optax.GradientTransformation(init, update)


def decay_mask(axes: Any, config: OptimizerConfig) -> Any:
    """True where weight decay applies: never on vectors, on embeddings where the config says so."""
    kept = {"vector"} if config.decay_embeddings else {"vector", "embedding"}
    return jax.tree.map(lambda name: name not in kept, groups(axes))


def learning_rate_factors(model_config: Any, axes: Any) -> Any:
    """What multiplies the learning rate of each parameter, a tree like `axes`; None where nothing.

    A model whose parts learn at their own rates says so by its config's
    `learning_rate_factor(path)`, path being the names from the model down to the parameter.
    """
    if not hasattr(model_config, "learning_rate_factor"):
        return None

    def factor(path: Any, _: Names) -> float:
        words = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return model_config.learning_rate_factor(tuple(words))

    factors = jax.tree_util.tree_map_with_path(factor, axes, is_leaf=is_names)
    return None if all(f == 1 for f in jax.tree.leaves(factors)) else factors


def make_optimizer(
    config: OptimizerConfig,
    axes: Any,
    schedule: Schedule,
    factors: Any = None,
    frozen: Collection[str] = (),
) -> optax.GradientTransformation:
    """Clipping by global norm, the named optimizer, decoupled weight decay, the schedule.

    axes: tree of axis-name tuples that matches the parameters. factors: tree of numbers that
    multiply every parameter's learning rate, or None. frozen: parts of the model, by their first
    name, that stay as they are, bit for bit, and have no moments. Raises ValueError for an unknown
    `config.name`. Sources: AdamW (Loshchilov & Hutter 2019), LAMB (You et al. 2020), Lion (Chen et
    al. 2023), Muon (Jordan et al. 2024, with the shape scaling of Liu et al. 2025: every matrix is
    updated with RMS `muon_rms`; everything else takes AdamW), Adafactor (Shazeer & Stern 2018).
    """
    check_in("optimizer.name", config.name, OPTIMIZERS)
    if frozen:
        rest, rest_factors = _without(axes, frozen), _without(factors, frozen)
        return _of_the_rest(make_optimizer(config, rest, schedule, rest_factors), frozen)
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask(axes, config))
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    match config.name:
        case "adamw":
            steps = [adam, decay]
        case "lamb":
            steps = [adam, decay, per_layer(optax.scale_by_trust_ratio(), axes)]
        case "lion":
            steps = [optax.scale_by_lion(b1=config.b1, b2=config.b2), decay]
        case "muon":
            steps = [_muon(config, axes, adam), decay, _scale_others(config.adam_ratio, axes)]
        case _:
            factored = optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=config.adafactor_min_dim),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
            )
            steps = [per_layer(factored, axes), decay]
    if config.clip is not None:
        steps.insert(0, optax.clip_by_global_norm(config.clip))
    if factors is not None:
        steps.append(optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, factors)))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))


def _without(tree: Any, frozen: Collection[str]) -> Any:
    return None if tree is None else {name: x for name, x in tree.items() if name not in frozen}


def _of_the_rest(
    transform: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
    """`transform` of the parameters that are not in the parts `frozen`, which it never sees."""

    def init(params: Any) -> Any:
        return transform.init(_without(params, frozen))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = transform.update(_without(updates, frozen), state, _without(params, frozen))
        # -0, because x + 0 is another number than x where x is -0.
        still = {name: updates[name] for name in frozen}
        return {**new, **jax.tree.map(lambda u: jnp.full_like(u, -0.0), still)}, state

    return optax.GradientTransformation(init, update)


def _muon(
    config: OptimizerConfig, axes: Any, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    labels = jax.tree.map(lambda g: "muon" if g == "matrix" else "adam", groups(axes))
    # Axes that are neither reduced nor output are a batch of matrices: the stacked layers.
    matrix = contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    numbers = jax.tree.map(lambda g: matrix if g == "muon" else optax.MaskedNode(), labels)
    orthogonalise = contrib.scale_by_muon(
        beta=config.muon_momentum,
        ns_steps=config.muon_steps,
        weight_dimension_numbers=lambda _: numbers,
    )

    def scale_shape(updates: Any, params: Any) -> Any:
        # An orthogonal [m, n] matrix has RMS 1 / sqrt(max(m, n)).
        del params
        return jax.tree.map(lambda u: u * (config.muon_rms * max(u.shape[-2:]) ** 0.5), updates)

    return optax.partition(
        {"muon": optax.chain(orthogonalise, optax.stateless(scale_shape)), "adam": adam}, labels
    )


def _scale_others(ratio: float, axes: Any) -> optax.GradientTransformation:
    """Muon's second learning rate: everything but matrices times `ratio`."""
    factors = jax.tree.map(lambda g: 1.0 if g == "matrix" else ratio, groups(axes))
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))


def state_shardings(opt_state: Any, params: Any, shardings: Any, otherwise: Any) -> Any:
    """The tree `opt_state` with, for each leaf, the sharding of the parameter it mirrors.

    A leaf mirrors a parameter when the parameter's path is part of its own and the shapes agree;
    everything else (counters, factored moments, which are small) gets `otherwise`.
    """
    by_path = {
        tuple(map(str, path)): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(params)[0],
            jax.tree.leaves(shardings),
            strict=True,
        )
    }

    def sharding_of(path: Any, leaf: Any) -> Any:
        keys = tuple(map(str, path))
        for start in range(len(keys)):
            for stop in range(len(keys), start, -1):
                shape, sharding = by_path.get(keys[start:stop], (None, None))
                if shape == leaf.shape:
                    return sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(sharding_of, opt_state)
