"""Images and videos: the digits, the mixer on grids of 1-3 axes, the model that classifies them."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import whole_rows
from effattn.config import load_config
from effattn.data import digits
from effattn.data.config import DataConfig
from effattn.data.pipeline import open_dataset
from effattn.models.nat import NATConfig
from effattn.nn.mixers.neighborhood import NeighborhoodConfig

DIGITS = DataConfig(source="digits", seq_len=64, batch_size=50, validation_examples=360)


def redrawn(make) -> nnx.Module:
    """The module of `make(rngs)` with parameters from N(0, 0.3)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype),
            nnx.to_pure_dict(state),
        ),
    )


# ---- the digits


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    dataset = open_dataset(DIGITS)
    assert dataset.vocab_size == 17
    batch = dataset.training_rows(0).batch(np.arange(5))
    where = dataset.training_rows(0).where(np.arange(5))
    for row, place in enumerate(where):
        image = place["image"]
        assert place["split"] == "train"
        np.testing.assert_array_equal(batch.tokens[row].reshape(8, 8), theirs.images[image])
        assert batch.targets[row, -1] == theirs.target[image]
    np.testing.assert_array_equal(batch.loss_weights, np.eye(64)[[-1] * 5])


def test_held_out_digits_are_never_trained_on_and_each_is_scored_once():
    dataset = open_dataset(DIGITS)
    held_out = [
        w["image"]
        for w in dataset._part_rows(dataset.parts[0], "validation", None).where(np.arange(360))
    ]
    batches = list(dataset.evaluation_batches("validation"))
    assert sum(b.loss_weights.sum() for b in batches) == 360 and len(batches) == 8
    assert [len(set(held_out)), len(held_out)] == [360, 360]
    epochs = [
        [w["image"] for w in dataset.training_rows(3).where(np.arange(1437) + 1437 * epoch)]
        for epoch in (0, 1)
    ]
    assert set(epochs[0]) == set(epochs[1]) == set(range(1797)) - set(held_out)
    assert epochs[0] != epochs[1]
    assert sum(b.loss_weights.sum() for b in dataset.evaluation_batches("train")) == 1437


def test_the_split_hangs_on_the_data_seed_alone():
    one, other = open_dataset(DIGITS), open_dataset(dataclasses.replace(DIGITS, seed=1))
    assert one.identity != other.identity
    assert one.identity == open_dataset(dataclasses.replace(DIGITS, batch_size=7)).identity
    assert one.training_rows(0).where(np.arange(9)) != one.training_rows(1).where(np.arange(9))
    assert one.describe()["sources"][0]["images"] == {"train": 1437, "validation": 360}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 63}, "data.seq_len: got 63, expected one of 64"),
        ({"vocab_size": 16}, "data.vocab_size: got 16, expected one of None, 17"),
        ({"validation_examples": 1797}, "data.validation_examples: got 1797, expected fewer than"),
        ({"mixture": ("digits", "mqar")}, "data.mixture: 'digits' are images"),
    ],
)
def test_digits_that_do_not_fit_are_a_sentence(change, message):
    with pytest.raises(ValueError) as error:
        open_dataset(dataclasses.replace(DIGITS, **change))
    assert message in str(error.value)


def test_a_missing_scikit_learn_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(ValueError, match=r"scikit-learn is not installed; .* effattn\[vision\]"):
        open_dataset(DIGITS)


# ---- the mixer on grids


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({"axes": (3, 4, 5), "window": (2, 3, 3), "causal": (True, False, False)}, (3, 4, 5)),
        ({"axes": (6, 5), "window": (2,), "dilation": (2, 1), "causal": (False,)}, (6, 5)),
        ({"window": (3,), "stride": (3,)}, (12,)),
    ],
    ids=["video", "image", "text"],
)
def test_a_grid_and_its_row_of_tokens_mix_alike(options, axes):
    config = NeighborhoodConfig(num_heads=2, num_kv_heads=1, **options)
    layer = redrawn(lambda rngs: config.build(24, rngs=rngs))
    x = jax.random.normal(jax.random.key(0), (2, *axes, 24))
    row = x.reshape(2, -1, 24)
    grid, sequence = jax.jit(lambda m: (m.grid(x), m(row, whole_rows(row))[0]))(layer)
    # Tiles against rows: float32 sums in another order.
    np.testing.assert_allclose(grid.reshape(sequence.shape), sequence, atol=2e-5)
    assert layer.causal == layer.decodes == all(layer.mask.causal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": (False,)}, "axes: got None, expected the lengths of the grid"),
        ({"axes": (4, 4), "window": (3, 3, 3)}, "window: got 3 entries, expected 2"),
        ({"axes": (4, 4), "window": (5,)}, "larger than the axis, 4"),
        ({"num_heads": 5}, "width: got 16, expected a multiple of num_heads=5"),
        ({"axes": (8, 8), "rotary_dim": 2}, "rotary_dim: got 2, expected a multiple of"),
        ({"rotary_dim": 6}, "rotary_dim: got 6, expected at most head_dim=4"),
    ],
)
def test_a_mixer_that_does_not_fit_says_why(options, message):
    with pytest.raises(ValueError) as error:
        nnx.eval_shape(lambda: NeighborhoodConfig(**options).build(16, rngs=nnx.Rngs(0)))
    assert message in str(error.value)


def test_what_sees_later_tokens_does_not_decode():
    config = NeighborhoodConfig(axes=(4, 4), window=(3,), causal=(True, False))
    layer = nnx.eval_shape(lambda: config.build(16, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="decoding wants every axis causal"):
        layer.init_state(1, 16, jnp.float32)
    with pytest.raises(ValueError, match=r"got a grid of \(4, 5\), expected one of \(4, 4\)"):
        layer.grid(jnp.ones((1, 4, 5, 16)))


# ---- the model


def test_a_video_is_classified_with_three_axes():
    config = NATConfig(
        axes=(4, 9, 6),
        channels=2,
        depths=(1, 2),
        width=24,
        head_dim=6,
        window=3,
        dilated=True,
        stem_strides=(1, 2),
    )
    # The stem halves 4 x 9 x 6 once, the second stage once more.
    assert config.grids() == [(2, 5, 3), (1, 3, 2)] and config.widths() == [12, 24]
    model = redrawn(lambda rngs: config.build(vocab_size=9, rngs=rngs))
    tokens = jax.random.randint(jax.random.key(0), (3, 4 * 9 * 6 * 2), 0, 9)

    @jax.jit
    def run(model, tokens):
        hidden = model(tokens, whole_rows(tokens)).hidden
        return hidden, model.logits(hidden[:, -1])

    hidden, logits = run(model, tokens)
    assert hidden.shape == (*tokens.shape, 24) and logits.shape == (3, 9)
    np.testing.assert_array_equal(hidden[:, 0], hidden[:, -1])
    # Each image answers for itself, and every pixel counts.
    other = tokens.at[1, 100].set((tokens[1, 100] + 4) % 9)
    changed = np.abs(np.asarray(run(model, other)[1] - logits)).max(1)
    assert changed[1] > 1e-4 and changed[0] == changed[2] == 0


def test_nat_mini_has_its_published_size():
    model = nnx.eval_shape(lambda: NATConfig().build(vocab_size=1000, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) / 1e6
    # 20.0 with relative position biases, layer norms and biases of the projections.
    assert abs(parameters / 20.0 - 1) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 48}, "model.width: got 48, expected a multiple of"),
        ({"depths": ()}, "len(model.depths): got 0"),
        ({"depths": (1, 0)}, "model.depths: got 0, expected at least 1"),
    ],
)
def test_a_model_that_does_not_fit_says_why(options, message):
    config = NATConfig(**{"depths": (1, 1), "width": 64, **options})
    with pytest.raises(ValueError) as error:
        nnx.eval_shape(lambda: config.build(vocab_size=3, rngs=nnx.Rngs(0)))
    assert message in str(error.value)


def test_rows_of_another_size_are_refused():
    config = NATConfig(axes=(4, 4), channels=1, depths=(1,), width=32)
    model = nnx.eval_shape(lambda: config.build(vocab_size=3, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((2, 15), jnp.int32)
    with pytest.raises(ValueError, match="tokens: got rows of 15, expected 16"):
        jax.eval_shape(lambda m: m(tokens, whole_rows(tokens)), model)
    with pytest.raises(ValueError, match="it has no state and generates nothing"):
        model.init_state(1, 1)


@pytest.mark.slow
def test_the_config_reads_the_digits(tmp_path):
    from effattn.train.loop import train

    result = train(load_config("nat_digits", []), tmp_path)
    assert result["validation"]["accuracy"] >= 0.95


def test_a_trained_model_is_evaluated_by_the_command_line(tmp_path, capsys):
    from effattn.cli import main

    sizes = ["depths=(1,)", "width=32", "head_dim=8"]
    options = [f"--config.model.{size}" for size in sizes]
    options += ["--config.train.steps=2", "--config.data.validation_examples=64"]
    assert main(["train", "--config=nat_digits", f"--workdir={tmp_path}", *options]) == 0
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "digits: validation split, 64 targets" in said and "accuracy" in said
    assert main(["generate", f"--workdir={tmp_path}", "--prompt=1"]) != 0
