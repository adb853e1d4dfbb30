"""Masks: `block_kinds` is safe and useful, `Neighborhood` equals a loop over its definition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    Causal,
    Dilated,
    Full,
    Mask,
    Neighborhood,
    PrefixLM,
    Sink,
    Window,
)

SIMPLE = [
    Full(),
    Causal(),
    Window(left=5),
    Window(right=3),
    Window(left=4, right=2),
    Window(),
    Window(left=0, right=0),
    Sink(4),
    Sink(0),
    PrefixLM(7),
    Dilated(1),
    Dilated(3),
    Dilated(64),
    Causal() & (Window(left=6) | Sink(3)),
    ~Causal(),
]
NEIGHBORHOODS = [
    Neighborhood((48,), (7,)),
    Neighborhood((48,), (8,), stride=(3,)),
    Neighborhood((48,), (5,), dilation=(4,)),
    Neighborhood((47,), (5,), stride=(4,), dilation=(3,)),
    Neighborhood((48,), (6,), causal=(True,)),
    Neighborhood((47,), (6,), stride=(5,), dilation=(2,), causal=(True,)),
    Neighborhood((48,), (48,)),
    Neighborhood((6, 8), (3, 5)),
    Neighborhood((6, 8), (3, 4), stride=(2, 3), causal=(False, True)),
    Neighborhood((7, 7), (3, 2), dilation=(2, 3), causal=(True, False)),
    Neighborhood((3, 4, 4), (2, 3, 2)),
    Neighborhood((3, 4, 5), (3, 2, 2), stride=(2, 1, 2), dilation=(1, 2, 2)),
    Neighborhood((4, 4, 3), (2, 2, 3), stride=(1, 2, 3), causal=(True, False, True)),
]
MASKS = SIMPLE + NEIGHBORHOODS


def random_mask(rng: np.random.Generator, depth: int) -> Mask:
    if depth == 0:
        return MASKS[rng.integers(len(MASKS))]
    left = random_mask(rng, depth - 1)
    kind = rng.integers(3)
    if kind == 0:
        return ~left
    right = random_mask(rng, depth - 1)
    return left & right if kind == 1 else left | right


def positions(rng: np.random.Generator, order: str, length: int = 48) -> np.ndarray:
    """Inside the smallest grid of MASKS, so that every mask takes them."""
    pos = np.arange(length, dtype=np.int32)
    if order == "random":
        pos = rng.integers(0, length, length).astype(np.int32)
    elif order == "shuffled":
        pos = rng.permutation(pos)
    elif order == "offset":
        pos = pos + np.int32(1000)
    elif order == "strided":
        pos = pos * np.int32(3)
    return pos


def check_block_kinds(mask: Mask, q_pos: np.ndarray, kv_pos: np.ndarray, q: int, kv: int) -> None:
    allowed = np.asarray(mask.allowed(q_pos[:, None], kv_pos[None, :]))
    blocks = allowed.reshape(len(q_pos) // q, q, len(kv_pos) // kv, kv)
    some, every = blocks.any((1, 3)), blocks.all((1, 3))
    kinds = mask.block_kinds(q_pos.reshape(-1, q), kv_pos.reshape(-1, kv))
    assert isinstance(kinds, np.ndarray) and kinds.dtype == np.int32, mask
    assert kinds.shape == some.shape and set(np.unique(kinds)) <= {EMPTY, PARTIAL, FULL}, mask
    assert not (some & (kinds == EMPTY)).any(), f"EMPTY over an allowed pair: {mask}"
    assert not (~every & (kinds == FULL)).any(), f"FULL over a forbidden pair: {mask}"


@pytest.mark.parametrize("order", ["sorted", "random", "shuffled", "offset", "strided"])
def test_block_kinds_never_skip_an_allowed_pair_nor_fill_a_forbidden_one(order):
    rng = np.random.default_rng(len(order))
    masks = MASKS + [random_mask(rng, 1 + i % 3) for i in range(60)]
    for mask in masks:
        for q, kv in ((8, 8), (16, 4), (1, 6), (1, 1)):
            q_pos, kv_pos = positions(rng, order), positions(rng, order)
            check_block_kinds(mask, q_pos, kv_pos, q, kv)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_traced_positions_get_the_answer_of_numpy_positions(mask):
    rng = np.random.default_rng(1)
    q_pos, kv_pos = positions(rng, "shuffled"), positions(rng, "sorted")
    allowed, kinds = jax.jit(
        lambda q, kv: (
            mask.allowed(q[:, None], kv[None]),
            mask.block_kinds(q.reshape(-1, 8), kv.reshape(-1, 4)),
        )
    )(q_pos, kv_pos)
    np.testing.assert_array_equal(allowed, mask.allowed(q_pos[:, None], kv_pos[None]))
    np.testing.assert_array_equal(
        kinds, mask.block_kinds(q_pos.reshape(-1, 8), kv_pos.reshape(-1, 4))
    )


@pytest.mark.parametrize(
    ("mask", "empty", "full"),
    [
        # 6 x 6 blocks of 8: the strict upper triangle is empty, the strict lower one full.
        (Causal(), 15, 15),
        (~Causal(), 15, 15),
        (Full(), 0, 36),
        (~Full(), 36, 0),
        # Left 15 reaches two blocks back: the nearer one wholly, the farther one not.
        (Causal() & Window(left=15), 15 + 6, 5),
        (Window(left=8, right=8), 20, 6),
        (Sink(8), 30, 6),
        (PrefixLM(16), 15 - 1, 15 + 3),
        (Neighborhood((48,), (17,)), 18, 8),
    ],
    ids=str,
)
def test_block_kinds_say_empty_and_full_where_they_can(mask, empty, full):
    pos = np.arange(48, dtype=np.int32).reshape(-1, 8)
    kinds = mask.block_kinds(pos, pos)
    assert ((kinds == EMPTY).sum(), (kinds == FULL).sum()) == (empty, full)


def test_windows_and_dilation_count_the_ends_they_document():
    pos = np.arange(20)
    row = Window(left=3, right=2).allowed(np.array([[10]]), pos[None])[0]
    assert pos[row].tolist() == [7, 8, 9, 10, 11, 12]
    assert (Causal() & Window(left=4)).allowed(np.array([[10]]), pos[None]).sum() == 5
    row = Dilated(4).allowed(np.array([[9]]), pos[None])[0]
    assert pos[row].tolist() == [1, 5, 9, 13, 17]


def neighbors_by_loop(mask: Neighborhood, query: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The keys of one query, from the words of the definition, one axis and one group at a time."""
    per_axis = []
    for axis, x in enumerate(query):
        n, w = mask.axes[axis], mask.window[axis]
        s = 1 if mask.stride is None else mask.stride[axis]
        d = 1 if mask.dilation is None else mask.dilation[axis]
        members = list(range(x % d, n, d))
        i, length = members.index(x), len(members)
        first_of_group = next(g for g in range(0, length, s) if g <= i < g + s)
        if mask.causal is not None and mask.causal[axis]:
            leader = min(first_of_group + s - 1, length - 1)
            places = range(max(leader - w + 1, 0), i + 1)
        else:
            leader = min(first_of_group + s // 2, length - 1)
            start = leader - w // 2
            while start + w > length:
                start -= 1
            start = max(start, 0)
            places = range(start, start + w)
        per_axis.append([members[p] for p in places])
    return set(itertools.product(*per_axis))


@pytest.mark.parametrize("mask", NEIGHBORHOODS, ids=str)
def test_neighborhood_equals_a_loop_over_its_definition(mask):
    cells = list(itertools.product(*(range(n) for n in mask.axes)))
    pos = np.arange(len(cells), dtype=np.int32)
    allowed = mask.allowed(pos[:, None], pos[None])
    for row, query in enumerate(cells):
        wanted = neighbors_by_loop(mask, query)
        assert {cells[i] for i in np.flatnonzero(allowed[row])} == wanted, query


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_words_hold_all_that_allowed_needs(mask):
    pos = np.arange(-3, 60, dtype=np.int32)  # some stand outside of every grid
    allowed = mask.allowed(pos[:, None], pos[None])
    for xp in (np, jnp):
        q_words, kv_words = mask.q_words(xp.asarray(pos)), mask.kv_words(xp.asarray(pos))
        by_words = mask.allowed_by_words(
            tuple(w[:, None] for w in q_words), tuple(w[None] for w in kv_words)
        )
        np.testing.assert_array_equal(by_words, allowed)


def test_masks_are_values():
    one = Causal() & (Window(left=512) | Sink(4))
    other = Causal() & (Window(left=512) | Sink(4))
    assert one == other and hash(one) == hash(other)
    assert one != Causal() & (Window(left=513) | Sink(4))
    assert len({Causal(), Causal(), Full()}) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(left=-1), "Window.left: got -1, expected at least 0"),
        (lambda: Sink(-2), "Sink.length"),
        (lambda: PrefixLM(-2), "PrefixLM.length"),
        (lambda: Dilated(0), "Dilated.dilation"),
        (lambda: Neighborhood((4, 4), (3,)), "Neighborhood.window: got 1 entries, expected 2"),
        (lambda: Neighborhood((4,), (5,)), "larger than the axis, 4"),
        (lambda: Neighborhood((8,), (3,), dilation=(3,)), "window 3 x dilation 3 = 9"),
        (lambda: Neighborhood((8,), (3,), stride=(4,)), "at most window=3"),
        (lambda: Neighborhood((), ()), "1 to 3 axes"),
    ],
)
def test_impossible_masks_are_refused_in_a_sentence(make, words):
    with pytest.raises(ValueError, match="Window|Sink|PrefixLM|Dilated|Neighborhood") as error:
        make()
    assert words in str(error.value)


def test_masks_take_positions_that_broadcast_to_batches():
    q_pos = jnp.arange(6).reshape(2, 3)
    for mask in SIMPLE:
        assert mask.allowed(q_pos[:, :, None], q_pos[:, None, :]).shape == (2, 3, 3)
