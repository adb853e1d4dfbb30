"""How the sequence axis is laid over devices: the ops of a layer go through one of these values.

A layer asks its strategy for attention instead of calling the op, so the same layer runs on one
device or on a ring. `Local` keeps whole sequences on each device, and is the one place that knows
`jax.shard_map`: XLA splits its own operations over a mesh, and cannot split a Pallas kernel.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from effattn.checks import check_at_least, check_in, check_multiple
from effattn.masks import Mask
from effattn.pallas_kernels.attention import (
    attention,
    decode_attention,
    neighborhood_attention,
)
from effattn.pallas_kernels.delta_rule import delta_rule
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.pallas_kernels.linear_attention.packing import previous_valid, reduce_runs
from effattn.pallas_kernels.prefix_scan import SoftmaxState, gated_scan, softmax_scan
from effattn.pallas_kernels.target import may_be_pallas
from effattn.parallel.mesh import BATCH_AXES, STREAMS_AXIS, TENSOR_AXIS, dividing_axes, free_axes

# Options of the ops that are arrays, and thus have a place on the mesh.
POSITIONS = ("q_positions", "kv_positions")
KEYS = ("extra_key", "extra_value")
ARRAYS = {*POSITIONS, "q_segment_ids", "kv_segment_ids", "lengths", *KEYS, "blocks"}


class SequenceParallel(Protocol):
    """A frozen, hashable strategy; layers hold it as a static attribute."""

    @property
    def local(self) -> "Local":
        """The same without the sequence axis: XLA brings each device the whole rows."""
        ...

    def order(self, seq_len: int) -> np.ndarray | None:
        """The token permutation that the data loader applies once, or None for the plain order."""
        ...

    def attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.attention` over the whole sequence."""
        ...

    def neighborhood_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.neighborhood_attention` over the whole grid."""
        ...

    def decode_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """`effattn.pallas_kernels.attention.decode_attention` over the whole cache."""
        ...

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        """`effattn.pallas_kernels.linear_attention.linear_attention` over the whole sequence."""
        ...

    def delta_rule(
        self, query: jax.Array, key: jax.Array, value: jax.Array, beta: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """`effattn.pallas_kernels.delta_rule.delta_rule` over the whole sequence."""
        ...

    def softmax_scan(
        self, scores: jax.Array, values: jax.Array, **options: Any
    ) -> tuple[jax.Array, SoftmaxState]:
        """`effattn.pallas_kernels.prefix_scan.softmax_scan` over the whole sequence."""
        ...

    def gated_scan(
        self, gate: jax.Array, x: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """`effattn.pallas_kernels.prefix_scan.gated_scan` over the whole sequence."""
        ...

    def halo(
        self, x: jax.Array, width: int, *, behind: int = 0, first: jax.Array | None = None
    ) -> jax.Array:
        """[batch, parts, width + n + behind, ...]: the row in parts of n tokens, one per device,
        each with `width` tokens before it in front and `behind` after it.

        x: [batch, seq_len, ...]. first: [batch, width, ...], what stands before the row; None for
        zeros, as behind it.
        """
        ...

    def previous(self, tree: Any, valid: jax.Array, first: Any) -> tuple[Any, Any]:
        """For every token the last valid one before it, and the last valid one of all: see
        `effattn.pallas_kernels.linear_attention.packing.previous_valid`."""
        ...

    def reduce_runs(self, x: jax.Array, runs: jax.Array, kind: str) -> jax.Array:
        """`effattn.pallas_kernels.linear_attention.packing.reduce_runs` over the whole sequence."""
        ...


@dataclass(frozen=True)
class Local:
    """Every device holds whole sequences.

    Under a mesh (`jax.set_mesh`), a kernel that XLA cannot split runs on each device's own rows and
    heads: batch_axes, head_axes name the mesh axes over which the batch and the heads lie, those
    that the mesh does not have aside. An axis that divides neither stays out of it: its devices
    compute the same. Heads are split where the axis divides the kv heads, or there is one of them.
    """

    # Streams come first: a batch of them is laid out stream by stream.
    batch_axes: tuple[str, ...] = (STREAMS_AXIS, *BATCH_AXES)
    head_axes: tuple[str, ...] = ()

    @property
    def local(self) -> "Local":
        return self

    def order(self, seq_len: int) -> None:
        return None

    def attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return self._on_each_device(attention, query, key, value, options)

    def decode_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return self._on_each_device(decode_attention, query, key, value, options)

    def neighborhood_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return self._on_each_device(neighborhood_attention, query, key, value, options)

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        free = self._free_axes(options)
        if free is None:
            return linear_attention(query, key, value, **options)
        batch, num_key_heads, num_heads = query.shape[0], key.shape[2], value.shape[2]
        rows = dividing_axes(self.batch_axes, free, batch)
        heads = dividing_axes(
            self.head_axes, free, num_heads if num_key_heads == 1 else num_key_heads
        )
        key_heads = () if num_key_heads == 1 else heads
        of_keys, of_values = (PartitionSpec(rows, None, of) for of in (key_heads, heads))
        places = {
            "log_decay": PartitionSpec(heads) if _rank(options, "log_decay") == 1 else of_values,
            "state": PartitionSpec(rows, heads),
            "prefix_key": of_keys,
            "prefix_value": of_values,
            "prefix_segment_ids": PartitionSpec(rows),
            "segment_ids": PartitionSpec(rows),
        }
        traced = {n: x for n, x in options.items() if n in places and x is not None}
        static = {n: x for n, x in options.items() if n not in traced}

        def run(query: jax.Array, key: jax.Array, value: jax.Array, traced: Any) -> Any:
            return linear_attention(query, key, value, **static, **traced)

        specs = of_keys, of_keys, of_values, {name: places[name] for name in traced}
        out_specs = of_values, places["state"]
        return shard_map(run, free, (query, key, value, traced), specs, out_specs)

    def _free_axes(self, options: dict[str, Any]) -> dict[str, int] | None:
        """The mesh axes to split a call over; None where nothing has to be split by hand."""
        free = free_axes()
        one = math.prod(free.values()) == 1
        return None if one or not may_be_pallas(options.get("implementation", "auto")) else free

    def delta_rule(
        self, query: jax.Array, key: jax.Array, value: jax.Array, beta: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        return delta_rule(query, key, value, beta, **options)

    def softmax_scan(
        self, scores: jax.Array, values: jax.Array, **options: Any
    ) -> tuple[jax.Array, SoftmaxState]:
        return softmax_scan(scores, values, **options)

    def gated_scan(
        self, gate: jax.Array, x: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        return gated_scan(gate, x, **options)

    def halo(
        self, x: jax.Array, width: int, *, behind: int = 0, first: jax.Array | None = None
    ) -> jax.Array:
        padding = [(0, 0), (width if first is None else 0, behind), *[(0, 0)] * (x.ndim - 2)]
        x = x if first is None else jnp.concatenate([first.astype(x.dtype), x], axis=1)
        return jnp.pad(x, padding)[:, None]

    def previous(self, tree: Any, valid: jax.Array, first: Any) -> tuple[Any, Any]:
        return previous_valid(tree, valid, first)

    def reduce_runs(self, x: jax.Array, runs: jax.Array, kind: str) -> jax.Array:
        return reduce_runs(x, runs, kind)

    def _on_each_device(
        self, op: Callable[..., Any], query: Any, key: Any, value: Any, options: dict[str, Any]
    ) -> Any:
        free = self._free_axes(options)
        if free is None:
            return op(query, key, value, **options)
        split = self._split(free, query, key, options.get("mask"))
        if split.masks is not None:
            options = {**options, "mask": split.masks}
        traced = {n: x for n, x in options.items() if n in ARRAYS and x is not None}
        static = {n: x for n, x in options.items() if n not in traced}
        for name, x in list(traced.items()):
            # Positions known at trace time stay so: that is what empty blocks are skipped by.
            if name in POSITIONS and isinstance(x, np.ndarray) and (x.ndim == 1 or _rows_equal(x)):
                static[name] = traced.pop(name).reshape(-1, x.shape[-1])[:1]
        specs = (
            split.heads_of(query, split.heads),
            split.heads_of(key, split.kv_heads),
            split.heads_of(value, split.kv_heads),
            {name: split.of(name, x) for name, x in traced.items()},
        )
        out_specs: Any = specs[0]
        if options.get("return_lse", False):
            out_specs = out_specs, PartitionSpec(*out_specs[:-1])

        def run(query: jax.Array, key: jax.Array, value: jax.Array, traced: Any) -> Any:
            return op(query, key, value, **static, **traced)

        return shard_map(run, free, (query, key, value, traced), specs, out_specs)

    def _split(self, free: dict[str, int], query: Any, key: Any, mask: Any) -> "_Split":
        """How the batch and the heads of a call are split over the axes of the mesh."""
        num_heads, num_kv_heads = query.shape[-2], key.shape[-2]
        rows = dividing_axes(self.batch_axes, free, query.shape[0])
        heads = dividing_axes(
            self.head_axes, free, num_heads if num_kv_heads == 1 else num_kv_heads
        )
        masks = None
        if isinstance(mask, Sequence) and not isinstance(mask, Mask):
            # One program runs on all devices: each must hold the same masks in the same order.
            ways = math.prod(free[axis] for axis in heads)
            masks = tuple(mask)[: num_heads // ways]
            if masks * ways != tuple(mask):
                heads, masks = (), tuple(mask)
        kv_heads = () if num_kv_heads == 1 else heads
        return _Split(rows, heads, kv_heads, query.shape[0], num_heads, num_kv_heads, masks)


def shard_map(
    run: Callable[..., Any], free: dict[str, int], arrays: Any, specs: Any, out_specs: Any
) -> Any:
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        arrays = jax.sharding.reshard(arrays, specs)
    # A Pallas call does not say over which axes its result varies.
    split = jax.shard_map(
        run, in_specs=specs, out_specs=out_specs, axis_names=set(free), check_vma=False
    )
    return split(*arrays)


def _rank(options: dict[str, Any], name: str) -> int | None:
    return None if options.get(name) is None else np.ndim(options[name])


class _Split(NamedTuple):
    """The mesh axes of rows, of query heads and of kv heads, and what they divide."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    batch: int
    num_heads: int
    num_kv_heads: int
    masks: tuple[Mask, ...] | None

    def heads_of(self, x: Any, heads: tuple[str, ...]) -> PartitionSpec:
        """[batch, ..., heads, features]."""
        return PartitionSpec(self.rows, *[None] * (x.ndim - 3), heads, None)

    def of(self, name: str, x: Any) -> Any:
        if name in KEYS:
            return self.heads_of(x, self.kv_heads)
        if name == "blocks":
            return jax.tree.map(self._of_blocks, x)
        whole = name != "lengths" and (np.ndim(x) == 1 or np.shape(x)[0] != self.batch)
        return PartitionSpec(None if whole else self.rows)

    def _of_blocks(self, x: Any) -> PartitionSpec:
        """[batch | 1, 1 | kv heads | heads, ...]."""
        rows = self.rows if x.shape[0] == self.batch else None
        by_heads = {self.num_kv_heads: self.kv_heads, self.num_heads: self.heads}
        return PartitionSpec(rows, None if x.shape[1] == 1 else by_heads[x.shape[1]])


def _rows_equal(x: np.ndarray) -> bool:
    return bool((x == x[:1]).all())


# kind -> (module, class)
KINDS = {
    "local": None,
    "auto": ("effattn.parallel.auto", "Auto"),
    "ring": ("effattn.parallel.ring_strategy", "Ring"),
    "ring_ulysses": ("effattn.parallel.ring_ulysses", "RingUlysses"),
    "token_ring": ("effattn.parallel.token_ring", "TokenRing"),
    "ulysses": ("effattn.parallel.ulysses", "Ulysses"),
    "gather": ("effattn.parallel.gather_keys", "GatherKeys"),
    "halo": ("effattn.parallel.halo", "Halo"),
}
# Those that have a ring in them, and its fields.
_RINGS = ("ring", "ring_ulysses", "auto")


@dataclass(kw_only=True)
class SequenceConfig:
    """How tokens meet where `mesh.sequence` splits the rows.

    kind: one of KINDS, each a class in a file of its own; "local" leaves it to XLA, "auto" chooses
    for each layer. zigzag: of rings. both_ways: of "ring". ulysses: devices that exchange heads in
    "ring_ulysses". gradient_dtype: of the gradients of keys and values that travel on a ring.
    """

    kind: str = "local"
    zigzag: bool = False
    both_ways: bool = False
    ulysses: int = 2
    gradient_dtype: str = "float32"

    def build(self, devices: int = 1) -> SequenceParallel:
        """devices: along the mesh axis. Raises ValueError for an unknown kind, and for what only a
        ring has."""
        check_in("sequence.kind", self.kind, tuple(KINDS))
        check_in("sequence.gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
        if self.zigzag and self.kind not in _RINGS:
            raise ValueError(f"sequence.zigzag: got True, expected False with {self.kind!r}")
        if self.both_ways and self.kind != "ring":
            raise ValueError(f"sequence.both_ways: got True, expected False with {self.kind!r}")
        if self.zigzag and self.both_ways:
            raise ValueError(
                "sequence.both_ways: got True, expected False with zigzag, whose devices all have "
                "the same work by keeping chunks together"
            )
        place = KINDS[self.kind]
        if place is None:
            return Local(head_axes=(TENSOR_AXIS,))
        options: dict[str, Any] = {}
        if self.kind in _RINGS:
            options = {"zigzag": self.zigzag, "gradient_dtype": self.gradient_dtype}
            options["devices"] = devices
        if self.kind == "ring":
            options["both_ways"] = self.both_ways
        if self.kind == "ring_ulysses":
            check_at_least("sequence.ulysses", self.ulysses, 1)
            if devices > 1:
                check_multiple("mesh.sequence", devices, "sequence.ulysses", self.ulysses)
            options["degree"] = self.ulysses
        # They are built on this module.
        return getattr(importlib.import_module(place[0]), place[1])(**options)
