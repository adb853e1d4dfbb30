"""The strategy that chooses: each attention call gets the way that loses the least time.

`explain` says what each way would cost and which is taken.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from effattn.masks import Causal, Mask
from effattn.pallas_kernels.target import tpu_target
from effattn.parallel.costs import Call, Cost, costs
from effattn.parallel.gather_keys import GatherKeys
from effattn.parallel.halo import Halo, reach
from effattn.parallel.mesh import dividing_axes, free_axes
from effattn.parallel.over_sequence import OverSequence
from effattn.parallel.ring import is_causal
from effattn.parallel.ring_strategy import ORDER_BOUND, Ring, zigzag_order
from effattn.parallel.sequence import SequenceParallel
from effattn.parallel.ulysses import Ulysses
from effattn.static.chips import CHIPS, Chip, chip_of

# What costs are reckoned with where the device is no TPU that is known.
_DEFAULT_CHIP = "v5e"


@dataclass(frozen=True)
class Auto(OverSequence):
    """Of halo, ring, Ulysses and gathered keys, per call, by `effattn.parallel.costs`.

    zigzag, devices, gradient_dtype: as of `Ring`; with zigzag every call's tokens are in its order,
    so that a halo is never taken. Recurrent layers pass states whatever the choice.
    """

    zigzag: bool = False
    gradient_dtype: str = "float32"
    devices: int = 1

    def order(self, seq_len: int) -> np.ndarray | None:
        if not self.zigzag or self.devices == 1:
            return None
        return zigzag_order(seq_len, self.devices)

    def check_order(self) -> None:
        if self.zigzag:
            raise ValueError(ORDER_BOUND)

    def attention(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> Any:
        ways = self.ways()
        if ways == 1:
            return self.local.attention(query, key, value, **options)
        masks = options.get("mask", Causal())
        masks = [masks] if isinstance(masks, Mask) else list(dict.fromkeys(masks))
        free = free_axes()
        rows = np.prod([free[a] for a in dividing_axes(self.batch_axes, free, len(query))])
        heads = np.prod([free[a] for a in dividing_axes(self.head_axes, free, key.shape[2])])
        # One way for all heads of a call; masks that would choose apart share the ring, which takes
        # any.
        chosen = [
            costs(
                call_of(query, key, value, mask, ways, jax.sharding.get_abstract_mesh().size,
                        rows=int(rows), heads=int(heads)),
                _chip(),
                zigzag=self.zigzag,
            )[0]
            for mask in masks
        ]  # fmt: skip
        order = self.order(query.shape[1])
        if order is not None and options.get("q_positions") is None:
            options["q_positions"] = order  # which only a ring would know of itself
        kinds = {cost.kind for cost in chosen}
        kind = chosen[0].kind if len(kinds) == 1 else "ring"
        return self.strategy(kind).attention(query, key, value, **options)

    def strategy(self, kind: str) -> SequenceParallel:
        places = {"axis": self.axis, "batch_axes": self.batch_axes, "head_axes": self.head_axes}
        if kind == "ring":
            return Ring(
                **places,  # type: ignore[arg-type]
                zigzag=self.zigzag,
                gradient_dtype=self.gradient_dtype,
                devices=self.devices,
            )
        others: dict[str, Any] = {"halo": Halo, "ulysses": Ulysses, "gather": GatherKeys}
        return others[kind](**places)


def _chip() -> Chip:
    target = tpu_target()
    known = {chip.device_kind: chip for chip in CHIPS.values()}
    return known.get("" if target is None else target.kind, CHIPS[_DEFAULT_CHIP])


def call_of(
    query: Any,
    key: Any,
    value: Any,
    mask: Mask,
    ways: int,
    chips: int,
    *,
    rows: int = 1,
    heads: int = 1,
) -> Call:
    """Of whole arrays, or their shapes, whose rows and heads lie `rows` and `heads` ways."""
    return Call(
        batch=-(-query.shape[0] // rows),
        part=query.shape[1] // ways,
        num_heads=query.shape[2] // heads,
        num_kv_heads=max(1, key.shape[2] // heads),
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        itemsize=query.dtype.itemsize,
        ways=ways,
        causal=is_causal(mask),
        window=reach(mask),
        chips=chips,
    )


def explain(
    query: Any,
    key: Any,
    value: Any,
    *,
    chip: str,
    ways: int,
    mask: Mask = Causal(),  # noqa: B008 - frozen
    chips: int | None = None,
    zigzag: bool = False,
    ulysses: int | None = None,
) -> str:
    """A table of what each strategy would cost one device, and why the first is taken.

    query, key, value: arrays or shapes [batch, seq_len, heads, dim] of one row of the mesh's other
    axes. chip: "v5e", "v5p", "v6e" or "tpu7x". ways: devices along the sequence axis. chips: of the
    whole mesh, `ways` by default. Seconds are arithmetic on published peaks. Raises ValueError for
    an unknown chip.
    """
    call = call_of(query, key, value, mask, ways, ways if chips is None else chips)
    found = costs(call, chip_of(chip), zigzag=zigzag, ulysses=ulysses)
    lines = [
        f"{ways} devices of {chip}, {call.part:,} tokens each, {mask}",
        f"{'':14}{'forward MB':>12}{'backward MB':>13}{'ms':>9}{'exposed ms':>12}{'idle ms':>9}",
    ]
    lines += [_line(cost) for cost in found]
    first = found[0]
    if first.refuses is None:
        lines.append(
            f"{first.kind} loses the least: {1e3 * first.exposed:.3f} ms of transfer that no work "
            f"stands beside and {1e3 * first.idle:.3f} ms of waiting for the device with most work"
        )
    return "\n".join(lines)


def _line(cost: Cost) -> str:
    if cost.refuses is not None:
        return f"{cost.kind:14}refuses: {cost.refuses}"
    return (
        f"{cost.kind:14}{cost.forward / 1e6:12.2f}{cost.backward / 1e6:13.2f}"
        f"{1e3 * cost.seconds:9.3f}{1e3 * cost.exposed:12.3f}{1e3 * cost.idle:9.3f}"
    )
