"""Synthetic tasks: the answers are those that an independent reader finds."""

import dataclasses

import numpy as np
import pytest

from effattn.data.config import TASKS, DataConfig
from effattn.data.pipeline import open_dataset


def task(name: str, **more):
    settings = {"source": name, "seq_len": 128, "batch_size": 32}
    return open_dataset(DataConfig(**(settings | more)))


def examples(dataset, count: int = 200, split: str = "train"):
    batch = dataset._part_rows(dataset.parts[0], split, 0).batch(np.arange(count))
    return zip(batch.tokens.tolist(), batch.targets.tolist(), batch.loss_weights, strict=True)


@pytest.mark.parametrize("num_pairs, vocab_size, seq_len", [(16, 512, 128), (4, 20, 17), (1, 4, 8)])
def test_mqar_answers_are_what_a_reader_recalls(num_pairs, vocab_size, seq_len):
    dataset = task("mqar", num_pairs=num_pairs, vocab_size=vocab_size, seq_len=seq_len)
    for tokens, targets, weights in examples(dataset):
        memory = {}
        for place in range(0, 2 * num_pairs, 2):
            key, value = tokens[place : place + 2]
            assert 1 <= key < vocab_size // 2 <= value < vocab_size
            memory[key] = value
        assert len(memory) == len(set(memory.values())) == num_pairs
        asked = [place for place in range(seq_len) if weights[place]]
        assert {tokens[place] for place in asked} == set(memory) and len(asked) == num_pairs
        for place in asked:
            assert place >= 2 * num_pairs and place % 2 == 0
            assert targets[place] == memory[tokens[place]]


def test_mqar_fills_with_random_tokens_and_does_not_show_answers():
    dataset = task("mqar")
    fillers, shown, asked = [], 0, 0
    for tokens, targets, weights in examples(dataset, 500):
        places = np.flatnonzero(weights)
        shown += sum(p + 1 < 128 and tokens[p + 1] == targets[p] for p in places)
        asked += len(places)
        fillers += [tokens[p] for p in range(33, 128, 2)]
    assert shown / asked < 0.02
    assert len(set(fillers)) == 512
    assert abs(np.mean(fillers) - 255.5) < 5


def test_mqar_gaps_follow_the_power_law():
    """The first key's gap alone, so that drawing without replacement does not bend the law."""
    dataset = task("mqar", num_pairs=1, seq_len=34, vocab_size=64)
    gaps = [(int(np.flatnonzero(w)[0]) - 2) // 2 for _, _, w in examples(dataset, 20000)]
    g = np.arange(1, 17)
    expected = 0.01 * g ** (0.01 - 1.0)
    got = np.bincount(gaps, minlength=16) / len(gaps)
    assert np.abs(got - expected / expected.sum()).max() < 0.015


@pytest.mark.parametrize("seq_len", [2, 9, 128])
def test_copy_answers_repeat_the_first_half(seq_len):
    for tokens, targets, weights in examples(task("copy", seq_len=seq_len, vocab_size=8)):
        n = tokens.index(0)
        assert n == seq_len // 2
        answers = [t for t, w in zip(targets, weights, strict=True) if w]
        assert answers == tokens[:n] and 0 not in answers
        assert tokens[n + 1 : 2 * n] == answers[:-1]
        np.testing.assert_array_equal(np.flatnonzero(weights), np.arange(n, 2 * n))


@pytest.mark.parametrize("seq_len", [3, 4, 128])
def test_induction_asks_for_what_followed_the_trigger(seq_len):
    places = set()
    for tokens, targets, weights in examples(task("induction", seq_len=seq_len)):
        first = tokens.index(0)
        places.add(first)
        assert tokens.count(0) == 2 and tokens[-1] == 0 and first < seq_len - 2
        assert weights.tolist() == [0.0] * (seq_len - 1) + [1.0]
        assert targets[-1] == tokens[first + 1] != 0
    assert len(places) > min(50, seq_len - 3)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (2, 2), (4, 16, 16, 4, 1, 20)])
def test_the_answer_of_two_sets_is_the_one_token_of_both(sizes):
    pairs, seen = list(zip(sizes[::2], sizes[1::2], strict=True)), set()
    places: dict[tuple[int, int], set[int]] = {pair: set() for pair in pairs}
    dataset = task("set_disjointness", set_sizes=sizes, seq_len=30, vocab_size=64)
    for tokens, targets, weights in examples(dataset, 400):
        start, middle = tokens.index(1), tokens.index(2)
        assert not any(tokens[:start]) and tokens[-1] == 3
        first, second = tokens[start + 1 : middle], tokens[middle + 1 : -1]
        pair = (len(first), len(second))
        assert len(set(first)) == len(first) and len(set(second)) == len(second)
        assert min(first + second) >= 4
        (common,) = set(first) & set(second)
        assert targets[-1] == common and weights.tolist() == [0.0] * 29 + [1.0]
        places[pair].add(max(first, second, key=len).index(common))
        seen.add(common)
    for pair, found in places.items():
        assert found == set(range(max(pair)))  # no place is left out
    assert len(seen) == 30  # of the smaller set's half, all


def test_two_sets_of_one_alphabet_say_the_answer_only_together_and_again_in_a_second_reading():
    more = {"set_sizes": (3, 9, 9, 3), "vocab_size": 20}
    once = task("set_disjointness", **more, seq_len=16, set_halves=False)
    twice = task("set_disjointness", **more, seq_len=33, set_halves=False, set_times=2)
    seen = set()
    for one, two in zip(examples(once, 400), examples(twice, 400), strict=True):
        row = [token for token in one[0] if token]
        assert [token for token in two[0] if token] == row * 2
        first, second = row[1 : row.index(2)], row[row.index(2) + 1 : -1]
        assert len(set(first)) == len(first) and len(set(second)) == len(second)
        (common,) = set(first) & set(second)
        assert one[1][-1] == two[1][-1] == common and two[2].tolist() == [0.0] * 32 + [1.0]
        seen |= {(len(first), token) for token in first}
    assert len(seen) == 2 * 16  # every token may stand in the short set and in the long one


def test_sets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="seq_len: got 128, .* needs at least 246"):
        task("set_disjointness", set_sizes=(20, 100), set_times=2, vocab_size=512)
    with pytest.raises(ValueError, match="vocab_size: got 40, .* needs at least 44"):
        task("set_disjointness", set_sizes=(8, 32), set_halves=False, vocab_size=40)
    with pytest.raises(ValueError, match=r"set_sizes: got \(3,\), expected pairs of sizes"):
        task("set_disjointness", set_sizes=(3,))
    with pytest.raises(ValueError, match="seq_len: got 128, .* needs at least 133"):
        task("set_disjointness", set_sizes=(30, 100))
    with pytest.raises(ValueError, match="vocab_size: got 64, .* needs at least 204"):
        task("set_disjointness", set_sizes=(4, 100), vocab_size=64)


@pytest.mark.parametrize("name", TASKS)
def test_validation_is_fixed_and_shares_no_example_with_train(name):
    dataset = task(name, validation_examples=70)
    batches = list(dataset.evaluation_batches("validation", 32))
    rows = np.concatenate([b.tokens[b.loss_weights.any(1)] for b in batches])
    assert len(rows) == 70 and len(batches) == 3
    train = {row.tobytes() for row in dataset.training_rows(0).batch(np.arange(500)).tokens}
    assert len(train) == 500 and not train & {row.tobytes() for row in rows}
    again = next(iter(task(name, validation_examples=70).evaluation_batches("validation", 32)))
    np.testing.assert_array_equal(again.tokens, batches[0].tokens)
    with pytest.raises(ValueError, match="no end"):
        dataset.evaluation_batches("train")


@pytest.mark.parametrize("name", TASKS)
def test_an_example_is_the_same_in_any_batch(name):
    rows = task(name).training_rows(3)
    together = rows.batch(np.arange(20)).tokens
    alone = [rows.batch(np.asarray([i])).tokens[0] for i in range(20)]
    np.testing.assert_array_equal(together, alone)


def test_identity_follows_the_settings():
    config = DataConfig(source="mqar", seq_len=128)
    identity = open_dataset(config).identity
    assert open_dataset(dataclasses.replace(config, batch_size=99)).identity == identity
    assert open_dataset(dataclasses.replace(config, num_pairs=8)).identity != identity
    assert open_dataset(config).num_bytes("validation") is None
    assert open_dataset(config).describe()["sources"][0]["task"]["num_pairs"] == 16


def test_tasks_mix_with_tasks():
    dataset = task("mqar", mixture=("copy", "induction"), mixture_weights=(1.0, 3.0))
    places = dataset.training_rows(0).where(np.arange(40))
    assert sum(place["source"] == "copy" for place in places) == 10
    assert len(list(dataset.evaluation_batches("validation"))) == -(-2000 // 32)
