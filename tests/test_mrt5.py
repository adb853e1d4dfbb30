"""MrT5: hard deletion, what every row keeps, the controller, distances, noise, errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_laws
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models.mrt5 import MrT5, MrT5Config
from effattn.nn.compact import CapacityConfig
from effattn.nn.delete_gate import Controller, DeleteGate, Gate, deletion_loss, keep_one
from effattn.nn.t5 import distance_buckets, softmax_or_one_more
from effattn.train.flops import forward_flops

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_decoder_layers": 1,
    "gate_layer": 1,
    "width": 16,
    "num_heads": 2,
    "head_dim": 8,
    "mlp_width": 24,
    "source_length": 8,
}
TOKENS = np.random.default_rng(0).integers(0, 29, (3, 14), dtype=np.int32)


def build(**options: Any) -> MrT5:
    return MrT5Config(**{**SMALL, **options}).build(vocab_size=29, rngs=nnx.Rngs(0))


def with_gate(model: MrT5, bias: float) -> MrT5:
    assert model.gate.project.bias is not None
    model.gate.project.bias[...] = jnp.full((1,), bias)
    model.gate.project.kernel[...] = 3 * model.gate.project.kernel[...]
    return model


# ---- deletion


@pytest.mark.parametrize(
    "law",
    [
        test_laws.law_prefill_then_steps_equals_full_pass,
        test_laws.law_future_tokens_do_not_change_past_outputs,
        test_laws.law_packed_equals_unpacked,
    ],
)
def test_hard_deletion_keeps_the_laws(law, monkeypatch):
    options = test_laws.SMALL_MODELS["mrt5"] | {"deletion": "hard", "num_decoder_layers": 1}
    monkeypatch.setitem(test_laws.VARIANTS, "model:mrt5_hard", ("model:mrt5", options))
    law(test_laws.subject("model:mrt5_hard"))


def test_a_bucket_computes_what_exact_does():
    lengths = np.array([14, 10, 9])

    @jax.jit
    def run() -> list[Any]:
        outs = []
        for mode in ("exact", "bucket"):
            capacity = CapacityConfig(mode=mode, rungs=(0.25, 0.5, 1.0))
            model = with_gate(build(capacity=capacity), 0.0)
            out = model(TOKENS, whole_rows(TOKENS, lengths))
            outs.append((out.hidden, out.metrics))
        return outs

    (exact, _), (bucket, metrics) = run()
    np.testing.assert_allclose(bucket, exact, rtol=0, atol=1e-5)
    assert metrics["kept_capacity"] < 3 * 14 and metrics["kept_overflow"] == 0
    assert 0 < metrics["deleted_share"] < 1


def test_a_gate_wide_open_leaves_nothing_between_soft_and_hard():
    @jax.jit
    def run() -> list[jax.Array]:
        # A mask of -30 sigmoid(-40) is 0 beside any score.
        return [
            with_gate(build(deletion=d), 40.0)(TOKENS, whole_rows(TOKENS)).hidden
            for d in ("soft", "hard")
        ]

    soft, hard = run()
    np.testing.assert_allclose(soft, hard, rtol=0, atol=1e-5)


def test_an_empty_document_keeps_its_first_token_and_no_other_does():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]])
    info = TokenInfo(np.zeros_like(segments), segments, segments > 0)
    kept = np.array([[0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    wanted = np.array([[0, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(jax.jit(keep_one)(kept, info), wanted)


def test_a_model_that_deletes_all_still_answers():
    model = with_gate(build(), -100.0)
    out = jax.jit(lambda: model(TOKENS, whole_rows(TOKENS)))()
    assert np.all(np.isfinite(out.hidden)) and out.metrics["kept_count"] == 3


def test_the_source_is_silent_and_the_rest_is_not():
    model = build()
    hidden = jax.jit(lambda: model(TOKENS, whole_rows(TOKENS)).hidden)()
    spoken = np.any(np.asarray(hidden), axis=-1)
    np.testing.assert_array_equal(spoken, np.tile(np.arange(14) >= 7, (3, 1)))


# ---- losses


def test_the_controller_raises_the_weight_until_enough_is_deleted():
    state = Controller.start()
    gains = {"proportional_gain": 0.5, "integral_gain": 1e-2}
    state = state.update(jnp.array(0.1), 0.5, **gains)
    np.testing.assert_allclose(state.proportional, 0.1 * 0.5 * 0.4, rtol=1e-6)
    np.testing.assert_allclose(state.integral, 1e-2 * 0.4, rtol=1e-6)
    np.testing.assert_allclose(state.weight, state.proportional + state.integral, rtol=1e-6)
    for _ in range(50):
        state = state.update(jnp.array(0.9), 0.5, **gains)
    assert state.weight == 0 and state.integral < 0


def test_training_hands_the_controller_on_and_evaluation_does_not():
    model = build(score_weight=0.5, gumbel=True)
    info = whole_rows(TOKENS)

    @jax.jit
    def run() -> tuple[Any, Any, Any]:
        start = model.init_extra()
        trained = model(TOKENS, info, key=jax.random.key(0), extra=start)
        again = model(TOKENS, info, key=jax.random.key(1), extra=trained.extra)
        return trained, again, model(TOKENS, info, extra=trained.extra)

    trained, again, evaluated = run()
    error = 0.5 - trained.metrics["deleted_share"]
    np.testing.assert_allclose(trained.extra.weight, max(0, 0.05 * error + 1e-5 * error), rtol=1e-4)
    assert trained.losses["gate_loss"][0] == 0 and again.losses["gate_loss"][0] < 0
    assert again.metrics["gate_weight"] == trained.extra.weight == evaluated.extra.weight
    assert set(again.losses) == {"gate_loss", "score_loss"} and again.losses["score_loss"][1] > 0
    assert build(deletion_rate=None).init_extra() is None


def test_the_gate_loss_is_the_mean_over_valid_tokens():
    mask = jnp.array([[-30.0, 0.0, -10.0]])
    total, weight = deletion_loss(Gate(mask, mask, mask > -15), jnp.array([[True, True, False]]))
    assert weight == 2 and total / weight == -15


def test_noise_flips_gates_that_are_undecided():
    gate = DeleteGate(4, scale=-30.0, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    gate.project.kernel[...] = jnp.zeros((4, 1))
    x = jnp.ones((1, 4000, 4))
    kept = gate(x, whole_rows(x), key=jax.random.key(0)).kept
    # A logit of 1 is kept by the sigmoid's share; its standard deviation here is 0.007.
    np.testing.assert_allclose(jnp.mean(kept), jax.nn.sigmoid(1.0), atol=0.03)
    assert np.all(gate(x, whole_rows(x)).kept)


# ---- T5's parts


def test_buckets_are_exact_nearby_and_logarithmic_beyond():
    distance = jnp.array([-200, -128, -16, -3, 0, 3, 16, 200])
    sizes = {"num_buckets": 32, "max_distance": 128}
    # By hand: 8 exact buckets a side; 16 is 8 + log(16 / 8) / log(128 / 8) 8 = 10.
    both = distance_buckets(distance, **sizes, bidirectional=True)
    np.testing.assert_array_equal(both, [15, 15, 10, 3, 0, 19, 26, 31])
    past = distance_buckets(distance, **sizes, bidirectional=False)
    np.testing.assert_array_equal(past, [31, 31, 16, 3, 0, 0, 0, 0])


def test_one_more_in_the_denominator():
    scores = jnp.array([[2.0, -1.0], [-80.0, -90.0], [200.0, 1.0]])
    wanted = np.exp(np.float64(scores)) / (1 + np.exp(np.float64(scores)).sum(-1, keepdims=True))
    np.testing.assert_allclose(softmax_or_one_more(scores, True), wanted, rtol=1e-6, atol=1e-30)


# ---- configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_layer": 0}, "model.gate_layer: got 0, expected at least 1"),
        ({"gate_layer": 2}, "model.num_layers: got 2, expected at least 3"),
        ({"gate_scale": 1.0}, "gate_scale: got 1.0, expected less than 0"),
        ({"deletion": "none"}, "model.deletion: got 'none', expected one of hard, soft"),
        ({"deletion_rate": 1.0}, "model.deletion_rate: got 1.0, expected 0 <= share < 1"),
        ({"capacity": CapacityConfig(pooled=True)}, "model.capacity.pooled: got True"),
        ({"capacity": CapacityConfig(mode="demote")}, "model.capacity.mode: got 'demote'"),
        ({"num_decoder_layers": 0}, "model.num_decoder_layers: got 0"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**options))


def test_byt5_small_has_its_parameters():
    """300M of the paper, and the gate: a norm, a row and a bias."""
    made = nnx.eval_shape(lambda: MrT5Config().build(vocab_size=384, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(made)))
    assert count == 299_637_760 + 2 * 1472 + 1


def test_flops_fall_with_what_is_deleted():
    def count(rate: float) -> float:
        config = MrT5Config(**{**SMALL, "deletion_rate": rate})
        return forward_flops(config, vocab_size=11, seq_len=16)

    source, target, inner = 8, 9, 16
    weights = 2 * 16 * (4 * inner + 3 * 24)
    encoder = 2 * source * (weights + 4 * inner * source)
    decoder = target * (weights + 4 * inner * 5 + 4 * 16 * inner + 4 * inner * source)
    whole = encoder + decoder + source * 4 * 16 * inner + target * 2 * 16 * 11
    assert count(0.0) == pytest.approx(whole / 16) and count(0.5) < 0.85 * count(0.0)
