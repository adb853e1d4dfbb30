"""Batches: coverage, packing, mixtures, hosts, evaluation and exact resume."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from effattn.batch import Batch
from effattn.data.config import PACKINGS, DataConfig
from effattn.data.mixture import interleave, share_of
from effattn.data.packing import plan_rows
from effattn.data.pipeline import Dataset, open_dataset
from effattn.data.randomness import key_of, permute, uniform

T = 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Three folders of short and long documents, one of a single byte."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, size in (("a", 30), ("b", 60), ("c", 20)):
        (root / name).mkdir()
        for number in range(size):
            length = 1 if number == 0 else rng.integers(1, 120)
            text = rng.integers(32, 127, length).astype(np.uint8).tobytes()
            (root / name / f"{number:02d}.txt").write_bytes(text)
    return root


def dataset(texts: Path, **more) -> Dataset:
    settings = {"source": str(texts / "a"), "cache_dir": str(texts / "cache"), "seq_len": T}
    return open_dataset(DataConfig(**{**settings, "validation_fraction": 0.2, **more}))


def all_rows(rows, epoch: int = 0) -> Batch:
    return rows.batch(np.arange(rows.num_rows) + epoch * rows.num_rows)


def assert_equal(a: Batch, b: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stack(*batches: Batch) -> Batch:
    return jax.tree.map(lambda *x: np.concatenate(x), *batches)


VARIANTS = {
    "stream": {},
    "documents": {"packing": "documents"},
    "mixture": {"mixture": ("a", "b", "c"), "mixture_weights": (0.3, 0.5, 0.2)},
    "packed mixture": {"mixture": ("a", "b"), "packing": "documents"},
    "mqar": {"source": "mqar", "num_pairs": 3, "vocab_size": 64},
    "copy": {"source": "copy"},
    "induction": {"source": "induction"},
    "set_disjointness": {"source": "set_disjointness", "set_sizes": (2, 3)},
}


@pytest.fixture(params=VARIANTS)
def variant(request, texts) -> Dataset:
    more = dict(VARIANTS[request.param])
    if "mixture" in more:
        more["mixture"] = tuple(str(texts / name) for name in more["mixture"])
    return dataset(texts, batch_size=4, **more)


# ---- every kind of dataset ------------------------------------------------------------------


def test_batches_have_the_stated_types(variant):
    iterator = variant.train_iterator(0)
    batch = next(iterator)
    iterator.close()
    kinds = [np.int32, np.int32, np.float32, np.int32, np.int32, bool]
    for array, kind in zip((*batch[:3], *batch.info), kinds, strict=True):
        assert isinstance(array, np.ndarray) and array.dtype == kind and array.shape == (4, T)
    assert batch.tokens.max() < variant.vocab_size
    assert ((batch.loss_weights == 0) | batch.info.valid).all()
    np.testing.assert_array_equal(batch.info.segment_ids > 0, batch.info.valid)


def test_resume_is_exact_at_any_point(variant):
    """150 batches pass the end of an epoch of every source."""
    iterator = variant.train_iterator(7)
    batches, states = [], []
    for _ in range(150):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    iterator.close()
    per_epoch = variant.batches_per_epoch
    assert per_epoch is None or per_epoch < 145
    for point in [0, 1, *random.Random(0).sample(range(145), 4)]:
        resumed = variant.train_iterator(7)
        resumed.set_state(json.loads(states[point]))
        for expected in batches[point : point + 4]:
            assert_equal(next(resumed), expected)
        resumed.set_state(json.loads(states[140]))
        assert_equal(next(resumed), batches[140])
        resumed.close()


def test_chosen_rows_are_those_of_the_whole_batch(variant):
    size = variant.config.batch_size
    one, *parts = [
        variant.train_iterator(1, rows=np.array_split(np.arange(size), count)[index])
        for count in (1, 2, 4)
        for index in range(count)
    ]
    for _ in range(5):
        whole = next(one)
        rows = [next(part) for part in parts]
        assert_equal(stack(*rows[:2]), whole)
        assert_equal(stack(*rows[2:]), whole)
    for iterator in (one, *parts):
        iterator.close()


def test_prefetching_changes_nothing(variant):
    ahead = variant.train_iterator(3)
    variant.config.prefetch = 0
    plain = variant.train_iterator(3)
    for _ in range(6):
        assert_equal(next(ahead), next(plain))
    ahead.close()
    plain.close()


def test_other_seeds_give_other_batches(variant):
    first = [variant.training_rows(seed).batch(np.arange(8)).tokens for seed in (0, 1)]
    assert (first[0] != first[1]).any()
    other = open_dataset(replace(variant.config, seed=1))
    assert (other.training_rows(0).batch(np.arange(8)).tokens != first[0]).any()


def test_any_batch_size_evaluates_the_same_rows(variant):
    def rows(**how) -> Counter:
        found = Counter()
        for batch in variant.evaluation_batches("validation", **how):
            kept = batch.info.valid.any(1)
            arrays = (batch.tokens, batch.targets, batch.loss_weights, *batch.info)
            found.update(b"".join(a[i].tobytes() for a in arrays) for i in np.flatnonzero(kept))
            assert not batch.loss_weights[~kept].any()
        return found

    expected = rows()
    assert expected.total() > 4
    for size in (1, 3, 7, 1000):
        assert rows(batch_size=size) == expected
    in_parts = [rows(batch_size=4, rows=np.array(part)) for part in ([0, 3], [1, 2])]
    assert in_parts[0] + in_parts[1] == expected
    batches = variant.evaluation_batches("validation", 3)
    assert len(batches) == len(list(batches)) == len(list(batches))
    assert all(batch.tokens.shape == (3, T) for batch in batches)


def test_batch_identity_names_the_batch(variant):
    iterator = variant.train_iterator(5)
    for index in range(3):
        batch = next(iterator)
        about = variant.batch_identity(index, 5)
        assert iterator.get_state()["next_index"] - 1 == index == about["index"]
        assert about["sha256"] == hashlib.sha256(batch.tokens).hexdigest()
        assert len(about["rows"]) == 4
        json.dumps(about)
    iterator.close()


# ---- windows ------------------------------------------------------------------------------------


def test_stream_targets_are_the_next_tokens(texts):
    data = dataset(texts)
    tokens = data.parts[0].tokens["train"]
    rows = data.training_rows(0)
    batch = rows.batch(np.arange(10))
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    for row, place in enumerate(rows.where(np.arange(10))):
        window = tokens[place["start"] : place["start"] + T + 1]
        np.testing.assert_array_equal(batch.tokens[row], window[:-1])
        np.testing.assert_array_equal(batch.targets[row], window[1:])
    np.testing.assert_array_equal(batch.info.positions[3], np.arange(T))
    assert batch.loss_weights.all() and (batch.info.segment_ids == 1).all()


def test_an_epoch_of_windows_meets_almost_every_token_once(texts):
    data = dataset(texts)
    rows = data.training_rows(0)
    size = len(data.parts[0].tokens["train"])
    offsets = set()
    for epoch in range(6):
        index = np.arange(rows.num_rows) + epoch * rows.num_rows
        places = rows.where(index)
        starts = np.asarray([place["start"] for place in places])
        assert {place["epoch"] for place in places} == {epoch}
        seen = np.bincount((starts[:, None] + np.arange(T)).reshape(-1), minlength=size)
        assert seen.max() == 1 and (seen == 0).sum() <= 2 * T
        assert starts.max() + T < size
        offsets.add(starts.min())
        assert (np.diff(starts) < 0).any()
    assert len(offsets) > 2


@pytest.mark.parametrize("extra", [1, 2, T - 1, T, T + 1])
def test_windows_fit_the_smallest_corpora(texts, tmp_path, extra):
    np.save(tmp_path / "x.npy", np.arange(2 * (T + extra)))
    data = open_dataset(
        DataConfig(source=str(tmp_path / "x.npy"), cache_dir=str(tmp_path), seq_len=T,
                   validation_fraction=0.5)
    )  # fmt: skip
    batch = data.training_rows(0).batch(np.arange(50))
    np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
    assert batch.targets.max() < T + extra


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_predicts_every_token_once(texts, split, packing):
    """By pairs (token, target): those of the array, each as often as it stands there."""
    data = dataset(texts, packing=packing)
    tokens = np.asarray(data.parts[0].tokens[split], np.int64)
    expected = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for size in (1, 5, 8):
        found = Counter()
        for batch in data.evaluation_batches(split, size):
            known = batch.loss_weights == 1
            pairs = batch.tokens[known].tolist(), batch.targets[known].tolist()
            found.update(zip(*pairs, strict=True))
        assert found == expected
    # Every byte and every end of document is among them.
    assert expected.total() == data.num_bytes(split) + len(data.parts[0].documents[split])


def test_evaluation_of_a_mixture_is_that_of_its_parts(texts):
    names = [str(texts / name) for name in "abc"]
    mixture = dataset(texts, mixture=tuple(names))
    singles = [dataset(texts, source=name) for name in names]

    def pairs(data: Dataset) -> Counter:
        found = Counter()
        for batch in data.evaluation_batches("validation"):
            known = batch.loss_weights == 1
            found.update(zip(batch.tokens[known], batch.targets[known], strict=True))
        return found

    assert pairs(mixture) == sum(map(pairs, singles), Counter())
    assert mixture.num_bytes("validation") == sum(d.num_bytes("validation") for d in singles)
    assert len({mixture.identity, *(d.identity for d in singles)}) == 4


# ---- packed documents -----------------------------------------------------------------------


def segments_of(batch: Batch) -> list[tuple]:
    """(tokens, targets, weights) of every segment, checking how a row is laid out."""
    found = []
    for row in range(len(batch.tokens)):
        ids, positions = batch.info.segment_ids[row], batch.info.positions[row]
        last = ids.max()
        filled = np.count_nonzero(ids)
        assert (ids[filled:] == 0).all() and (np.diff(ids[:filled]) >= 0).all()
        assert set(ids[:filled].tolist()) == set(range(1, last + 1))
        assert not batch.loss_weights[row, filled:].any()
        assert not batch.info.valid[row, filled:].any()
        for segment in range(1, last + 1):
            at = ids == segment
            np.testing.assert_array_equal(positions[at], np.arange(at.sum()))
            kept = (batch.tokens, batch.targets, batch.loss_weights)
            found.append(tuple(tuple(array[row, at].tolist()) for array in kept))
    return found


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_token_of_every_document_is_packed_once(texts, split):
    data = dataset(texts, packing="documents")
    corpus = data.parts[0]
    tokens = np.asarray(corpus.tokens[split])
    expected = Counter()
    for start in corpus.documents[split][:, 0]:
        end = start + 1 + np.argmax(tokens[start + 1 :] == 256)
        for piece in range(start, end, T):
            stop = min(piece + T, end)
            inputs, targets = tokens[piece:stop], tokens[piece + 1 : stop + 1]
            expected[tuple(inputs.tolist()), tuple(targets.tolist()), (1.0,) * len(inputs)] += 1
    rows = data._part_rows(corpus, split, 0)
    orders = []
    for epoch in range(3):
        batch = all_rows(rows, epoch)
        assert Counter(segments_of(batch)) == expected
        orders.append(batch.tokens)
    assert (orders[0] != orders[1]).any() and (orders[1] != orders[2]).any()
    in_order = data._part_rows(corpus, split, None)
    assert Counter(segments_of(all_rows(in_order))) == expected
    assert not in_order.batch(np.arange(in_order.num_rows, in_order.num_rows + 3)).info.valid.any()
    full = sum(len(tokens) for tokens, _, _ in expected.elements())
    assert full / (rows.num_rows * T) > 0.9


def test_without_ends_what_follows_a_document_has_no_weight(tmp_path):
    for number in range(20):
        np.save(tmp_path / f"{number}.npy", np.arange(30) + 100 * number)
    data = open_dataset(
        DataConfig(source=str(tmp_path / "*.npy"), cache_dir=str(tmp_path / "cache"), seq_len=T,
                   packing="documents", validation_fraction=0.2)
    )  # fmt: skip
    for split, count in (("train", 16), ("validation", 4)):
        rows = data._part_rows(data.parts[0], split, 0)
        segments = segments_of(all_rows(rows))
        weights = Counter(w for _, _, weights in segments for w in weights)
        assert weights == {1.0: 29 * count, 0.0: count}
        for tokens, targets, weights in segments:
            for token, target, weight in zip(tokens, targets, weights, strict=True):
                assert weight == (token % 100 != 29)
                assert target == token + 1 if weight else target == 0


@pytest.mark.parametrize("seq_len", [1, 5, 64, 512])
def test_planned_rows_hold_every_length_and_are_well_filled(seq_len):
    rng = np.random.default_rng(seq_len)
    for skew in (1, 4):
        lengths = 1 + (rng.random(5000) ** skew * seq_len).astype(int)
        plan = plan_rows(lengths, seq_len)
        got = Counter()
        for recipe, rows in plan:
            assert sum(length * count for length, count in recipe) <= seq_len and rows > 0
            for length, count in recipe:
                got[length] += count * rows
        assert got == Counter(lengths.tolist())
        num_rows = sum(rows for _, rows in plan)
        assert lengths.sum() / (num_rows * seq_len) > 0.97


# ---- mixtures and draws -------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.3), (5, 3, 2), (0.001, 0.999), (1, 2, 3, 4)])
def test_any_stretch_of_a_mixture_has_its_proportions(weights):
    share = np.asarray(weights) / sum(weights)
    for start in (0, 12345, 10**12):
        source, inside = interleave(np.arange(start, start + 3000), share_of(weights))
        for k in range(len(weights)):
            own = inside[source == k]
            np.testing.assert_array_equal(own, own[0] + np.arange(len(own)) if len(own) else own)
            count = np.cumsum(source == k)
            assert np.abs(count - share[k] * np.arange(1, 3001)).max() < 2
            if start == 0 and len(own):
                assert own[0] == 0


def test_a_mixture_draws_from_its_sources(texts):
    names = tuple(str(texts / name) for name in "ab")
    data = dataset(texts, mixture=names, mixture_weights=(3.0, 1.0), batch_size=8)
    rows = data.training_rows(0)
    where = rows.where(np.arange(80))
    assert Counter(place["source"] for place in where) == {names[0]: 60, names[1]: 20}
    batch = rows.batch(np.arange(80))
    for row, place in enumerate(where):
        corpus = data.parts[names.index(place["source"])]
        window = corpus.tokens["train"][place["start"] : place["start"] + T]
        np.testing.assert_array_equal(batch.tokens[row], window)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permute_is_a_permutation_of_its_own_per_epoch(size):
    orders = set()
    for epoch in range(4):
        order = permute(np.arange(size), size, key_of("test"), np.full(size, epoch))
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
        orders.add(order.tobytes())
    assert len(orders) == 4 or size < 64


def test_draws_are_uniform_and_unrelated():
    draws = uniform(key_of("test"), np.arange(20000), 4)
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03


def test_orbax_keeps_the_iterators_place(texts, tmp_path):
    import grain
    import orbax.checkpoint as ocp

    data = dataset(texts)
    iterator = data.train_iterator(0)
    for _ in range(5):
        next(iterator)
    with ocp.CheckpointManager(tmp_path.resolve()) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = next(iterator)
        fresh = data.train_iterator(0)
        restore = grain.checkpoint.CheckpointRestore(fresh)
        manager.restore(5, args=ocp.args.Composite(data=restore))
        assert_equal(next(fresh), expected)
    iterator.close()
    fresh.close()
