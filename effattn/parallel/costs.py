"""What each way of meeting keys costs: bytes by formula, seconds by the published speed of links.

All seconds are arithmetic, to rank by. Formulas and what overlaps: README, "Over several devices";
read off compiled programs in tests/test_sequence_contracts.py.
"""

import dataclasses
from dataclasses import dataclass

from effattn.static.chips import Chip

# A v5e of so many chips runs its permutes one after another with the work (libtpu 0.0.51).
_V5E_OVERLAPS_BELOW = 32
# Share of the bytes of an all-gather that XLA lays beside work: on v5e half, elsewhere none.
_GATHER_OVERLAP = {"v5e": 0.5}
# Of the peak, what a flash kernel is reckoned to reach.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Call:
    """One layer's attention on one device of `ways`. part: tokens of a row that it holds.

    itemsize: bytes of an element. window: reach of the mask, None without. causal: no query sees a
    later key. chips: of the whole mesh.
    """

    batch: int
    part: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    ways: int
    causal: bool
    window: int | None
    chips: int

    @property
    def kv(self) -> int:
        """Bytes of this device's keys and values."""
        tokens = self.batch * self.part
        return tokens * self.num_kv_heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def kv_elements(self) -> int:
        return self.kv // self.itemsize

    @property
    def query(self) -> int:
        return self.batch * self.part * self.num_heads * self.head_dim * self.itemsize

    @property
    def out(self) -> int:
        return self.batch * self.part * self.num_heads * self.value_dim * self.itemsize

    @property
    def lse(self) -> int:
        return 4 * self.batch * self.part * self.num_heads

    def block_seconds(self, chip: Chip) -> float:
        """Of this device's queries over one other device's keys, forward."""
        flops = 2 * self.batch * self.num_heads * self.part**2 * (self.head_dim + self.value_dim)
        return flops / (chip.bf16_tflops * 1e12 * _EFFICIENCY)


@dataclass(frozen=True)
class Cost:
    """forward, backward: bytes that one device receives. seconds: of both on the links. exposed: of
    these, what no work stands beside. idle: seconds in which a device waits for one with more work.
    refuses: a sentence where the way cannot be taken.
    """

    kind: str
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    idle: float = 0.0
    refuses: str | None = None

    @property
    def lost(self) -> float:
        return self.exposed + self.idle


def costs(call: Call, chip: Chip, *, zigzag: bool, ulysses: int | None = None) -> list[Cost]:
    """Of every way, the cheapest first; those that refuse at the end.

    zigzag: tokens come in that order. ulysses: inner degree of Ring x Ulysses; None leaves it out.
    """
    found = [
        _halo(call, chip, zigzag),
        _ring(call, chip, zigzag),
        _ulysses(call, chip),
        _gather(call, chip, zigzag),
    ]
    if ulysses is not None:
        found.insert(2, _ring_ulysses(call, chip, zigzag, ulysses))
    return sorted(found, key=lambda c: (c.refuses is not None, c.lost, c.forward + c.backward))


def permutes_overlap(call: Call, chip: Chip) -> bool:
    return chip.name != "v5e" or call.chips < _V5E_OVERLAPS_BELOW


def _ring(call: Call, chip: Chip, zigzag: bool, kind: str = "ring") -> Cost:
    hops, kv = call.ways - 1, call.kv
    forward = hops * kv
    backward = hops * kv + call.ways * call.kv_elements * 4
    seconds = (forward + backward) / chip.link_bytes_per_second
    halves = 0.5 if zigzag and call.causal else 1.0
    block = halves * call.block_seconds(chip)
    exposed = seconds
    if permutes_overlap(call, chip):
        ahead = hops * max(0.0, kv / chip.link_bytes_per_second - block)
        # The backward block has two and a half times the products of the forward one.
        back = (kv + 4 * call.kv_elements) / chip.link_bytes_per_second - 2.5 * block
        exposed = ahead + call.ways * max(0.0, back)
    return Cost(kind, forward, backward, seconds, exposed, _idle(call, chip, zigzag))


def _idle(call: Call, chip: Chip, zigzag: bool) -> float:
    """Under a causal mask the last device has all the work of a row and the first next to none."""
    if zigzag or not call.causal or call.window is not None:
        return 0.0
    return 3.5 * call.block_seconds(chip) * (call.ways - 1) / 2


def _ulysses(call: Call, chip: Chip) -> Cost:
    if call.num_heads % call.ways:
        return _refused("ulysses", "num_heads on a device", call.num_heads, call.ways)
    size = (call.ways - 1) * (call.query + call.out + _repeated(call, call.ways)) // call.ways
    seconds = 2 * size / (2 * chip.link_bytes_per_second)
    return Cost("ulysses", size, size, seconds, seconds)


def _refused(kind: str, name: str, size: int, divisor: int) -> Cost:
    return Cost(kind, refuses=f"{name}: got {size}, expected a multiple of {divisor}")


def _repeated(call: Call, ways: int) -> int:
    """Bytes of keys and values once their heads are repeated to what `ways` divides."""
    heads = call.num_kv_heads
    while heads % ways:
        heads += call.num_kv_heads
    return call.kv * heads // call.num_kv_heads


def _ring_ulysses(call: Call, chip: Chip, zigzag: bool, degree: int) -> Cost:
    for name, size in (("num_heads on a device", call.num_heads), ("devices", call.ways)):
        if size % degree:
            return _refused("ring_ulysses", name, size, degree)
    near = (degree - 1) * (call.query + call.out + _repeated(call, degree)) // degree
    kv_heads = _repeated(call, degree) * call.num_kv_heads // call.kv
    inner = dataclasses.replace(
        call,
        part=call.part * degree,
        num_heads=call.num_heads // degree,
        num_kv_heads=kv_heads // degree,
        ways=call.ways // degree,
    )
    ring = _ring(inner, chip, zigzag)
    exchange = near / chip.link_bytes_per_second
    return Cost(
        "ring_ulysses",
        ring.forward + near,
        ring.backward + near,
        ring.seconds + exchange,
        ring.exposed + exchange,
        _idle(inner, chip, zigzag),
    )


def _gather(call: Call, chip: Chip, zigzag: bool) -> Cost:
    size = (call.ways - 1) * call.kv
    seconds = 2 * size / (2 * chip.link_bytes_per_second)
    covered = _GATHER_OVERLAP.get(chip.name, 0.0) / 2  # of the forward half; no reduce-scatter is
    return Cost("gather", size, size, seconds, seconds * (1 - covered), _idle(call, chip, zigzag))


def _halo(call: Call, chip: Chip, zigzag: bool) -> Cost:
    if call.window is None or not call.causal:
        return Cost("halo", refuses="mask: a halo wants Causal() & Window(left=...)")
    if zigzag:
        return Cost("halo", refuses="sequence.zigzag: a halo wants tokens in their order")
    if call.window >= call.part * (call.ways - 1):
        return Cost("halo", refuses=f"mask: a window of {call.window} reaches all devices")
    size = call.kv * call.window // call.part
    seconds = 2 * size / chip.link_bytes_per_second
    work = 3.5 * call.block_seconds(chip) * min(1.0, call.window / call.part)
    exposed = max(0.0, seconds - work) if permutes_overlap(call, chip) else seconds
    return Cost("halo", size, size, seconds, exposed)
