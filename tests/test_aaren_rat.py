"""Aaren and RAT as layers: published sizes, limiting cases, memory, and what they refuse."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import thinned
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.masks import Causal
from effattn.models.aaren import AarenModelConfig
from effattn.models.rat import RATModelConfig
from effattn.nn.mixer import state_bytes
from effattn.nn.mixers.aaren import AarenConfig
from effattn.nn.mixers.rat import RATConfig, chunks_left
from effattn.pallas_kernels.attention import attention
from effattn.pallas_kernels.prefix_scan import gated_scan

ROUNDING = 1e-5  # float32 sums of numbers around 1 in another order


def make(config, width=16, seed=0):
    """The module of `config` with parameters from N(0, 0.5)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(width, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    draw = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, draw)


def tokens(shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters(config, vocab_size):
    """(all, those of the layers alone)."""
    model = nnx.eval_shape(lambda: config.build(vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model))
    whole, layers = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for part in (state, state["stack"])
    )
    return whole, layers


# ---- sizes


def test_parameter_counts_are_the_published_ones():
    # A Transformer's layer and one learned token of 512.
    aaren = AarenModelConfig(num_layers=1, width=512, num_heads=8, mlp_width=2048)
    assert parameters(aaren, 8)[1] == 3_152_384 + 512
    rat = importlib.import_module("effattn.configs.rat_1b3").get_config().model
    whole, layers = parameters(rat, 32000)
    assert round(whole / 1e9, 3) == 1.364
    assert round(layers / 1e9, 3) == 1.233


def test_state_bytes_are_the_published_ones():
    aaren = nnx.eval_shape(lambda: AarenConfig(num_heads=8).build(512, rngs=nnx.Rngs(0)))
    number_of_the_document = 4
    for max_len in (1, 1_000_000):
        want = 8 * (2 + 64) * 4 + number_of_the_document
        assert state_bytes(aaren, 1, max_len, jnp.bfloat16) == want
    rat = nnx.eval_shape(lambda: RATConfig(num_heads=16).build(2048, rngs=nnx.Rngs(0)))
    slots, running, numbers = 2 * 256 * 2048 * 2, 2 * 2048 * 4, 2 * 256 * 4
    want = slots + running + numbers + number_of_the_document
    assert state_bytes(rat, 1, 4096, jnp.bfloat16) == want


# ---- limiting cases


def test_aaren_of_equal_keys_is_the_running_mean():
    mixer = make(AarenConfig(num_heads=2, use_bias=False))
    mixer.key.kernel[...] = jnp.zeros_like(mixer.key.kernel[...])
    x = tokens((2, 9, 16))
    mean = jnp.cumsum(mixer.value(x), axis=1) / jnp.arange(1, 10)[:, None]
    np.testing.assert_allclose(mixer(x, whole_rows(x))[0], mixer.out(mean), atol=ROUNDING)


def test_aaren_is_softmax_attention_with_one_query_for_all():
    mixer = make(AarenConfig(num_heads=2))
    x = tokens((2, 9, 16))
    key, value = (f(x).reshape(2, 9, 2, 8) for f in (mixer.key, mixer.value))
    query = jnp.broadcast_to(mixer.query(mixer.token[...]).reshape(2, 8), key.shape)
    wanted = mixer.out(attention(query, key, value).reshape(2, 9, 16))
    np.testing.assert_allclose(mixer(x, whole_rows(x))[0], wanted, atol=ROUNDING)


def test_aaren_goes_on_from_an_empty_state_at_scores_far_below_zero():
    """A document after another: a maximum left over at 0 would make all its weights vanish."""
    mixer = make(AarenConfig(num_heads=2))
    mixer.key.bias[...] = -1000 * jnp.sign(mixer.query(mixer.token[...]))
    x = tokens((2, 5, 16))
    info = whole_rows(x)
    _, state = mixer.prefill(x, info, mixer.init_state(2, 10, jnp.float32))
    other = info._replace(segment_ids=info.segment_ids + 1)
    again, state = mixer.prefill(x, other, state)
    np.testing.assert_array_equal(again, mixer(x, info)[0])
    third = TokenInfo(*(field[:, 0] for field in other._replace(segment_ids=info.segment_ids + 2)))
    step, _ = mixer.step(x[:, 0], third, state)
    np.testing.assert_allclose(step, again[:, 0], atol=ROUNDING)


def test_aaren_in_pieces_equals_one_pass_over_65536_tokens():
    mixer = make(AarenConfig(num_heads=2), width=8)
    x = tokens((1, 65_536, 8))
    info = whole_rows(x)
    run = jax.jit(mixer.prefill)
    whole, end = run(x, info, mixer.init_state(1, 1, jnp.float32))
    state, pieces = mixer.init_state(1, 1, jnp.float32), []
    for start in range(0, 65_536, 16_384):
        part = TokenInfo(*(field[:, start : start + 16_384] for field in info))
        y, state = run(x[:, start : start + 16_384], part, state)
        pieces.append(y)
    # The products with weights may be summed in another order.
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, end)


def test_rat_with_one_chunk_for_all_is_a_gated_recurrence():
    mixer = make(RATConfig(num_heads=4, chunk_size=64))
    x = tokens((2, 9, 16))
    gate = jax.nn.sigmoid(mixer.gate(x) + mixer.gate_bias[...])
    h, _ = gated_scan(gate, (1 - gate) * mixer.value(x))
    wanted = mixer.out(jax.nn.sigmoid(mixer.z(x)) * h)
    np.testing.assert_allclose(mixer(x, whole_rows(x))[0], wanted, atol=ROUNDING)


def test_rat_with_chunks_of_one_is_attention_over_gated_keys_and_values():
    mixer = make(RATConfig(num_heads=4, chunk_size=1))
    x = tokens((2, 9, 16))
    info = whole_rows(x)
    heads = (2, 9, 4, 4)
    gate = jax.nn.sigmoid(mixer.gate(x) + mixer.gate_bias[...]).reshape(heads)
    query, key = (jnp.tile(f(x).reshape(2, 9, 2, 4), (2, 1)) for f in (mixer.query, mixer.key))
    key, value = (1 - gate) * key, (1 - gate) * mixer.value(x).reshape(heads)
    rotated = (mixer._rotate(a, info.positions) for a in (query, key))
    y = attention(*rotated, value, mask=Causal()).reshape(2, 9, 16)
    wanted = mixer.out(jax.nn.sigmoid(mixer.z(x)) * y)
    np.testing.assert_allclose(mixer(x, info)[0], wanted, atol=ROUNDING)


# ---- rows that begin anywhere, and memory


@pytest.mark.parametrize("start", thinned([3, 0, 9, 4]))
def test_rat_prefill_and_steps_agree_wherever_a_row_begins(start):
    """Chunks are counted from the document's start, which may lie before the row's."""
    mixer = make(RATConfig(num_heads=4, chunk_size=4))
    x = tokens((2, 14, 16))
    info = whole_rows(x, start=start)
    wanted = jax.jit(lambda x: mixer(x, info)[0])(x)
    head, tail = (
        TokenInfo(*(field[:, part] for field in info)) for part in (slice(0, 6), slice(6, None))
    )
    # One slot more than 14 tokens fill where they begin with a chunk.
    first, state = mixer.prefill(x[:, :6], head, mixer.init_state(2, 18, jnp.float32))

    def token(state, at):
        y, state = mixer.step(*at, state)
        return state, y

    by_time = jax.tree.map(lambda a: a.swapaxes(0, 1), (x[:, 6:], tail))
    _, steps = jax.lax.scan(token, state, by_time)
    got = jnp.concatenate([first, steps.swapaxes(0, 1)], axis=1)
    np.testing.assert_allclose(got, wanted, atol=ROUNDING)


def test_chunks_left_fit_their_slots_wherever_documents_begin():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        length, chunk = (1, 32)[seed > 1], int(rng.integers(1, 9))
        places, segments = [], []
        while len(places) < length:
            start = int(rng.integers(0, 20)) if not places else 0
            n = int(rng.integers(1, 15))
            places += range(start, start + n)
            segments += [len(segments) + 1] * n
        row = [np.array([a[:length]], np.int32) for a in (places, segments)]
        sources = chunks_left(TokenInfo(*row, np.ones((1, length), bool)), chunk)
        wanted = [
            t
            for t in range(length - 1)
            if segments[t] == segments[t + 1] and places[t] // chunk != places[t + 1] // chunk
        ]
        assert np.asarray(sources.place)[np.asarray(sources.filled)].tolist() == wanted


def test_rat_makes_nothing_quadratic_in_the_length():
    length = 4096
    mixer = make(RATConfig(num_heads=2))
    x = tokens((1, length, 16))

    def largest(jaxpr):
        sizes = [math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
        inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()))]
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
        return max(sizes + [largest(p) for p in inner], default=0)

    loss = jax.grad(lambda x: mixer(x, whole_rows(x))[0].sum())
    # All scores of tokens with slots would be 2 x 4096 x 256.
    assert largest(jax.make_jaxpr(loss)(x).jaxpr) < 2 * length * length // 16


# ---- errors

MISTAKES = {
    "chunk": (RATConfig(chunk_size=0), "chunk_size: got 0, expected at least 1"),
    "groups": (RATConfig(num_heads=4, num_groups=3), "num_heads: got 4.*num_groups=3"),
    "odd heads": (RATConfig(num_heads=2, head_dim=3), "head_dim: got 3, expected a multiple of"),
    "heads": (AarenConfig(num_heads=3), "width: got 16, expected a multiple of num_heads=3"),
    "no heads": (AarenConfig(num_heads=0), "num_heads: got 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    config, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        config.build(16, rngs=nnx.Rngs(0))


def test_a_mistake_of_a_model_is_named():
    for config in (RATModelConfig(pattern=("rot",)), AarenModelConfig(pattern=("aren",))):
        with pytest.raises(ValueError, match="model.pattern: got .*; did you mean"):
            config.build(vocab_size=8, rngs=nnx.Rngs(0))
    mixer = make(RATConfig(num_heads=4, chunk_size=4))
    x = tokens((1, 9, 16))
    with pytest.raises(ValueError, match="prefill: got 9 tokens, expected at most max_len=8"):
        mixer.prefill(x, whole_rows(x), mixer.init_state(1, 8, jnp.float32))
