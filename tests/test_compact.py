"""Compaction: rows moved together and back, and what happens where they are too many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.compact import (
    MODES,
    CapacityConfig,
    compact,
    demoted,
    gather,
    hold,
    scatter,
    sources,
    with_capacity,
)

BATCH, LEN, WIDTH = 3, 13, 2
SEGMENTS = np.array([[1] * 13, [1] * 5 + [2] * 4 + [3] * 4, [7] * 6 + [2] * 5 + [0] * 2])


def case(seed, share=0.5):
    """(x, info of packed rows with padding, keep), of which `share` is kept."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(BATCH, LEN, WIDTH)).astype(np.float32)
    segments = jnp.asarray(SEGMENTS, jnp.int32)
    positions = jnp.asarray(
        [
            np.concatenate([np.arange(13)[: (r == s).sum()] for s in dict.fromkeys(r)])
            for r in SEGMENTS
        ],
        jnp.int32,
    )
    info = TokenInfo(positions, segments, segments > 0)
    return jnp.asarray(x), info, jnp.asarray(draw.random((BATCH, LEN)) < share)


def running_sums(x, info):
    """A causal layer that mixes rows of one segment, and adds where a row stands."""
    same = (info.segments[:, :, None] == info.segments[:, None, :]) & info.valid[:, None, :]
    seen = same & jnp.tril(jnp.ones(same.shape[1:], bool))
    y = jnp.einsum("bij,bjd->bid", seen.astype(x.dtype), x) + info.positions[..., None]
    return y, jnp.sum(jnp.where(info.valid[..., None], y, 0))


def wanted_sums(x, info, keep):
    """The same by a loop over the kept rows."""
    x, keep = np.asarray(x, np.float64), np.asarray(keep & info.valid)
    y = np.zeros_like(x)
    for b in range(BATCH):
        total = {}
        for t in np.flatnonzero(keep[b]):
            segment = SEGMENTS[b, t]
            total[segment] = total.get(segment, 0) + x[b, t]
            y[b, t] = total[segment] + np.asarray(info.positions)[b, t]
    return y


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rows_move_together_and_back(share):
    x, _, keep = case(1, share)
    rows, source, count = compact(x, keep, LEN)
    for b in range(BATCH):
        kept = np.flatnonzero(keep[b])
        assert count[b] == len(kept)
        np.testing.assert_array_equal(source[b, : len(kept)], kept)
        np.testing.assert_array_equal(rows[b, : len(kept)], x[b, kept])
        assert not np.any(rows[b, len(kept) :])
    back = scatter(rows, source, LEN)
    np.testing.assert_array_equal(back, jnp.where(keep[..., None], x, 0))
    held = hold(rows, keep)
    for b in range(BATCH):
        last = np.zeros(WIDTH)
        for t in range(LEN):
            last = x[b, t] if keep[b, t] else last
            np.testing.assert_array_equal(held[b, t], last)


def test_gradients_are_those_of_plain_indexing():
    x, _, keep = case(2)
    weight = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    source, _ = sources(keep, 4)

    def moved(x):
        return jnp.sum(weight * scatter(jnp.tanh(gather(x, source)), source, LEN))

    def plain(x):
        kept = keep & (jnp.cumsum(keep, axis=1) <= 4)
        return jnp.sum(jnp.where(kept[..., None], weight * jnp.tanh(x), 0))

    np.testing.assert_allclose(jax.grad(moved)(x), jax.grad(plain)(x), rtol=1e-6)
    held = jax.grad(lambda x: jnp.sum(weight * hold(gather(x, sources(keep, LEN)[0]), keep)))(x)
    for b in range(BATCH):
        groups = np.cumsum(keep[b])
        for t in np.flatnonzero(keep[b]):
            sums = np.asarray(weight)[b, groups == groups[t]].sum(0)
            np.testing.assert_allclose(held[b, t], sums, rtol=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_where_nothing_overflows_every_mode_is_exact(mode, pooled, share):
    x, info, keep = case(3, share)
    rungs = (0.1, 0.4, 1.0)
    config = CapacityConfig(mode=mode, pooled=pooled, share=1.0, rungs=rungs)
    capacity = config.build()

    def loss(x):
        y, aux, report = with_capacity(running_sums, x, info, keep, capacity)
        return jnp.sum(y**2) + aux, (y, report)

    gradient, (y, report) = jax.jit(jax.grad(loss, has_aux=True))(x)
    wanted = wanted_sums(x, info, keep)
    # float32 sums of up to 13 numbers in another order.
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    exact = jax.grad(
        lambda x: (lambda y, aux, _: jnp.sum(y**2) + aux)(
            *with_capacity(running_sums, x, info, keep, CapacityConfig().build())
        )
    )(x)
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-5)
    assert report.overflow == 0 and report.kept == (keep & info.valid).sum()
    if mode == "bucket":
        unit = BATCH * LEN if pooled else LEN
        needed = (keep & info.valid).sum() if pooled else (keep & info.valid).sum(1).max()
        ladder = [max(1, int(np.ceil(unit * r))) for r in rungs]
        rung = next(n for n in ladder if n >= needed)
        assert report.capacity == rung * (1 if pooled else BATCH)


@pytest.mark.parametrize("pooled", [False, True])
def test_overflow_is_counted(pooled):
    """At count == capacity nothing is over, at one more one row of every sequence is."""
    x, _, _ = case(4)
    info = whole_rows(x)
    for over in (0, 1):
        keep = jnp.arange(LEN) < 5 + over
        keep = jnp.broadcast_to(keep, (BATCH, LEN))
        for mode in ("error", "demote"):
            capacity = CapacityConfig(mode=mode, share=5 / LEN, pooled=pooled).build()
            y, _, report = with_capacity(running_sums, x, info, keep, capacity)
            assert report.overflow == over * BATCH and report.kept == (5 + over) * BATCH
            metrics = report.metrics("rows", capacity)
            assert metrics["rows_overflow"] == over * BATCH
            assert ("capacity_error" in metrics) == (mode == "error")
            if mode == "demote":  # the first five of every row, whoever shares the buffer
                kept = keep & (jnp.arange(LEN) < 5)
                exact = CapacityConfig().build()
                wanted = with_capacity(running_sums, x, info, kept, exact)[0]
                np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_demotion_is_causal_and_can_be_counted_along():
    _, _, keep = case(5, 0.6)
    capacity = CapacityConfig(mode="demote", share=0.3).build()
    whole = demoted(keep, capacity)
    for cut in range(1, LEN):
        changed = keep.at[:, cut:].set(~keep[:, cut:])
        np.testing.assert_array_equal(demoted(changed, capacity)[:, :cut], whole[:, :cut])
        first, rest = keep[:, :cut], keep[:, cut:]
        start = demoted(first, capacity, length=LEN)
        before = jnp.sum(first, axis=1)
        rest = demoted(rest, capacity, before=before, length=LEN)
        np.testing.assert_array_equal(jnp.concatenate([start, rest], axis=1), whole)


def test_one_row_does_not_hang_on_another():
    """Demotion in a pooled buffer: other rows keep more or less, this row's results stay."""
    x, _, keep = case(6, 0.7)
    info = whole_rows(x)
    capacity = CapacityConfig(mode="demote", share=0.4, pooled=True).build()
    y = with_capacity(running_sums, x, info, keep, capacity)[0]
    other = with_capacity(running_sums, x, info, keep.at[1:].set(True), capacity)[0]
    np.testing.assert_allclose(y[0], other[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "drop"}, "capacity.mode: got 'drop'"),
        ({"rungs": (0.5, 0.25, 1.0)}, "capacity.rungs: got"),
        ({"rungs": (0.5,)}, "the last is 1"),
        ({"rungs": ()}, "capacity.rungs: got"),
        ({"share": 0.0}, "capacity.share: got 0.0"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CapacityConfig(**options).build()
