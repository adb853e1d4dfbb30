"""The choice of a strategy: by bytes of the formulas, by what overlaps, and told in words."""

import jax
import jax.numpy as jnp
import pytest

from effattn.masks import Causal, Full, Window
from effattn.parallel.auto import call_of, explain
from effattn.parallel.costs import costs
from effattn.parallel.sequence import SequenceConfig
from effattn.static.chips import chip_of


def shapes(length, heads=32, kv_heads=8, batch=1, dim=128):
    return [
        jax.ShapeDtypeStruct((batch, length, n, dim), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads)
    ]


def found(length, *, mask=None, chip="v5p", ways=8, chips=None, zigzag=True, ulysses=None, **how):
    call = call_of(*shapes(length, **how), Causal() if mask is None else mask, ways, chips or ways)
    ordered = costs(call, chip_of(chip), zigzag=zigzag, ulysses=ulysses)
    return {cost.kind: cost for cost in ordered}, ordered[0].kind


def test_bytes_are_those_of_the_formulas():
    ways, length, heads, kv_heads = 8, 16_384, 16, 8
    kv = 2 * (length // ways) * kv_heads * 128 * 2
    query = length // ways * heads * 128 * 2
    by_kind, _ = found(length, heads=heads, kv_heads=kv_heads, ulysses=2)
    assert by_kind["ring"].forward == by_kind["gather"].forward == 7 * kv == 58_720_256
    assert by_kind["ring"].backward == 7 * kv + 8 * 2 * kv
    assert by_kind["ulysses"].forward == 7 * (2 * query + kv) // 8 == 22_020_096
    # 25.166 MB of ring and, of the exchange between two, half of 2 q + kv.
    assert by_kind["ring_ulysses"].forward == 3 * kv + (2 * query + kv) // 2 == 37_748_736
    window, _ = found(
        length, heads=heads, kv_heads=kv_heads, mask=Causal() & Window(left=512), zigzag=False
    )
    assert window["halo"].forward == 2 * 512 * kv_heads * 128 * 2 == 2_097_152


def test_long_rows_take_a_ring_and_windows_a_halo():
    assert found(1 << 20)[1] == "ring"
    assert found(1 << 20, mask=Causal() & Window(left=1024), zigzag=False)[1] == "halo"


def test_where_permutes_do_not_overlap_a_ring_is_not_taken():
    small, large = (found(1 << 15, chip="v5e", ways=8, chips=n)[0]["ring"] for n in (16, 256))
    assert small.exposed < large.exposed == large.seconds
    assert found(1 << 15, chip="v5e", ways=8, chips=256)[1] == "ulysses"


def test_what_cannot_be_split_refuses_in_a_sentence():
    by_kind, kind = found(4096, heads=6, kv_heads=2, mask=Full())
    assert by_kind["ulysses"].refuses == "num_heads on a device: got 6, expected a multiple of 8"
    assert by_kind["halo"].refuses is not None
    assert by_kind[kind].refuses is None


def test_a_contiguous_ring_waits_and_a_zigzag_does_not():
    assert found(1 << 16, zigzag=False)[0]["ring"].idle > 0
    assert found(1 << 16, zigzag=True)[0]["ring"].idle == 0


def test_it_explains_itself():
    text = explain(*shapes(1 << 16, heads=6, kv_heads=2), chip="v5p", ways=8, ulysses=4)
    assert "refuses: num_heads on a device: got 6, expected a multiple of 8" in text
    assert text.splitlines()[-1].startswith(("ring ", "gather ")), text
    assert "loses the least" in text
    with pytest.raises(ValueError, match="chip: got 'v4'"):
        explain(*shapes(4096), chip="v4", ways=8)


@pytest.mark.parametrize(
    ("fields", "devices", "says"),
    [
        ({"kind": "rings"}, 4, "sequence.kind: got 'rings', expected one of"),
        ({"kind": "ulysses", "zigzag": True}, 4, "zigzag: got True, expected False with 'ulysses'"),
        ({"kind": "auto", "both_ways": True}, 4, "both_ways: got True, expected False"),
        ({"kind": "ring_ulysses", "ulysses": 3}, 4, "mesh.sequence: got 4, expected a multiple of"),
        ({"kind": "ring_ulysses", "ulysses": 0}, 4, "sequence.ulysses: got 0"),
    ],
)
def test_a_wrong_config_is_a_sentence(fields, devices, says):
    with pytest.raises(ValueError, match=says):
        SequenceConfig(**fields).build(devices)
