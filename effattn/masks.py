"""Attention masks as frozen expressions over absolute positions.

`Causal() & (Window(left=512) | Sink(4))` is a value: hashable, a static argument, and the same
object for a kernel, a ring, a cache and a packed batch. A new mask needs only `allowed`; it gets
fast where it also answers `block_kinds`. Blocks are turned into work lists in `blocks.py`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from effattn.checks import check_at_least, check_same_length

EMPTY, PARTIAL, FULL = 0, 1, 2


def _numpy_for(*arrays: Any) -> Any:
    """numpy while every position is known at trace time, so that block lists stay static."""
    return np if all(isinstance(a, (np.ndarray, np.generic, int)) for a in arrays) else jnp


class Mask:
    """Which (query position, key position) pairs may attend.

    Subclasses are frozen dataclasses. Compose with `&`, `|` and `~`.
    """

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        """Bool array broadcast from int32 `q_pos` and `kv_pos`; also runs inside kernels."""
        raise NotImplementedError

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        """EMPTY, PARTIAL or FULL for every pair of blocks: int32 [num_q_blocks, num_kv_blocks].

        q_pos: [num_q_blocks, q_block]; kv_pos: [num_kv_blocks, kv_block]. numpy positions give a
        numpy answer, traced ones a traced answer. PARTIAL may be said when unsure; EMPTY over an
        allowed pair or FULL over a forbidden one never.
        """
        xp = _numpy_for(q_pos, kv_pos)
        return xp.full((q_pos.shape[0], kv_pos.shape[0]), PARTIAL, dtype=xp.int32)

    # A kernel compares every query with every key, and works out once per query and once per key
    # what hangs on one of them alone: `allowed` in two steps, the first one outside of the kernel.
    # A mask whose `allowed` does more than compare positions answers all three.

    def q_words(self, q_pos: Any) -> tuple[Any, ...]:
        """What `allowed_by_words` reads of queries: int32 arrays in the shape of q_pos."""
        return (q_pos,)

    def kv_words(self, kv_pos: Any) -> tuple[Any, ...]:
        """What `allowed_by_words` reads of keys: int32 arrays in the shape of kv_pos."""
        return (kv_pos,)

    def allowed_by_words(self, q_words: tuple[Any, ...], kv_words: tuple[Any, ...]) -> Any:
        """`allowed` from `q_words` and `kv_words`."""
        return self.allowed(*q_words, *kv_words)

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


def _ranges(q_pos: Any, kv_pos: Any) -> tuple[Any, Any, Any, Any, Any]:
    """(xp, q_min, q_max, kv_min, kv_max) with the q side as a column, the kv side as a row."""
    xp = _numpy_for(q_pos, kv_pos)
    return (
        xp,
        q_pos.min(1)[:, None],
        q_pos.max(1)[:, None],
        kv_pos.min(1)[None, :],
        kv_pos.max(1)[None, :],
    )


def _kinds(xp: Any, empty: Any, full: Any) -> Any:
    return xp.where(empty, EMPTY, xp.where(full, FULL, PARTIAL)).astype(xp.int32)


@dataclass(frozen=True)
class And(Mask):
    left: Mask
    right: Mask

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return self.left.allowed(q_pos, kv_pos) & self.right.allowed(q_pos, kv_pos)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        kinds = self.left.block_kinds(q_pos, kv_pos), self.right.block_kinds(q_pos, kv_pos)
        return _numpy_for(*kinds).minimum(*kinds)


@dataclass(frozen=True)
class Or(Mask):
    left: Mask
    right: Mask

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return self.left.allowed(q_pos, kv_pos) | self.right.allowed(q_pos, kv_pos)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        kinds = self.left.block_kinds(q_pos, kv_pos), self.right.block_kinds(q_pos, kv_pos)
        return _numpy_for(*kinds).maximum(*kinds)


@dataclass(frozen=True)
class Not(Mask):
    mask: Mask

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return ~self.mask.allowed(q_pos, kv_pos)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        return FULL - self.mask.block_kinds(q_pos, kv_pos)


@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return (q_pos == q_pos) & (kv_pos == kv_pos)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp = _numpy_for(q_pos, kv_pos)
        return xp.full((q_pos.shape[0], kv_pos.shape[0]), FULL, dtype=xp.int32)


@dataclass(frozen=True)
class Causal(Mask):
    """A query sees itself and what came before it."""

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return kv_pos <= q_pos

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp, q_min, q_max, kv_min, kv_max = _ranges(q_pos, kv_pos)
        return _kinds(xp, kv_min > q_max, kv_max <= q_min)


@dataclass(frozen=True)
class Window(Mask):
    """Keys from `left` before the query to `right` after it, both ends included.

    None leaves a side open. `Causal() & Window(left=w)` sees w + 1 tokens, its own among them.
    """

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                check_at_least(f"Window.{name}", getattr(self, name), 0)

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        result = (q_pos == q_pos) & (kv_pos == kv_pos)
        if self.left is not None:
            result = result & (kv_pos >= q_pos - self.left)
        if self.right is not None:
            result = result & (kv_pos <= q_pos + self.right)
        return result

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp, q_min, q_max, kv_min, kv_max = _ranges(q_pos, kv_pos)
        empty = xp.zeros((q_min.shape[0], kv_min.shape[1]), bool)
        full = ~empty
        if self.left is not None:
            empty, full = empty | (kv_max < q_min - self.left), full & (kv_min >= q_max - self.left)
        if self.right is not None:
            empty = empty | (kv_min > q_max + self.right)
            full = full & (kv_max <= q_min + self.right)
        return _kinds(xp, empty, full)


@dataclass(frozen=True)
class Sink(Mask):
    """The first `length` positions, seen from everywhere (attention sinks; Xiao et al. 2023)."""

    length: int

    def __post_init__(self) -> None:
        check_at_least("Sink.length", self.length, 0)

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return (kv_pos < self.length) & (q_pos == q_pos)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp, q_min, _, kv_min, kv_max = _ranges(q_pos, kv_pos)
        every_row = xp.ones_like(q_min, bool)
        return _kinds(xp, every_row & (kv_min >= self.length), every_row & (kv_max < self.length))


@dataclass(frozen=True)
class PrefixLM(Mask):
    """Causal, and the first `length` positions are seen from everywhere."""

    length: int

    def __post_init__(self) -> None:
        check_at_least("PrefixLM.length", self.length, 0)

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return (kv_pos <= q_pos) | (kv_pos < self.length)

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        return (Causal() | Sink(self.length)).block_kinds(q_pos, kv_pos)


@dataclass(frozen=True)
class Dilated(Mask):
    """Keys whose distance to the query is a multiple of `dilation`."""

    dilation: int

    def __post_init__(self) -> None:
        check_at_least("Dilated.dilation", self.dilation, 1)

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        return (q_pos - kv_pos) % self.dilation == 0

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp, q_min, q_max, kv_min, kv_max = _ranges(q_pos, kv_pos)
        nearest, farthest = q_min - kv_max, q_max - kv_min
        no_multiple = nearest // self.dilation * self.dilation
        no_multiple = (no_multiple != nearest) & (no_multiple + self.dilation > farthest)
        one_pair = (nearest == farthest) & (nearest % self.dilation == 0)
        return _kinds(xp, no_multiple, one_pair | xp.asarray(self.dilation == 1))


@dataclass(frozen=True)
class Neighborhood(Mask):
    """Neighborhood attention over 1-3 axes, with NATTEN's exact semantics.

    Positions are row-major indices into a grid of `axes`; what stands outside of the grid attends
    nothing and is attended by nothing. window, stride, dilation, causal: one entry per axis. Not
    causal: queries in groups of `stride` share the window of their leader
    `L = min((i // s) * s + s // 2, n - 1)`: `[a, a + w)` with `a = clamp(L - w // 2, 0, n - w)`.
    Causal: `L = min((i // s) * s + s - 1, n - 1)` and the window is `[max(L - w + 1, 0), i]`.
    Dilation d splits an axis into d groups, `x mod d`, each with its own length.
    `block_kinds` is exact for blocks that are products of ranges in one dilation group per axis.
    Source: Hassani et al. 2023 and 2025 (Generalized Neighborhood Attention).
    """

    axes: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    causal: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.axes) <= 3:
            raise ValueError(f"Neighborhood.axes: got {self.axes}, expected 1 to 3 axes")
        for name in ("window", "stride", "dilation", "causal"):
            if getattr(self, name) is not None:
                check_same_length(
                    f"Neighborhood.{name}", getattr(self, name), len(self.axes), "axis"
                )
        for axis, (n, w, s, d, _) in enumerate(self.per_axis()):
            check_at_least(f"Neighborhood.window[{axis}]", w, 1)
            check_at_least(f"Neighborhood.stride[{axis}]", s, 1)
            check_at_least(f"Neighborhood.dilation[{axis}]", d, 1)
            if w * d > n:
                raise ValueError(
                    f"Neighborhood.window[{axis}]: window {w} x dilation {d} = {w * d} "
                    f"is larger than the axis, {n}"
                )
            if s > w:
                raise ValueError(
                    f"Neighborhood.stride[{axis}]: got {s}, expected at most window={w}"
                )

    def per_axis(self) -> list[tuple[int, int, int, int, bool]]:
        """(length, window, stride, dilation, causal) of every axis."""
        ones = (1,) * len(self.axes)
        stride = ones if self.stride is None else self.stride
        dilation = ones if self.dilation is None else self.dilation
        causal = (False,) * len(self.axes) if self.causal is None else self.causal
        return list(zip(self.axes, self.window, stride, dilation, causal, strict=True))

    def coordinates(self, pos: Any) -> list[Any]:
        """One coordinate per axis; the first one leaves its axis where pos leaves the grid."""
        coordinates = []
        for n in reversed(self.axes[1:]):
            coordinates.append(pos % n)
            pos = pos // n
        return [pos, *coordinates[::-1]]

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        xp = _numpy_for(q_pos, kv_pos)
        result = None
        coordinates = zip(self.coordinates(q_pos), self.coordinates(kv_pos), strict=True)
        for i, ((q, kv), (n, w, s, d, causal)) in enumerate(
            zip(coordinates, self.per_axis(), strict=True)
        ):
            length = -(-(n - q % d) // d)
            first, last = neighborhood_window(xp, q // d, length, w, s, causal)
            if i == 0:
                # A first place that no key reaches. Keys outside need no test: no window has them.
                first = xp.where((q >= 0) & (q < n), first, n)
            place = kv // d
            seen = (place >= first) & (place <= last)
            if d > 1:
                seen = seen & (kv % d == q % d)
            result = seen if result is None else result & seen
        return result

    def _fields(self) -> tuple[tuple[int, ...], int]:
        """(lowest bit of each axis's field, the fields' top bits together) of a packed word.

        A field holds a place as group * places per group + place, so that a window in one dilation
        group is one range of it. Its top bit stays free for the borrow of a difference.
        """
        starts, tops, start = [], 0, 0
        for n, _, _, d, _ in self.per_axis():
            starts.append(start)
            start += (d * -(-n // d)).bit_length() + 1
            tops |= 1 << (start - 1)
        return tuple(starts), tops

    def _packs(self) -> bool:
        # On one axis two comparisons cost less.
        return len(self.axes) > 1 and self._fields()[1] < 2**31

    def q_words(self, q_pos: Any) -> tuple[Any, ...]:
        """The first and, with the top bits set, the last place of the window, packed."""
        if not self._packs():
            return (q_pos,)
        xp = _numpy_for(q_pos)
        starts, tops = self._fields()
        firsts: Any = 0
        lasts: Any = tops
        q_axes = self.coordinates(q_pos)
        inside = (q_axes[0] >= 0) & (q_axes[0] < self.axes[0])
        for q, start, (n, w, s, d, causal) in zip(q_axes, starts, self.per_axis(), strict=True):
            group = q % d
            length = -(-(n - group) // d)
            base = group * -(-n // d)
            first, last = neighborhood_window(xp, q // d, length, w, s, causal)
            # An empty range for a query outside.
            firsts += xp.where(inside, base + first, 1) << start
            lasts += xp.where(inside, base + last, 0) << start
        return firsts.astype(xp.int32), lasts.astype(xp.int32)

    def kv_words(self, kv_pos: Any) -> tuple[Any, ...]:
        """The key's place, packed; a place that no window has for a key outside."""
        if not self._packs():
            return (kv_pos,)
        xp = _numpy_for(kv_pos)
        word: Any = 0
        kv_axes = self.coordinates(kv_pos)
        inside = (kv_axes[0] >= 0) & (kv_axes[0] < self.axes[0])
        for kv, start, (n, _, _, d, _) in zip(
            kv_axes, self._fields()[0], self.per_axis(), strict=True
        ):
            places = -(-n // d)
            word += xp.where(inside, kv % d * places + kv // d, d * places) << start
        return (word.astype(xp.int32),)

    def allowed_by_words(self, q_words: tuple[Any, ...], kv_words: tuple[Any, ...]) -> Any:
        if not self._packs():
            return super().allowed_by_words(q_words, kv_words)
        # All axes at once: a top bit survives both differences where first <= place <= last.
        tops = self._fields()[1]
        (firsts, lasts), (place,) = q_words, kv_words
        return ((place | tops) - firsts) & (lasts - place) & tops == tops

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp = _numpy_for(q_pos, kv_pos)
        q_axes, kv_axes = self.coordinates(q_pos), self.coordinates(kv_pos)
        n = self.axes[0]
        q_inside = (q_axes[0] >= 0) & (q_axes[0] < n)
        kv_inside = (kv_axes[0] >= 0) & (kv_axes[0] < n)
        # Slots outside take no part in a block's ranges: they must not widen them.
        full = q_inside.all(1)[:, None] & kv_inside.all(1)[None]
        empty = ~(q_inside.any(1)[:, None] & kv_inside.any(1)[None])

        def ranged(x: Any, inside: Any) -> tuple[Any, Any]:
            top = np.int32(np.iinfo(np.int32).max)
            return xp.where(inside, x, top).min(1), xp.where(inside, x, -1).max(1)

        for q, kv, (n, w, s, d, causal) in zip(q_axes, kv_axes, self.per_axis(), strict=True):
            group = q % d
            first, last = neighborhood_window(xp, q // d, -(-(n - group) // d), w, s, causal)
            # Window ends as axis coordinates: group g's place p is p * d + g.
            first_min, first_max = ranged(first * d + group, q_inside)
            last_min, last_max = ranged(last * d + group, q_inside)
            kv_min, kv_max = ranged(kv, kv_inside)
            empty = empty | (kv_max < first_min[:, None]) | (kv_min > last_max[:, None])
            full = full & (kv_min >= first_max[:, None]) & (kv_max <= last_min[:, None])
            if d > 1:
                q_low, q_high = ranged(group, q_inside)
                kv_low, kv_high = ranged(kv % d, kv_inside)
                empty = empty | (kv_high < q_low[:, None]) | (kv_low > q_high[:, None])
                one_group = (kv_low == q_low[:, None]) & (kv_high == q_high[:, None])
                full = full & one_group & (q_low == q_high)[:, None]
        return _kinds(xp, empty, full)


def neighborhood_window(
    xp: Any, i: Any, length: Any, window: int, stride: int, causal: bool
) -> tuple[Any, Any]:
    """(first, last) place that the query at place i sees on one axis of `length` places.

    Places count within one dilation group; neither end grows smaller as i grows. xp: numpy or
    jax.numpy, as i and length are.
    """
    if causal:
        leader = xp.minimum(i // stride * stride + stride - 1, length - 1)
        return xp.maximum(leader - window + 1, 0), xp.minimum(i, length - 1)
    leader = xp.minimum(i // stride * stride + stride // 2, length - 1)
    first = xp.clip(leader - window // 2, 0, length - window)
    return first, first + window - 1
