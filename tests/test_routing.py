"""Routing attention: clusters against plain definitions, capacity, moving centroids, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models.routing import RoutingModelConfig
from effattn.nn.clusters import commit, moved_means, similarities, unit
from effattn.nn.mixers.routing import Routing, RoutingConfig
from effattn.train.flops import forward_flops

WIDTH = 16


def build(**options: Any) -> Routing:
    options = {"num_heads": 2, "num_clusters": 3, "init_std": 0.4, **options}
    return RoutingConfig(**options).build(WIDTH, rngs=nnx.Rngs(0))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed(lengths: tuple[int, ...], rows: int = 2) -> TokenInfo:
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)
    both = (np.tile(a, (rows, 1)) for a in (positions, segments))
    return TokenInfo(*both, np.ones((rows, len(positions)), bool))


def dense(mixer: Routing, x: jax.Array, info: TokenInfo) -> np.ndarray:
    """The definition, token by token: what is in my document and cluster and came early enough."""
    query, key, value = (np.asarray(a, np.float64) for a in mixer._project(x))
    turned = [np.asarray(a, np.float64) for a in mixer._turn(*mixer._project(x)[:2], info)]
    means = np.asarray(unit(mixer.means[...]))
    memory = [
        np.asarray(m[...], np.float64)[:, 0, 0] for m in (mixer.memory_key, mixer.memory_value)
    ]
    out = np.zeros(value.shape)
    for b, h in np.ndindex(len(x), mixer.num_heads):
        q_cluster = np.argmax(query[b, :, h] @ means[h].T, axis=-1)
        k_cluster = np.argmax(key[b, :, h] @ means[h].T, axis=-1)
        for t in range(x.shape[1]):
            same = np.asarray(info.segment_ids)[b] == info.segment_ids[b, t]
            inside = np.flatnonzero(same & (k_cluster == q_cluster[t]))[: mixer.window]
            inside = inside[inside <= t]
            keys = np.concatenate([turned[1][b, inside, h], memory[0][h : h + 1]])
            values = np.concatenate([value[b, inside, h], memory[1][h : h + 1]])
            scores = keys @ turned[0][b, t, h] * mixer.head_dim**-0.5
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ values / weights.sum()
    return out.reshape(*x.shape[:2], -1) @ np.asarray(mixer.out.kernel[...], np.float64)


@pytest.mark.parametrize("window", [None, 2])
def test_tokens_attend_inside_their_cluster_and_document(window):
    mixer, x, info = build(window=window), draw(2, 17, WIDTH), packed((11, 6))
    got = jax.jit(lambda: mixer(x, info)[0])()
    np.testing.assert_allclose(got, dense(mixer, x, info), rtol=0, atol=1e-5)


def test_a_full_cluster_takes_no_more_keys():
    x, info = draw(2, 17, WIDTH), packed((17,))
    both = jax.jit(lambda: [build(window=w)(x, info)[0] for w in (None, 2)])()
    early = np.asarray(info.positions) < 2  # two keys of any cluster at most came so far
    np.testing.assert_allclose(both[0][early], both[1][early], rtol=0, atol=1e-6)
    assert np.max(np.abs(both[0] - both[1])) > 1e-3


def test_the_papers_clusters_are_not_causal_and_say_so():
    mixer, x = build(membership="top", window=4), draw(1, 12, WIDTH)
    assert not (mixer.causal or mixer.decodes or mixer.packs)
    changed = x.at[:, 8:].set(draw(1, 4, WIDTH, seed=1))
    one, two = jax.jit(lambda: [mixer(a, whole_rows(a))[0] for a in (x, changed)])()
    assert np.max(np.abs(one - two)[:, :8]) > 1e-3
    with pytest.raises(ValueError, match="decoding wants a causal mixer"):
        mixer.init_state(1, 4, jnp.float32)


def test_the_papers_clusters_leave_padding_alone():
    mixer, x = build(membership="top", window=4), draw(2, 12, WIDTH)
    other = x.at[:, 9:].set(7.0)
    info = whole_rows(x, np.array([9, 9]))
    one, two = jax.jit(lambda: [mixer(a, info)[0] for a in (x, other)])()
    np.testing.assert_allclose(one[:, :9], two[:, :9], rtol=0, atol=1e-6)


# ---- centroids


def test_commitment_draws_tokens_to_centroids_and_not_back():
    x, means = draw(2, 5, 2, 4), unit(draw(2, 3, 4, seed=1))
    valid = jnp.array([[True] * 5, [False] * 5])

    def loss(x: jax.Array, means: jax.Array) -> jax.Array:
        total, weight = commit(x, means, valid)[0]
        return total / weight

    of_x, of_means = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, means)
    assert np.any(of_x[0]) and not np.any(of_x[1]) and not np.any(of_means)
    cosines = np.max(similarities(x, means)[0], axis=-1)
    np.testing.assert_allclose(loss(x, means), np.mean(2 - 2 * cosines) / 4, rtol=1e-5)


def test_centroids_move_to_their_members_and_stay_without():
    means = unit(draw(1, 2, 4))
    members = jnp.stack([draw(4, seed=1), jnp.zeros(4)])[None]
    moved = moved_means(means, members, 0.9)
    np.testing.assert_allclose(
        moved[0, 0], 0.9 * means[0, 0] + 0.1 * unit(members[0, 0]), rtol=1e-6
    )
    np.testing.assert_array_equal(moved[0, 1], means[0, 1])


def test_a_step_moves_the_centroids_of_every_routed_layer():
    config = RoutingModelConfig(
        num_layers=4, width=WIDTH, num_heads=2, window=3, num_clusters=3, decay=0.5
    )
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9), dtype=np.int32)

    @jax.jit
    def run() -> tuple[Any, Any, Any, Any]:
        model = config.build(vocab_size=11, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.state(model))
        extra, info = model.init_extra(), whole_rows(tokens)
        for key in (0, 1):  # two microbatches
            out = model(tokens, info, key=jax.random.key(key), extra=extra)
            extra = out.extra
        assert model(tokens, info, extra=extra).extra is extra
        return params, extra, *model.end_step(params, extra)

    params, extra, moved, emptied = run()
    before, after = (p["stack"]["blocks"][1]["mixer"]["means"] for p in (params, moved))
    assert before.shape == (2, 2, 3, 8)  # two routed layers in one scanned block
    assert np.all(np.any(np.asarray(extra[0]), axis=(1, 2, 3))) and not np.any(emptied[0])
    np.testing.assert_allclose(after, moved_means(unit(before), extra[0], 0.5), rtol=1e-5)
    same = jax.tree.map(np.array_equal, params["stack"]["blocks"][0], moved["stack"]["blocks"][0])
    assert all(jax.tree.leaves(same))


# ---- configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"membership": "first"}, "membership: got 'first', expected one of nearest, top"),
        ({"num_clusters": 0}, "num_clusters: got 0"),
        ({"window": 0}, "window: got 0"),
        ({"num_heads": 3}, "width: got 16, expected a multiple of num_heads=3"),
        ({"rotary_dim": 3}, "rotary_dim: got 3"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": ("local",)}, "model.pattern: got 'local', expected one of routing, window"),
        ({"pattern": ()}, r"len\(model.pattern\): got 0"),
        ({"decay": 1.0}, "model.decay: got 1.0, expected 0 <= decay < 1"),
    ],
)
def test_bad_model_config(options, message):
    config = RoutingModelConfig(num_layers=2, width=WIDTH, num_heads=2, **options)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: config.build(vocab_size=11, rngs=nnx.Rngs(0)))


def test_flops():
    """A routed layer: width 8, 4 clusters, 15 tokens of which 8 / 4 are seen, MLP 16."""
    config = RoutingModelConfig(
        num_layers=1, width=8, num_heads=2, pattern=("routing",), num_clusters=4, mlp_width=16
    )
    weights = 2 * 8 * (4 * 8 + 3 * 16)
    pairs = 4 * 8 * (2 + 1)
    centroids = 2 * (2 * 8 * 4)
    want = weights + pairs + centroids + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=15) == want
