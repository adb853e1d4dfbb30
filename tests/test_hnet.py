"""H-Net: layouts, published sizes, capacities, chunk positions, demotion, learning rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value, thinned
from flax import nnx

from effattn.batch import Batch, TokenInfo, whole_rows
from effattn.config import load_config
from effattn.configs import hnet as published
from effattn.experiment import OptimizerConfig
from effattn.models.hnet import HNetConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.chunking import chunk_positions, dechunk
from effattn.nn.compact import CapacityConfig
from effattn.nn.layout import parse_layout
from effattn.nn.param import parameter_axes
from effattn.train.adaptive_flops import hnet_stage_flops
from effattn.train.flops import forward_flops
from effattn.train.optimizer import learning_rate_factors, make_optimizer
from effattn.train.state import TrainState
from effattn.train.step import make_train_step

VOCAB, LEN = 29, 24
SMALL = {"width": 16, "inner_widths": (24,), "num_heads": (2,), "targets": (2.0,)}
SMALL |= {"layout": '["t1", ["T1"], "t1"]'}


def drawn(config, seed=0):
    """(graphdef, parameters from N(0, 0.3)): routers that are no identity cut anywhere."""
    abstract = nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    draw = np.random.default_rng(seed)
    return graphdef, tree.unflatten(
        [draw.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    )


def tokens_of(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (rows, LEN)), jnp.int32)


# ---- layouts


def test_layouts_nest():
    outer, middle, inner = parse_layout('["m4", ["T1m4", ["T26"], "m4T1"], "m4"]').stages()
    assert (outer.encoder, outer.decoder) == ("mmmm", "mmmm")
    assert (middle.encoder, middle.decoder) == ("Tmmmm", "mmmmT")
    assert inner.encoder == "T" * 26 and inner.inner is None
    assert (outer.height(), middle.height(), inner.height()) == (8, 12, 52)


@pytest.mark.parametrize(
    ("text", "message", "at"),
    [
        ('["m4", ["T2"] "m4"]', "got '\"' at character 15, expected ','", 14),
        ('["m4", ["X2"], "m4"]', "got 'X' at character 10, expected one of the letters", 9),
        ('["m", ["T2"], "m4"]', "expected a number of layers", 3),
        ('["m4", ["T2"], "m4"', "got the end, expected ']'", 19),
        ('["m4", ["T2"], "m4"]]', "got ']' at character 21, expected the end", 20),
        ("m4", "got 'm' at character 1, expected '['", 0),
        ('["m4", "T2", "m4"]', "expected '[', which begins a stage", 7),
        ('[""]', "the innermost stack has one at least", 3),
        ("[", "got the end, expected a stack in quotes", 1),
    ],
)
def test_a_malformed_layout_is_pointed_at(text, message, at):
    with pytest.raises(ValueError) as error:
        HNetConfig(layout=text).build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
    lines = str(error.value).split("\n")
    assert message in lines[0] and lines[0].startswith("model.layout")
    assert lines[1].strip() == text and lines[2].index("^") - 2 == at


# ---- sizes


def reference_parameters(layout, widths, mlp_widths):
    """The authors' modules, counted by hand: no bias but in convolutions and the residual."""

    def layer(letter, d, f):
        if letter in "tT":
            mixer = 4 * d * d
        else:
            inner, state, heads = 2 * d, 128, 2 * d // 64
            mixer = d * (2 * inner + 2 * state + heads) + 5 * (inner + 2 * state)
            mixer += 3 * heads + inner + inner * d
        return mixer + d + ((3 * d * f + d) if letter.isupper() else 0)

    total = 2 * 256 * widths[0]
    for i, (stage, d, f) in enumerate(
        zip(parse_layout(layout).stages(), widths, mlp_widths, strict=True)
    ):
        total += sum(layer(c, d, -(-f // 128) * 128) for c in stage.encoder + stage.decoder) + d
        if stage.inner is not None:
            total += (
                3 * d * d + d + d + widths[i + 1] - d
            )  # routers, residual, second norm, widening
    return total


@pytest.mark.parametrize(
    ("name", "millions"),
    [("1stage_L", 679.4), ("1stage_XL", 1270.8), ("2stage_L", 874.3), ("2stage_XL", 1603.5)],
)
def test_published_sizes(name, millions):
    config = load_config(f"hnet:{name}").model
    model = nnx.eval_shape(lambda: config.build(vocab_size=256, rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert count == reference_parameters(*published.SIZES[name][:3])
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_inner_stage_costs_a_quarter_at_a_compression_of_four():
    config = HNetConfig(layout='["m2", ["T8"], "m2"]', width=256, targets=(4.0,))
    inner = hnet_stage_flops(config, seq_len=2048)[1]
    full = hnet_stage_flops(config, seq_len=2048, compressions=[1.0])[1]
    assert inner <= 0.3 * full
    same = TransformerConfig(num_layers=8, width=256, num_heads=4, mlp_width=config.mlp_width(1))
    assert full + 2 * 256 * VOCAB == forward_flops(same, vocab_size=VOCAB, seq_len=2048)


# ---- chunks


def test_chunk_positions_count_within_documents():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 3], [5, 5, 5, 5, 0, 0, 0, 0]])
    begins = jnp.asarray([[1, 0, 1, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 0, 0, 0]], bool)
    info = TokenInfo(jnp.zeros_like(segments), segments, segments > 0)
    ranks, chunks = chunk_positions(begins, info, jnp.asarray([4, 7]), jnp.asarray([9, 5]))
    # The second row goes on with document 5, of which 7 chunks have begun.
    valid = np.asarray(segments) > 0
    np.testing.assert_array_equal(np.asarray(ranks)[0][valid[0]], [0, 0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(np.asarray(ranks)[1][valid[1]], [6, 7, 7, 8])
    np.testing.assert_array_equal(chunks, [1, 9])


def test_words_begin_chunks_and_long_ones_are_split():
    text = b"ab  c\tdefghijk\n\nl m"
    tokens = jnp.asarray([list(text)], jnp.int32)
    config = HNetConfig(**SMALL, segmenter="words", longest_word=4)
    model = config.build(vocab_size=128, rngs=nnx.Rngs(0))
    (found,) = model.boundaries(tokens, whole_rows(tokens))
    starts = np.flatnonzero(found.begins[0])
    chunks = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    assert chunks == [b"ab", b"  c", b"\tdef", b"ghij", b"k", b"\n\nl", b" m"]
    assert not model(tokens, whole_rows(tokens), key=jax.random.key(0)).losses


def test_one_chunk_per_token_comes_back_almost_as_it_is():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    ones = jnp.ones((2, 5))
    u, _ = dechunk(z, ones, ones > 0, whole_rows(z))
    before, wanted = np.zeros((2, 3)), []
    for t in range(5):
        before = 0.9999 * np.asarray(z)[:, t] + 1e-4 * before
        wanted.append(before)
    np.testing.assert_allclose(u, np.stack(wanted, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "pooled"),
    each_value([(m, p) for m in ("bucket", "error", "demote") for p in (False, True)]),
)
def test_a_mode_that_fits_equals_exact_in_values_and_gradients(mode, pooled):
    config = HNetConfig(**SMALL)
    tokens = tokens_of(3)
    info = whole_rows(tokens, jnp.asarray([LEN, 17, 5]))

    def loss(params, graphdef):
        model = nnx.merge(graphdef, params)
        out = model(tokens, info, key=jax.random.key(0))
        y = jnp.where(info.valid[..., None], model.logits(out.hidden), 0)
        value, weight = out.losses["ratio_0"]
        return jnp.sum(jnp.sin(y)) + value / weight, out.metrics

    def run(capacity):
        graphdef, params = drawn(dataclasses.replace(config, capacity=capacity))
        return jax.jit(jax.value_and_grad(lambda p: loss(p, graphdef), has_aux=True))(params)

    (wanted, metrics), gradients = run(CapacityConfig())
    capacity = CapacityConfig(mode=mode, rungs=(0.6, 0.9, 1.0), share=0.9, pooled=pooled)
    (got, report), others = run(capacity)
    assert (
        report["chunks_0_overflow"] == 0 and report["chunks_0_count"] == metrics["chunks_0_count"]
    )
    assert report["chunks_0_capacity"] < metrics["chunks_0_capacity"]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    # Sums over fewer rows in another order.
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * scale)


@pytest.mark.parametrize("asked", thinned([True, False]))
def test_demotion_is_causal_and_decoding_counts_along(asked):
    """In evaluation only where asked; otherwise evaluation has room for every chunk."""
    capacity = CapacityConfig(mode="demote", share=0.2)
    config = HNetConfig(**SMALL, capacity=capacity, demote_in_evaluation=asked)
    graphdef, params = drawn(config)
    tokens, model = tokens_of(3), nnx.merge(graphdef, params)
    info = whole_rows(tokens)

    def full(tokens, training):
        out = model(tokens, info, key=jax.random.key(0) if training else None)
        return model.logits(out.hidden), out.metrics["chunks_0_overflow"]

    full = jax.jit(full, static_argnums=1)
    demoted, over = full(tokens, True)
    assert over > 0
    evaluated, over = full(tokens, False)
    assert (over > 0) == asked
    wanted = drawn(HNetConfig(**SMALL))[0]
    exact = nnx.merge(wanted, params)
    exact = exact.logits(exact(tokens, info).hidden)
    np.testing.assert_allclose(evaluated, demoted if asked else exact, atol=1e-5)
    assert float(jnp.abs(demoted - exact).max()) > 1e-2
    changed, _ = full(tokens.at[:, 9:].add(1) % VOCAB, True)
    np.testing.assert_allclose(changed[:, :9], demoted[:, :9], atol=1e-5)

    state = model.init_state(3, LEN, jnp.float32)
    head = TokenInfo(*(a[:, :7] for a in info))
    got, state = jax.jit(model.prefill)(tokens[:, :7], head, state)
    steps = []
    step = jax.jit(model.step)
    for t in range(7, LEN):
        y, state = step(tokens[:, t], TokenInfo(*(a[:, t] for a in info)), state)
        steps.append(y)
    got = jnp.concatenate([got, jnp.stack(steps, axis=1)], axis=1)
    np.testing.assert_allclose(got, evaluated, atol=2e-5)


# ---- training


def one_step(config):
    graphdef, params = drawn(config)
    axes = parameter_axes(
        nnx.split(nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))))[1]
    )
    optimizer = make_optimizer(OptimizerConfig(), axes, lambda _: 0.1)
    step = make_train_step(graphdef, optimizer, lambda _: 0.1)
    tokens = tokens_of(2)
    weights = jnp.ones(tokens.shape, jnp.float32)
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), weights, whole_rows(tokens))
    key = jax.random.key(0)
    state = TrainState(jnp.int32(3), params, optimizer.init(params), None, key)
    copy = jax.tree.map(jnp.array, state)
    return copy, *step(state, batch)


@pytest.mark.parametrize("share", thinned([0.1, 1.0]))
def test_an_overflow_in_mode_error_changes_nothing(share):
    config = HNetConfig(**SMALL, capacity=CapacityConfig(mode="error", share=share))
    before, after, metrics = one_step(config)
    over = metrics["capacity_error"] > 0
    assert over == (share < 1) == (metrics["chunks_0_overflow"] > 0)
    same = [
        bool(jnp.all(a == b))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    assert all(same) if over else not any(same[:2])


def test_learning_rates_per_stage():
    layout = '["t1", ["t1", ["T1"], "t1"], "t1"]'
    config = HNetConfig(layout=layout, width=16, num_heads=(2,), learning_rates=(3.0, 1.7, 0.9))
    model = nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    axes = parameter_axes(nnx.split(model)[1])
    factors = learning_rate_factors(config, axes)
    outer, middle = factors["stack"], factors["stack"]["inner"]
    assert factors["embedding"]["table"] == factors["head"]["kernel"] == 3.0
    assert outer["encoder"]["norm"]["scale"] == outer["router"]["query"] == 3.0
    assert middle["decoder"]["norm"]["scale"] == 1.7 and middle["inner"]["norm"]["scale"] == 0.9
    assert learning_rate_factors(dataclasses.replace(config, learning_rates=(1.0,)), axes) is None
    params = jax.tree.map(lambda _: jnp.ones(3), factors)
    gradients = jax.tree.map(lambda x: x, params)
    updates = {}
    for name, f in (("plain", None), ("scaled", factors)):
        optimizer = make_optimizer(OptimizerConfig(clip=None), axes, lambda _: 0.1, f)
        updates[name], _ = optimizer.update(gradients, optimizer.init(params), params)
    ratios = jax.tree.map(lambda a, b: float((a / b)[0]), updates["scaled"], updates["plain"])
    jax.tree.map(lambda r, f: np.testing.assert_allclose(r, f, rtol=1e-6), ratios, factors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": (1.0,)}, "model.targets: got 1.0"),
        ({"inner_widths": (8,)}, "model.inner_widths: got widths"),
        ({"inner_widths": (24, 24)}, "model.inner_widths: got 2 entries, expected 1"),
        ({"num_heads": ()}, r"len\(model.num_heads\)"),
        ({"capacity": CapacityConfig(mode="most")}, "model.capacity.mode: got 'most'"),
        ({"ratio_weight": -1.0}, "model.ratio_weight"),
        ({"segmenter": "syllables"}, "model.segmenter: got 'syllables'"),
        ({"longest_word": 0}, "model.longest_word: got 0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        HNetConfig(**{**SMALL, **options}).build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
