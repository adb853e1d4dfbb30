"""The loss of a prefix that all tokens see: masked tokens inside, the next token after."""

import dataclasses

import numpy as np
import pytest
from train_setup import corpus, experiment, losses

from effattn.data.config import DataConfig
from effattn.data.pipeline import Dataset, open_dataset
from effattn.models.based import BasedModelConfig
from effattn.train.loop import train

PREFIX, LEN = 10, 32


def dataset(**more) -> Dataset:
    settings = {"source": corpus(), "seq_len": LEN, "validation_fraction": 0.2, "batch_size": 64}
    return open_dataset(DataConfig(**{**settings, "prefix_length": PREFIX, **more}))


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_masked_tokens_are_to_be_found_and_the_rest_of_a_prefix_has_no_loss(packing):
    plain = dataset(packing=packing, prefix_length=0)
    prefixed = dataset(packing=packing)
    index = np.arange(200)
    before, after = (d.training_rows(3).batch(index) for d in (plain, prefixed))
    mask_id = plain.vocab_size
    assert prefixed.vocab_size == mask_id + 1 and before.tokens.max() < mask_id
    prefix = before.info.valid & (before.info.positions < PREFIX)
    masked = after.tokens == mask_id
    assert not np.any(masked & ~prefix)
    assert masked.sum() / prefix.sum() == pytest.approx(0.15, abs=0.02)
    np.testing.assert_array_equal(after.targets[masked], before.tokens[masked])  # not shifted
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(getattr(after, name)[~masked], getattr(before, name)[~masked])
    assert not np.any(after.loss_weights[prefix & ~masked])
    np.testing.assert_array_equal(after.loss_weights[~prefix], before.loss_weights[~prefix])
    inside = after.loss_weights[masked].sum()
    assert inside / after.loss_weights[~prefix].sum() == pytest.approx(0.25, rel=0.1)


def test_evaluation_masks_nothing_and_scores_what_comes_after_the_prefix():
    plain, prefixed = dataset(prefix_length=0), dataset()
    pairs = zip(*(d.evaluation_batches("validation") for d in (plain, prefixed)), strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(after.tokens, before.tokens)
        scored = before.info.positions >= PREFIX
        np.testing.assert_array_equal(after.loss_weights, before.loss_weights * scored)
    assert plain.num_bytes("validation") and prefixed.num_bytes("validation") is None


def test_a_row_is_the_same_in_any_batch():
    rows = dataset().training_rows(0)
    together = rows.batch(np.arange(8)).tokens
    alone = [rows.batch(np.asarray([i])).tokens[0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefix_length": LEN}, "prefix_length: got 32, expected at least 0 and less than"),
        ({"prefix_masked": 1.0}, "prefix_masked, data.prefix_weight: got 1.0 and 0.25"),
        ({"source": "copy"}, "prefix_length: got 10, but 'copy' says by itself"),
    ],
)
def test_a_mistake_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataset(**wrong)


def test_a_model_with_a_prefix_trains_on_this_loss_and_on_no_other(tmp_path):
    model = BasedModelConfig(
        num_layers=1, width=16, num_heads=2, feature_dim=4, pattern=("prefix",), enc_length=6
    )
    data = {"source": corpus(), "seq_len": 16, "validation_fraction": 0.2, "prefix_length": 6}
    run = experiment(model=model, data=data, steps=2)
    plain = dataclasses.replace(run, data=dataclasses.replace(run.data, prefix_length=0))
    with pytest.raises(ValueError, match="data.prefix_length: got 0, expected at least 6"):
        train(plain, tmp_path / "plain")
    short = dataclasses.replace(run, data=dataclasses.replace(run.data, seq_len=6, prefix_length=5))
    with pytest.raises(ValueError, match="data.seq_len: got 6, expected more than the 6 tokens"):
        train(short, tmp_path / "short")
    assert train(run, tmp_path / "run")["status"] == "finished"
    assert np.all(np.isfinite(list(losses(tmp_path / "run").values())))
