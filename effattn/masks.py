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

    Positions are row-major indices into a grid of `axes`. window, stride, dilation, causal: one
    entry per axis. Not causal: queries in groups of `stride` share the window of their leader
    `L = min((i // s) * s + s // 2, n - 1)`: `[a, a + w)` with `a = clamp(L - w // 2, 0, n - w)`.
    Causal: `L = min((i // s) * s + s - 1, n - 1)` and the window is `[max(L - w + 1, 0), i]`.
    Dilation d splits an axis into d groups, `x mod d`, each with its own length.
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
        for axis, (n, w, s, d, _) in enumerate(self._per_axis()):
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

    def _per_axis(self) -> list[tuple[int, int, int, int, bool]]:
        ones = (1,) * len(self.axes)
        stride = ones if self.stride is None else self.stride
        dilation = ones if self.dilation is None else self.dilation
        causal = (False,) * len(self.axes) if self.causal is None else self.causal
        return list(zip(self.axes, self.window, stride, dilation, causal, strict=True))

    def _coordinates(self, pos: Any) -> list[Any]:
        coordinates = []
        for n in reversed(self.axes):
            coordinates.append(pos % n)
            pos = pos // n
        return coordinates[::-1]

    @staticmethod
    def _first_and_last(
        xp: Any, q: Any, axis: tuple[int, int, int, int, bool]
    ) -> tuple[Any, Any, Any]:
        """(dilation group, first, last) of each query's window, in group coordinates."""
        n, w, s, d, causal = axis
        group, i = q % d, q // d
        length = (n - group + d - 1) // d
        if causal:
            leader = xp.minimum(i // s * s + s - 1, length - 1)
            return group, xp.maximum(leader - w + 1, 0), i
        leader = xp.minimum(i // s * s + s // 2, length - 1)
        first = xp.clip(leader - w // 2, 0, length - w)
        return group, first, first + w - 1

    def allowed(self, q_pos: Any, kv_pos: Any) -> Any:
        xp = _numpy_for(q_pos, kv_pos)
        result = (q_pos == q_pos) & (kv_pos == kv_pos)
        pairs = zip(
            self._coordinates(q_pos), self._coordinates(kv_pos), self._per_axis(), strict=True
        )
        for q, kv, axis in pairs:
            group, first, last = self._first_and_last(xp, q, axis)
            place = kv // axis[3]
            result = result & (kv % axis[3] == group) & (place >= first) & (place <= last)
        return result

    def block_kinds(self, q_pos: Any, kv_pos: Any) -> Any:
        xp = _numpy_for(q_pos, kv_pos)
        empty = xp.zeros((q_pos.shape[0], kv_pos.shape[0]), bool)
        full = ~empty
        pairs = zip(
            self._coordinates(q_pos), self._coordinates(kv_pos), self._per_axis(), strict=True
        )
        for q, kv, axis in pairs:
            group, first, last = self._first_and_last(xp, q, axis)
            # Window ends as axis coordinates: group g's place p is p * d + g.
            first, last = first * axis[3] + group, last * axis[3] + group
            kv_min, kv_max = kv.min(1)[None], kv.max(1)[None]
            empty = empty | (kv_max < first.min(1)[:, None]) | (kv_min > last.max(1)[:, None])
            inside = (kv_min >= first.max(1)[:, None]) & (kv_max <= last.min(1)[:, None])
            full = full & inside & xp.asarray(axis[3] == 1)
        return _kinds(xp, empty, full)
