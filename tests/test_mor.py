"""Mixture-of-Recursions: sharing, the two modes, capacities, losses, decoding, published sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from effattn.batch import Batch, TokenInfo, whole_rows
from effattn.config import load_config
from effattn.models.mor import MoRConfig, mode_gap
from effattn.models.transformer import TransformerConfig
from effattn.nn.compact import CapacityConfig
from effattn.nn.mixer import state_bytes
from effattn.nn.recursion import layout
from effattn.nn.router import moved_bias, top_rows
from effattn.train.flops import forward_flops
from effattn.train.state import TrainState
from effattn.train.step import make_train_step

VOCAB, LEN, ROWS = 23, 12, 4
KEY = jax.random.key(0)
SMALL = {"num_layers": 3, "width": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 24}
SMALL |= {"sharing": "cycle"}
# Sums in another order, float32; values reach 10.
CLOSE = {"rtol": 0, "atol": 2e-5}


def drawn(config, seed=0):
    """(graphdef, parameters from N(0, 0.3)): routers that send tokens to every depth."""
    abstract = nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    draw = np.random.default_rng(seed)
    return graphdef, tree.unflatten(
        [draw.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    )


@functools.cache
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (ROWS, LEN), dtype=np.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "training"))
def call(graphdef, params, tokens, info, *, training=False, extra=None):
    """(logits, what the routers did)."""
    model = nnx.merge(graphdef, params)
    out, hidden = model._hidden(tokens, info, training=training, extra=extra)
    return model.logits(hidden), out


# ---- which layers are shared


def test_sharing_ties_the_layers_of_the_paper():
    assert layout(6, 3, "cycle").tied == ((0, 2, 4), (1, 3, 5))
    assert layout(6, 3, "sequence").tied == ((0, 1, 2), (3, 4, 5))
    assert layout(8, 3, "middle_cycle").tied == ((1, 3, 5), (2, 4, 6))
    assert layout(8, 3, "middle_sequence").tied == ((1, 2, 3), (4, 5, 6))
    rounded = layout(32, 4, "middle_cycle")
    assert (rounded.base_depth, rounded.num_layers) == (7, 30)


@pytest.mark.parametrize("sharing", ["cycle", "middle_sequence"])
def test_without_a_router_it_is_a_transformer_whose_layers_are_tied(sharing):
    sizes = {**SMALL, "num_layers": 6, "sharing": sharing}
    config = MoRConfig(**sizes, routing="none", num_recursions=2)
    graphdef, params = drawn(config)
    plan = config.layout()
    del sizes["sharing"]
    untied = TransformerConfig(**{**sizes, "num_layers": plan.num_layers})
    other = nnx.graphdef(nnx.eval_shape(lambda: untied.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))))
    source = {place: shared for shared, places in enumerate(plan.tied) for place in places}

    def spread(params):
        """The transformer's parameters: every layer a copy of the one that it is tied to."""
        (stack,) = params["recursions"]["stack"]["blocks"].values()

        def layer(place):
            if place in source:
                return jax.tree.map(lambda leaf: leaf[source[place]], stack)
            return params["first" if place == 0 else "last"]

        layers = [layer(place) for place in range(plan.num_layers)]
        blocks = {0: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
        rest = {name: params[name] for name in ("embedding", "final_norm")}
        return {**rest, "stack": {"blocks": blocks}}

    def loss(graphdef, params):
        model = nnx.merge(graphdef, params)
        out = model(tokens(), whole_rows(tokens()))
        return jnp.sum(jnp.sin(model.logits(out.hidden)))

    got, grads = jax.jit(jax.value_and_grad(lambda params: loss(graphdef, params)))(params)
    # The gradient of what is copied to several layers is the sum over them.
    summed = jax.jit(jax.value_and_grad(lambda params: loss(other, spread(params))))
    wanted, summed = summed(params)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(summed))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), grads, summed
    )


@pytest.mark.parametrize("capacities", [(1.0, 1.0), (1.0,)])
def test_full_capacity_is_the_recursive_transformer_with_gates(capacities):
    config = MoRConfig(**SMALL, num_recursions=len(capacities), capacities=capacities)
    graphdef, params = drawn(config)
    info = whole_rows(tokens())

    @jax.jit
    def by_hand(params):
        model = nnx.merge(graphdef, params)
        x = model._embed(tokens())
        for router in model.recursions.routers:
            x = x + 0.1 * jax.nn.sigmoid(router(x)) * model.recursions.stack(x, info)[0]
        return model.logits(model.final_norm(x))

    for training in (False, True):
        logits, _ = call(graphdef, params, tokens(), info, training=training)
        np.testing.assert_allclose(logits, by_hand(params), **CLOSE)


# ---- the choice


def test_of_equal_scores_the_earlier_token_is_taken():
    scores = jnp.asarray([[0.5, 0.9, 0.5, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
    eligible = jnp.asarray([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
    source, chosen = top_rows(scores, jnp.asarray([3, 2]), eligible, 4)
    np.testing.assert_array_equal(source, [[0, 1, 2, 5], [1, 2, 5, 5]])
    np.testing.assert_array_equal(chosen, [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])


def test_every_recursion_takes_its_share_of_those_before():
    graphdef, params = drawn(MoRConfig(**SMALL))
    info = whole_rows(tokens(), np.array([LEN, 9, 1, 0]))

    @jax.jit
    def levels(params):
        model = nnx.merge(graphdef, params)
        x = model._embed(tokens())
        return model.recursions.levels(x, info, model.recursions.shares)

    alive = [set(range(n)) for n in (LEN, 9, 1, 0)]
    for level, share in zip(levels(params), (1, 2 / 3, 1 / 3), strict=True):
        positions, chosen = np.asarray(level.alive.positions), np.asarray(level.chosen)
        for row, length in enumerate((LEN, 9, 1, 0)):
            taken = set(positions[row][chosen[row]].tolist())
            assert taken <= alive[row]
            # Of the row's own tokens, however long its padding is.
            assert len(taken) == min(length, max(1, int(share * length)))
            alive[row] = taken


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_rows_do_not_meet_and_padding_changes_nothing(routing):
    graphdef, params = drawn(MoRConfig(**SMALL, routing=routing, alpha=1.0))
    lengths, order = np.array([LEN, 7, 9, 3]), np.array([2, 0, 3, 1])
    info = whole_rows(tokens(), lengths)
    for training in (True, False):
        run = functools.partial(call, graphdef, params, training=training)
        logits, _ = run(tokens(), info)
        moved, _ = run(tokens()[order], TokenInfo(*(field[order] for field in info)))
        np.testing.assert_array_equal(moved, logits[order])
        other, _ = run(np.where(info.valid, tokens(), 0), info)
        np.testing.assert_array_equal(other[info.valid], logits[info.valid])


def test_token_choice_is_causal_in_training_and_expert_choice_is_not():
    changed = tokens().copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB
    for routing in ("token", "expert"):
        graphdef, params = drawn(MoRConfig(**SMALL, routing=routing, alpha=1.0))
        runs = [
            call(graphdef, params, x, whole_rows(x), training=True)[0][:, :6]
            for x in (tokens(), changed)
        ]
        assert np.array_equal(*runs) == (routing == "token")


# ---- capacities


@pytest.mark.parametrize(
    ("routing", "modes"),
    [("expert", [{"mode": "bucket"}, {"mode": "error"}]), ("token", [{"mode": "demote"}])],
)
def test_capacity_modes_agree_where_nothing_overflows(routing, modes):
    config = MoRConfig(**SMALL, routing=routing, alpha=1.0)
    info = whole_rows(tokens())
    graphdef, params = drawn(config)
    wanted, exact = call(graphdef, params, tokens(), info)
    most = int(jnp.max(jnp.sum(exact.depth >= 2, axis=1)))
    assert 0 < most < LEN
    for options in [*modes, *([{"mode": "bucket", "pooled": True}] if routing == "token" else [])]:
        capacity = CapacityConfig(**options, share=most / LEN)
        bounded = nnx.graphdef(
            nnx.eval_shape(
                lambda c=capacity: dataclasses.replace(config, evaluation_capacity=c).build(
                    vocab_size=VOCAB, rngs=nnx.Rngs(0)
                )
            )
        )
        logits, out = call(bounded, params, tokens(), info)
        np.testing.assert_allclose(logits, wanted, err_msg=str(options), **CLOSE)
        assert out.metrics["recursion_2_overflow"] == 0
        assert out.metrics["recursion_2_load"] == exact.metrics["recursion_2_load"]


def test_an_evaluation_that_overflows_fails_and_training_reports():
    config = MoRConfig(**SMALL, routing="token", alpha=1.0)
    tight = CapacityConfig(mode="error", share=0.1)
    config = dataclasses.replace(config, capacity=tight, evaluation_capacity=tight)
    graphdef, params = drawn(config)
    logits, _ = call(graphdef, params, tokens(), whole_rows(tokens()))
    assert np.isnan(logits).all()
    logits, out = call(graphdef, params, tokens(), whole_rows(tokens()), training=True)
    assert np.isfinite(logits).all() and out.metrics["capacity_error"] > 0


@pytest.mark.parametrize("routing", ["expert", pytest.param("token", marks=pytest.mark.slow)])
def test_demotion_is_causal_and_decoding_counts_along(routing):
    config = MoRConfig(**SMALL, routing=routing, alpha=1.0)
    config.evaluation_capacity = CapacityConfig(mode="demote", share=0.25)
    graphdef, params = drawn(config)
    info = whole_rows(tokens()[:3])
    logits, out = call(graphdef, params, tokens()[:3], info)
    assert out.metrics["recursion_2_overflow"] > 0
    assert np.max(np.sum(out.depth >= 2, axis=1)) == LEN // 4
    changed = tokens()[:3].copy()
    changed[:, 8:] = (changed[:, 8:] + 1) % VOCAB
    other, _ = call(graphdef, params, changed, info)
    np.testing.assert_array_equal(other[:, :8], logits[:, :8])
    np.testing.assert_allclose(decoded(graphdef, params, (3, 7, 1)), logits, **CLOSE)


@functools.partial(jax.jit, static_argnames=("graphdef", "lengths"))
def decoded(graphdef, params, lengths):
    """Logits of every token of the first rows: prompts of these lengths, then steps."""
    model, rows = nnx.merge(graphdef, params), jnp.arange(len(lengths))
    x, start = jnp.asarray(tokens()[: len(lengths)]), jnp.asarray(lengths)
    state = model.init_state(len(lengths), LEN, jnp.float32)
    out, state = model.prefill(x, whole_rows(x, start), state)

    def move(carry, _):
        state, place, out = carry
        at, active = jnp.minimum(place, LEN - 1), place < LEN
        info = TokenInfo(at, jnp.ones_like(at), active)
        logits, state = model.step(x[rows, at], info, state)
        out = out.at[rows, jnp.where(active, at, LEN)].set(logits, mode="drop")
        return (state, place + active, out), None

    (_, _, out), _ = jax.lax.scan(move, (state, start, out), length=LEN - min(lengths))
    return out


def test_rows_at_different_depths_decode_as_in_the_full_pass():
    graphdef, params = drawn(MoRConfig(**SMALL, kv="shared", sampling="aux_router", router="mlp"))
    info = whole_rows(tokens()[:3])
    logits, out = call(graphdef, params, tokens()[:3], info)
    assert set(np.asarray(out.depth).flat) == {1, 2, 3}
    np.testing.assert_allclose(decoded(graphdef, params, (5, 2, 9)), logits, **CLOSE)


def test_shared_keys_save_their_share_of_the_state():
    def size(**options):
        config = MoRConfig(**SMALL, **options)
        model = nnx.eval_shape(lambda: config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0)))
        return state_bytes(model, 1, 4096, jnp.float32)

    assert size(kv="shared") / size() == pytest.approx(1 / 3, rel=0.01)


# ---- losses, and what moves once per update


def test_a_second_router_learns_alone():
    """Its loss moves nothing else, and the loss of the tokens does not move it."""
    graphdef, params = drawn(MoRConfig(**SMALL, sampling="aux_router", capacities=(0.8, 0.5, 0.2)))

    @jax.jit
    def gradients(params):
        def losses(params):
            logits, out = call(graphdef, params, tokens(), whole_rows(tokens()), training=True)
            return jnp.mean(jnp.sin(logits)), sum(s / w for s, w in out.losses.values())

        _, back = jax.vjp(losses, params)
        one, zero = jnp.float32(1), jnp.float32(0)
        return back((one, zero))[0], back((zero, one))[0]

    of_tokens, of_choice = gradients(params)
    second = [g["recursions"].pop("aux_routers") for g in (of_tokens, of_choice)]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((of_choice, second[0])))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(second[1]))


def train_state(config):
    graphdef, params = drawn(config)
    optimizer = optax.sgd(0.0)
    model = nnx.merge(graphdef, params)
    # Copies: a step consumes its state.
    state = TrainState(
        jnp.zeros((), jnp.int32),
        jax.tree.map(jnp.array, params),
        optimizer.init(params),
        model.init_extra(),
        jax.random.key(1),
    )
    return graphdef, optimizer, state


def next_token_batch():
    weights = np.ones(tokens().shape, np.float32)
    info = jax.device_get(whole_rows(tokens()))
    return Batch(tokens(), np.roll(tokens(), -1, axis=1), weights, info)


def test_the_bias_moves_once_per_update_whatever_the_microbatches():
    config = MoRConfig(**SMALL, routing="token", balance="loss_free", bias_rate=0.01)
    graphdef, optimizer, state = train_state(config)
    before = np.asarray(state.params["recursions"]["bias"])
    _, out = call(graphdef, state.params, tokens(), whole_rows(tokens()))
    loads = np.bincount(np.asarray(out.depth - 1).flat, minlength=3)
    step = make_train_step(graphdef, optimizer, lambda _: 0.0, accumulation=2)
    state, _ = step(state, next_token_batch())
    np.testing.assert_array_equal(state.extra["load"], 0)
    bias = state.params["recursions"]["bias"]
    np.testing.assert_allclose(bias, moved_bias(before, loads, 0.01), rtol=1e-6)


@pytest.mark.slow
def test_capacities_fall_along_the_warm_up_and_the_gap_is_measured():
    config = MoRConfig(**SMALL, capacity_warmup_steps=4, warmup_rungs=3, gap_every=2)
    graphdef, optimizer, state = train_state(config)
    params = jax.tree.map(jnp.array, state.params)
    step = make_train_step(graphdef, optimizer, lambda _: 0.0)
    third, gaps = [], []
    for _ in range(5):
        state, metrics = step(state, next_token_batch())
        third.append(float(metrics["recursion_3_load"]))
        gaps.append(float(metrics["mode_gap"]))
    # Half a cosine from 1 to 1/3, up to the next of the sizes 1/3, 2/3, 1.
    np.testing.assert_allclose(third, [1, 1, 2 / 3, 2 / 3, 1 / 3], rtol=1e-6)
    assert gaps[0] == gaps[1] and gaps[2] == gaps[3] and gaps[1] != gaps[2]
    assert state.extra["step"] == 5
    batch = next_token_batch()
    weights = np.ones(tokens().shape, np.float32)
    weights[:, -1] = 0  # the last token's successor is not in the row
    gap = jax.jit(lambda p, b: mode_gap(nnx.merge(graphdef, p), b))
    np.testing.assert_allclose(
        gaps[4], gap(params, batch._replace(loss_weights=weights)), rtol=1e-5
    )


# ---- sizes, counts, bad input


@pytest.mark.parametrize(
    ("name", "millions", "shared"),
    # What the embedding of 49152 tokens leaves, and layers of which one is stored once.
    [
        ("mor_135m", 38.94, 9),
        ("mor_360m", 117.99, 10),
        ("mor_360m:2", 167.15, 15),
        ("mor_730m", 251.70, 8),
        ("mor_1b7", 604.02, 7),
    ],
)
def test_published_sizes(name, millions, shared):
    config = load_config(name).model
    model = nnx.eval_shape(lambda: config.build(vocab_size=49152, rngs=nnx.Rngs(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))))
    assert round((total - 49152 * config.width) / 1e6, 2) == millions
    assert config.layout().base_depth == shared


def test_flops_count_what_the_shares_leave():
    options = {"width": 64, "num_heads": 4, "num_kv_heads": 4, "num_layers": 6, "sharing": "cycle"}
    full, routed = (
        forward_flops(MoRConfig(**options, routing=r), vocab_size=1, seq_len=3000)
        for r in ("none", "expert")
    )
    width, mlp = 64, MoRConfig(**options).inner_mlp_width()
    taken = [3000, 2000, 1000]
    layer = [n * (2 * width * (4 * width + 3 * mlp) + 4 * width * (n + 1) / 2) for n in taken]
    alive = [3000, 3000, 2000]
    wanted = (2 * sum(layer) + 2 * width * sum(alive)) / 3000 + 2 * width
    assert routed == pytest.approx(wanted, rel=1e-9)
    assert full == pytest.approx(2 * 3 * layer[0] / 3000 + 2 * width, rel=1e-9)
    shared = MoRConfig(**options, kv="shared")
    assert forward_flops(shared, vocab_size=1, seq_len=3000) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "experts"}, "model.routing: got 'experts', expected one of none, expert"),
        ({"sharing": "middle_sequence"}, "model.sharing: got 'middle_sequence', expected one of"),
        ({"num_layers": 2}, "num_layers: got 2, expected at least 3 for num_recursions=3"),
        ({"capacities": (1.0, 0.5)}, "model.capacities: got 2 entries, expected 3"),
        ({"capacities": (0.5, 1.0, 0.5)}, "expected shares in (0, 1], none above the one before"),
        ({"score": "softmax"}, "model.score: got 'softmax', expected one of sigmoid, tanh"),
        ({"router": "deep"}, "router: got 'deep', expected one of linear, mlp"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected more than 0"),
        ({"kv": "none"}, "model.kv: got 'none', expected one of recursion, shared"),
        (
            {"kv": "shared", "evaluation_capacity": CapacityConfig(pooled=True)},
            "model.capacity.pooled: got True with kv='shared', expected False",
        ),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError) as error:
        MoRConfig(**{**SMALL, **options}).build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
    assert message in str(error.value)
