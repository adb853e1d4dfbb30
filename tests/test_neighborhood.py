"""Neighborhood attention: tiles and their count equal the definition, and special windows equal
other attention."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.blocks import BlockSizes, block_table
from effattn.masks import EMPTY, FULL, PARTIAL, Causal, Full, Neighborhood
from effattn.pallas_kernels.attention import attention, neighborhood_attention, simulate
from effattn.pallas_kernels.attention.simulator import COSTS, choose_tile, tile_for
from effattn.pallas_kernels.attention.tiles import Tiling

# axes, window, stride, dilation, causal, query tile, key tile
ROUNDING = 2e-5  # float32 sums in another order
SIMULATED = [
    ((48,), (7,), (1,), (1,), (False,), (8,), (8,)),
    ((48,), (8,), (8,), (1,), (False,), (8,), (8,)),
    ((50,), (9,), (4,), (1,), (True,), (8,), (5,)),
    ((41,), (5,), (3,), (3,), (False,), (4,), (8,)),
    ((33,), (4,), (2,), (4,), (True,), (3,), (2,)),
    ((9, 13), (3, 5), (1, 1), (1, 1), (False, False), (4, 4), (4, 4)),
    ((12, 10), (4, 6), (2, 3), (1, 1), (False, True), (2, 3), (4, 2)),
    ((11, 14), (3, 4), (1, 2), (2, 3), (False, False), (2, 4), (2, 4)),
    ((16, 16), (8, 8), (4, 4), (1, 1), (False, False), (4, 4), (4, 4)),
    ((5, 6, 7), (3, 3, 3), (1, 2, 3), (1, 2, 1), (True, False, False), (2, 2, 3), (2, 3, 2)),
]
TILINGS = [
    Tiling((13,), (4,), (1,)),
    Tiling((13,), (4,), (3,)),
    Tiling((9, 8), (4, 3), (1, 1)),
    Tiling((11, 14), (3, 4), (2, 3)),
    Tiling((4, 5, 6), (2, 2, 4), (1, 2, 3)),
    Tiling((17,), (4,), (2,)),  # the shorter group's last tile is padding alone
]


# ---- tiles


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_restore_is_the_inverse_of_permute(tiling):
    x = np.arange(2 * math.prod(tiling.axes) * 3.0).reshape(2, *tiling.axes, 3)
    permuted = tiling.permute(jnp.asarray(x))
    assert permuted.shape == (2, tiling.num_slots, 3)
    np.testing.assert_array_equal(tiling.restore(permuted), x)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_positions_say_where_the_tokens_went(tiling):
    tokens = math.prod(tiling.axes)
    index = np.arange(1, tokens + 1, dtype=np.float32).reshape(1, *tiling.axes)
    slots = np.asarray(tiling.permute(jnp.asarray(index)))[0].astype(int) - 1
    q_pos, kv_pos = tiling.q_positions(), tiling.kv_positions()
    np.testing.assert_array_equal(kv_pos, np.where(slots < 0, tokens, slots))
    np.testing.assert_array_equal(q_pos[slots >= 0], slots[slots >= 0])
    # Queries in the padding repeat a token of their own tile, where it has one.
    tiles = zip(*(x.reshape(-1, tiling.tokens_per_tile) for x in (q_pos, kv_pos)), strict=True)
    for q, kv in tiles:
        real = set(kv) - {tokens}
        assert set(q) == (real if real else {tokens})


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_a_tile_is_a_box_of_one_dilation_group_and_groups_stand_together(tiling):
    positions = tiling.kv_positions().reshape(-1, tiling.tokens_per_tile)
    groups = []
    for tile in positions:
        real = tile[tile < math.prod(tiling.axes)]
        if not len(real):
            continue
        spans, group = 1, []
        for x, d in zip(np.unravel_index(real, tiling.axes), tiling.dilation, strict=True):
            assert len(set(x % d)) == 1
            spans *= (x.max() - x.min()) // d + 1
            group.append(int(x[0] % d))
        assert spans == len(real)
        groups.append(tuple(group))
    assert groups == sorted(groups)


# ---- the simulator


def pairs_of_tiles(case):
    """(some, every) pair allowed per pair of tiles, from each token's own coordinates.

    every: over the real queries and all slots of a key tile.
    """
    axes, window, stride, dilation, causal, *tiles = case
    mask = Neighborhood(axes, window, stride, dilation, causal)
    position = np.arange(math.prod(axes))
    allowed = mask.allowed(position[:, None], position)
    owners = []
    for tile in tiles:
        coordinates = np.unravel_index(position, axes)
        parts = zip(coordinates, dilation, tile, strict=True)
        names = [(x % d, x // d // t) for x, d, t in parts]
        names = list(zip(*itertools.chain.from_iterable(names), strict=True))
        owners.append([names.index(name) for name in names])
    q_owner, kv_owner = map(np.asarray, owners)
    some, every = [], []
    for q, kv in itertools.product(set(q_owner), set(kv_owner)):
        part = allowed[q_owner == q][:, kv_owner == kv]
        whole = part.shape[1] == math.prod(tiles[1])
        some.append(part.any())
        every.append(part.all() and whole)
    return np.asarray(some), np.asarray(every), allowed


@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_simulate_equals_a_count_over_all_pairs(case):
    some, every, allowed = pairs_of_tiles(case)
    got = simulate(*case)
    assert (got.visited, got.partial) == (some.sum(), (some & ~every).sum())
    assert got.block_sparse == (not (some & ~every).any())
    assert got.ideal_share == pytest.approx(allowed.mean())
    tokens = math.prod(case[0])
    assert got.dense == math.prod(-(-tokens // math.prod(tile)) for tile in case[5:])
    assert got.speedup_bound == got.dense / got.visited


@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_the_list_of_blocks_is_the_simulated_one(case):
    """What a kernel visits is what `simulate` counts, padded tiles and dilation included."""
    axes, window, stride, dilation, causal, q_tile, kv_tile = case
    q, kv = Tiling(axes, q_tile, dilation), Tiling(axes, kv_tile, dilation)
    kinds = block_table(
        Neighborhood(axes, window, stride, dilation, causal),
        q.q_positions()[None],
        kv.kv_positions()[None],
        sizes=BlockSizes(q.tokens_per_tile, kv.tokens_per_tile),
    )
    counted = simulate(*case)
    assert (kinds != EMPTY).sum() == counted.visited
    assert (kinds == PARTIAL).sum() == counted.partial


def test_published_perfectly_sparse_cases_reach_their_ideal():
    # Windows and strides whose edges fall on tile edges: no masked tile, the arithmetic share.
    for axes, window, stride, tile in [
        ((256, 256), (64, 64), (64, 64), (16, 16)),
        ((32768,), (2048,), (2048,), (512,)),
        ((16, 32, 32), (8, 16, 16), (8, 16, 16), (4, 8, 16)),
    ]:
        got = simulate(axes, window, stride, q_tile=tile)
        assert got.block_sparse and got.partial == 0
        assert got.speedup_bound == pytest.approx(1 / got.ideal_share)
    sliding = simulate((256, 256), (64, 64), q_tile=(16, 16))
    assert not sliding.block_sparse and sliding.speedup_bound < 1 / sliding.ideal_share


@pytest.mark.parametrize("platform", COSTS)
@pytest.mark.parametrize("case", SIMULATED, ids=str)
def test_the_default_tile_is_never_worse_than_a_plain_one(case, platform):
    mask, costs = Neighborhood(*case[:5]), COSTS[platform]
    tile = choose_tile(mask, costs)
    groups = [-(-n // d) for n, d in zip(case[0], case[3], strict=True)]
    assert len(tile) == len(groups) and math.prod(tile) <= costs.most
    if tile != case[0]:
        assert math.prod(tile) % costs.multiple == 0


def test_the_default_tile_fits_the_window():
    long = Neighborhood((2**18,), (128,))
    assert tile_for(long, "cpu", 8) == (64,)
    video = Neighborhood((32, 64, 64), (8, 16, 16), (8, 16, 16))
    tile = tile_for(video, "tpu", 24)
    assert simulate(video.axes, video.window, video.stride, q_tile=tile).block_sparse
    # More heads and rows leave less room for the scores of one pair.
    assert math.prod(tile_for(video, "cpu", 256)) < math.prod(tile_for(video, "cpu", 1))


# ---- the masks' blocks


def test_positions_outside_of_the_grid_take_no_part():
    for mask in (
        Neighborhood((4, 6), (2, 3), causal=(True, False)),
        Neighborhood((6,), (3,), (2,), (2,)),
        Neighborhood((6,), (3,), causal=(True,)),
    ):
        n = math.prod(mask.axes)
        inside, outside = np.arange(n), np.array([n, n + 1, 2 * n, -1])
        everywhere = np.concatenate([inside, outside])
        assert not mask.allowed(everywhere[:, None], outside).any()
        assert not mask.allowed(outside[:, None], everywhere).any()
        kinds = mask.block_kinds(outside[None], everywhere[None])
        assert (kinds == EMPTY).all()
        assert (mask.block_kinds(everywhere[None], outside[None]) == EMPTY).all()


def test_blocks_of_one_dilation_group_may_be_full():
    mask = Neighborhood((64,), (8,), (8,), (2,))
    tiling = Tiling((64,), (8,), (2,))
    kinds = mask.block_kinds(*(p.reshape(-1, 8) for p in [tiling.kv_positions()] * 2))
    np.testing.assert_array_equal(kinds, np.diag([FULL] * 8))


# ---- laws


def draw(seed, batch, axes, heads=2, kv_heads=2, dim=8, value_dim=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [
        jax.random.normal(key, (batch, *axes, *size)) for key, size in zip(keys, sizes, strict=True)
    ]


def alike(one, other, *arrays):
    """Two functions of the same arrays give equal out and log-sum-exp."""
    with jax.default_matmul_precision("highest"):
        for a, b in zip(*(jax.jit(f)(*arrays) for f in (one, other)), strict=True):
            np.testing.assert_allclose(a, b.reshape(a.shape), atol=ROUNDING)


def alike_in_gradients(one, other, *arrays):
    """Two functions of the same arrays give equal values and gradients."""

    def all_of(function):
        def loss(*arrays):
            out, lse = function(*arrays)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

        argnums = tuple(range(len(arrays)))
        return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*arrays)

    with jax.default_matmul_precision("highest"):
        for a, b in zip(*(jax.tree.leaves(all_of(f)) for f in (one, other)), strict=True):
            np.testing.assert_allclose(a, b.reshape(a.shape), atol=5e-5, rtol=5e-5)


def flat(axes, function):
    """A function of [batch, *axes, ...] arrays that sees one axis of tokens."""

    def call(*arrays):
        flattened = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in arrays]
        return function(*flattened)

    return call


@pytest.mark.parametrize(
    ("axes", "options", "mask"),
    [
        ((5, 7), {"window": (5, 7), "stride": (2, 3), "tile": (2, 4)}, Full()),
        ((13,), {"window": 13, "stride": 5, "causal": True, "tile": 4}, Causal()),
    ],
    ids=["whole-window", "causal"],
)
def test_a_window_as_long_as_its_axes_is_plain_attention(axes, options, mask):
    alike(
        lambda *x: neighborhood_attention(*x, return_lse=True, **options),
        flat(axes, lambda *x: attention(*x, mask=mask, return_lse=True)),
        *draw(0, 2, axes, heads=4, kv_heads=2, value_dim=5),
    )


def test_a_stride_as_long_as_the_window_is_attention_inside_blocks():
    axes, side = (6, 9), 3

    def blocked(*arrays):
        def split(x):
            x = x.reshape(x.shape[0], 2, side, 3, side, *x.shape[-2:])
            return x.swapaxes(2, 3).reshape(-1, side * side, *x.shape[-2:])

        out, lse = attention(*map(split, arrays), mask=Full(), return_lse=True)

        def join(x):
            x = x.reshape(2, 2, 3, side, side, *x.shape[2:])
            return x.swapaxes(2, 3).reshape(2, *axes, *x.shape[5:])

        return join(out), join(lse)

    alike_in_gradients(
        lambda *x: neighborhood_attention(*x, window=side, stride=side, tile=4, return_lse=True),
        blocked,
        *draw(1, 2, axes),
    )


def test_a_dilation_group_is_attention_over_its_tokens_alone():
    q, k, v = draw(2, 1, (11, 8), heads=2, kv_heads=1)
    options = {"window": (3, 2), "stride": (2, 1), "causal": (False, True)}
    attend = jax.jit(lambda *x: neighborhood_attention(*x, **options))
    dilated = functools.partial(neighborhood_attention, dilation=(3, 2), tile=(2, 3), **options)
    got = jax.jit(dilated)(q, k, v)
    for g in itertools.product(range(3), range(2)):
        own = (slice(None), slice(g[0], None, 3), slice(g[1], None, 2))
        alone = attend(q[own], k[own], v[own])
        np.testing.assert_allclose(got[own], alone, atol=ROUNDING)


def test_backends_and_tiles_agree_under_vmap_and_remat():
    arrays = draw(3, 2, (4, 5, 6), heads=4, kv_heads=2, value_dim=6)
    extra = {
        "extra_key": jax.random.normal(jax.random.key(7), (2, 3, 2, 8)),
        "extra_value": jax.random.normal(jax.random.key(8), (2, 3, 2, 6)),
    }
    options = {
        "window": (3, 2, 3),
        "stride": (2, 1, 1),
        "causal": (True, False, False),
        "logit_soft_cap": 3.0,
        "return_lse": True,
    }

    def call(implementation, tile):
        def function(*arrays):
            return neighborhood_attention(
                *arrays, **extra, **options, tile=tile, implementation=implementation
            )

        return function

    alike(call("xla", (2, 2, 4)), call("reference", None), *arrays)
    row = {name: x[0] for name, x in extra.items()}

    def one_row(q, k, v):
        ops = {name: x[None] for name, x in row.items()}
        function = jax.checkpoint(lambda *x: neighborhood_attention(*x, **ops, **options))
        return jax.tree.map(lambda x: x[0], function(q[None], k[None], v[None]))

    mapped, alone = jax.jit(jax.vmap(one_row)), jax.jit(one_row)
    for i, rows in enumerate(zip(*arrays, strict=True)):
        for a, b in zip(mapped(*arrays), alone(*rows), strict=True):
            np.testing.assert_allclose(a[i], b, atol=ROUNDING)


def test_the_tpu_kernel_takes_the_tiles():
    """Interpreted, through a ragged and dilated grid with tiles of the sizes a TPU wants."""
    arrays = draw(5, 1, (30, 17), heads=2, kv_heads=1, dim=16, value_dim=16)
    options = {"window": (5, 4), "stride": (2, 1), "dilation": (2, 1), "causal": (False, True)}

    def call(implementation):
        return lambda *x: neighborhood_attention(
            *x, **options, return_lse=True, implementation=implementation
        )

    # Every block of a TPU's default tile is a multiple of its 128 lanes.
    assert math.prod(tile_for(Neighborhood((30, 17), *options.values()), "tpu", 2)) % 128 == 0
    alike_in_gradients(call("tpu_interpret"), call("reference"), *arrays)


def test_it_compiles_for_a_tpu():
    from effattn.static.tpu import compile_for

    shape = jax.ShapeDtypeStruct((1, 6, 20, 24, 2, 64), jnp.bfloat16)

    def loss(*x):
        out = neighborhood_attention(*x, window=(4, 8, 8), causal=(True, False, False))
        return out.astype("float32").sum()

    compiled = compile_for("v5e", jax.grad(loss, (0, 1, 2)), shape, shape, shape)
    assert "effattn_flash_backward" in compiled.as_text()


def test_nothing_of_the_size_of_all_pairs_is_held():
    axes, tokens = (512, 512), 2**18
    shapes = [jax.ShapeDtypeStruct((1, *axes, 1, 16), jnp.float32)] * 3

    def loss(*x):
        return neighborhood_attention(*x, window=16, stride=16, tile=16).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    arrays = tokens * 16 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 40 * arrays < tokens**2 / 8


def test_outside_of_jit_it_gives_the_dtype_of_the_query():
    q, k, v = (x.astype(jnp.bfloat16) for x in draw(4, 1, (9,)))
    out, lse = neighborhood_attention(q, k, v, window=3, return_lse=True)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32 and lse.shape == (1, 9, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (3, 9)}, "window: got 9 on axis 1, expected at most its length, 8"),
        (
            {"window": 3, "dilation": (1, 3)},
            "window: got 3 x dilation 3 = 9 on axis 1, expected at most its length, 8",
        ),
        ({"window": 3, "stride": (1, 4)}, "stride: got 4 on axis 1, expected at most window=3"),
        ({"window": 0}, "window: got 0, expected at least 1"),
        ({"window": 3.0}, "window: got 3.0, expected an integer"),
        ({"window": (3, 3, 3)}, "window: got 3 entries, expected 2, one per axis"),
        ({"window": 3, "causal": (True,)}, "causal: got 1 entries, expected 2, one per axis"),
        ({"window": 3, "tile": (4,)}, "tile: got 1 entries, expected 2, one per axis"),
        ({"window": 3, "implementation": "tpuu"}, "implementation: got 'tpuu'"),
        ({"window": 3, "logit_soft_cap": 0.0}, "logit_soft_cap: got 0.0"),
        ({"window": 3, "extra_key": jnp.ones((1, 2, 2, 8))}, "extra_value: got None"),
    ],
)
def test_bad_arguments_are_a_sentence(options, message):
    with pytest.raises(ValueError) as error:
        neighborhood_attention(*draw(0, 1, (8, 8)), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4)], "expected a multiple of key's num_kv_heads=2"),
        ([(1, 8, 2, 4), (1, 9, 2, 4), (1, 8, 2, 4)], "key: expected [b=1, x=8, k=any, h=4]"),
        ([(8, 2, 4)] * 3, "with 1 to 3 axes, got (8, 2, 4)"),
        ([(1, 2, 2, 2, 2, 2, 4)] * 3, "with 1 to 3 axes"),
    ],
)
def test_arrays_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError) as error:
        neighborhood_attention(*map(jnp.ones, shapes), window=2)
    assert message in str(error.value)


def test_simulate_refuses_what_the_mask_refuses():
    with pytest.raises(ValueError, match="larger than the axis"):
        simulate((8,), (9,))
    with pytest.raises(ValueError, match="kv_tile: got 2 entries, expected 1"):
        simulate((8,), (3,), q_tile=(4,), kv_tile=(4, 4))
