"""What sequence parallelism moves between TPUs: bytes by formula, overlap and memory, compiled.

bfloat16, 16 query heads and 8 kv heads of 128, 2,048 tokens a chip. kv: one chip's keys and values.
Positions and segments travel along, 8 bytes a token at most: the slack of the comparisons.
"""

import pytest

from effattn.masks import Causal, Window
from effattn.parallel.gather_keys import GatherKeys
from effattn.parallel.halo import Halo
from effattn.parallel.ring_strategy import Ring
from effattn.parallel.ring_ulysses import RingUlysses
from effattn.parallel.token_ring import TokenRing
from effattn.parallel.ulysses import Ulysses
from effattn.static.collectives import Collective, bytes_by_kind, collectives
from scripts.sequence_static import CHIPS, HEADS, KV, PART, QUERY, compiled, share_overlapped

OTHERS = CHIPS - 1
TOPOLOGIES = [
    "v5e:2x4",
    *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:2x2x2", "v6e:2x4")),
]


def assert_moves(hlo, kind, wanted, *, below=0.01):
    """Nothing but `kind`, and as many bytes as the formula says or up to `below` of it fewer.

    XLA may send what is rounded afterwards in the narrow type already.
    """
    large = {name: size for name, size in bytes_by_kind(hlo).items() if size > 1e6}
    assert set(large) == {kind}, large
    assert (1 - below) * wanted <= large[kind] <= 1.01 * wanted, (large[kind], wanted)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("zigzag", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_ring_sends_keys_round_once_and_their_gradients_home(topology, zigzag):
    ring = Ring(zigzag=zigzag, devices=CHIPS)
    hlo = compiled(topology, ring).as_text()
    assert_moves(hlo, "collective-permute", OTHERS * KV)
    assert share_overlapped(hlo) == 1.0
    hlo = compiled(topology, ring, gradient=True).as_text()
    # Keys twice; their gradients in float32 on N hops, the last of which may be narrowed.
    wanted = 2 * OTHERS * KV + CHIPS * 2 * KV
    assert_moves(hlo, "collective-permute", wanted, below=KV / wanted + 0.01)
    assert share_overlapped(hlo) > 0.95


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_others_move_what_their_formulas_say(topology):
    hlo = compiled(topology, Ulysses()).as_text()
    assert_moves(hlo, "all-to-all", OTHERS * (2 * QUERY + KV) // CHIPS)
    hlo = compiled(topology, GatherKeys()).as_text()
    assert_moves(hlo, "all-gather", OTHERS * KV)
    hlo = compiled(topology, Halo(), Causal() & Window(left=512)).as_text()
    assert_moves(hlo, "collective-permute", KV * 512 // PART)
    hlo = compiled(topology, RingUlysses(degree=2)).as_text()
    sizes = {kind: size for kind, size in bytes_by_kind(hlo).items() if size > 1e6}
    assert sizes["collective-permute"] == pytest.approx(3 * KV, rel=0.01)
    assert sizes["all-to-all"] == (2 * QUERY + KV) // 2
    assert set(sizes) == {"collective-permute", "all-to-all"}
    hlo = compiled(topology, Ring(both_ways=True)).as_text()
    assert_moves(hlo, "collective-permute", OTHERS * KV)
    assert share_overlapped(hlo) == 1.0
    hlo = compiled(topology, TokenRing()).as_text()
    wanted = OTHERS * (2 * QUERY + 4 * PART * HEADS)
    assert_moves(hlo, "collective-permute", wanted)


@pytest.mark.slow
def test_memory_of_a_ring_does_not_grow_with_the_devices():
    sizes = [
        compiled(topology, Ring(zigzag=True, devices=chips), chips=chips)
        .memory_analysis()
        .temp_size_in_bytes
        for topology, chips in (("v5e:2x2", 4), ("v5e:2x4", 8), ("v5e:4x4", 16))
    ]
    assert max(sizes) <= 1.05 * min(sizes), sizes


@pytest.mark.slow
def test_two_layers_unrolled_keep_no_more_than_a_scan_over_them():
    """Where XLA saw that the gradient sends the same keys round, it would keep them all."""
    sizes = [
        compiled("v5e:2x4", Ring(zigzag=True, devices=CHIPS), gradient=True, layers=2, scan=scan)
        .memory_analysis()
        .temp_size_in_bytes
        for scan in (False, True)
    ]
    assert sizes[0] <= 1.3 * sizes[1], sizes


def test_loops_and_groups_are_read():
    hlo = """
HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x)
  %work = f32[8]{0} fusion(%x), kind=kLoop, calls=%none
  %end = f32[8]{0} collective-permute-done(%start)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(5)
}

%all-reduce-scatter (input: f32[16]) -> f32[4] {
  %sum = f32[16]{0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
}

%begun (a: f32[4]) -> (f32[4], f32[8]) {
  %wide = f32[8]{0} all-gather(%a), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %start = (f32[4], f32[8]) custom-call(%wide), custom_call_target="AsyncCollectiveStart"
}

%ended (a: f32[4]) -> f32[8] {
  %wide = f32[8]{0} all-gather(%a), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %done = f32[8] custom-call(%wide), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %one = (f32[4], f32[8]) fusion(%a), kind=kCustom, calls=%begun
  %two = f32[8]{0} fusion(%one), kind=kCustom, calls=%ended
  %loop = (s32[], f32[8]) while(%a), condition=%condition, body=%body
  %gathered = f32[32]{0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %moved = bf16[64]{0} all-to-all(%a), replica_groups=mesh['data'=2,'s'=4] {'s'}, dimensions={0}
  %scattered = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""
    assert collectives(hlo) == [
        Collective("all-gather", 16, 1, True),
        Collective("collective-permute", 32, 5, True),
        Collective("all-gather", 96, 1, False),
        Collective("all-to-all", 96, 1, False),
        Collective("reduce-scatter", 48, 1, False),
    ]
