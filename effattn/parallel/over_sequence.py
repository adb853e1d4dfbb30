"""What all strategies do alike that lay the tokens of a row over a mesh axis.

Each turns whole arrays into the parts that devices hold, once per call, and says in `shards` how
the parts meet. What knows nothing of other tokens (MLPs, norms, the head) XLA splits by itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.masks import Causal, Full, Mask
from effattn.pallas_kernels.attention import attention, merge
from effattn.pallas_kernels.attention.api import heads_by_mask
from effattn.pallas_kernels.attention.pair import AttentionPair
from effattn.pallas_kernels.linear_attention import LinearState
from effattn.pallas_kernels.prefix_scan import SoftmaxState
from effattn.parallel.delta_states import delta_rule_over
from effattn.parallel.hops import attend
from effattn.parallel.mesh import SEQUENCE_AXIS, TENSOR_AXIS, dividing_axes, free_axes
from effattn.parallel.neighbours import halo_over, previous_over, reduce_runs_over
from effattn.parallel.ring import Keys, Queries
from effattn.parallel.scans import gated_scan_over, softmax_scan_over
from effattn.parallel.sequence import Local, shard_map
from effattn.parallel.states import linear_attention_over


@dataclass(frozen=True)
class OverSequence:
    """Tokens over the mesh axis `axis`, in the order of the row; the rest as in `Local`.

    Where the mesh has no such axis, or one of size 1, everything is as on `Local`; so are decoding,
    and prefill against a cache, whose tokens do not lie on the axis.
    """

    axis: str = SEQUENCE_AXIS
    batch_axes: tuple[str, ...] = Local.batch_axes
    head_axes: tuple[str, ...] = (TENSOR_AXIS,)

    @property
    def local(self) -> Local:
        return Local(self.batch_axes, self.head_axes)

    def order(self, seq_len: int) -> np.ndarray | None:
        return None

    def ways(self) -> int:
        """Devices along the axis, of the mesh in context; 1 inside a `shard_map` over it."""
        return free_axes().get(self.axis, 1)

    def shards(
        self, pair: AttentionPair, ways: int, queries: Queries, keys: Keys
    ) -> tuple[jax.Array, jax.Array]:
        """(out, lse) of this device's queries over all keys, from the parts that devices hold."""
        raise NotImplementedError

    def check(self, ways: int, seq_len: int, num_heads: int, mask: Mask) -> None:
        """Raises ValueError, in a sentence, for a call that this strategy cannot split.

        num_heads: of the queries, on one device.
        """

    def attention(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> Any:
        """`effattn.pallas_kernels.attention.attention` over the whole sequence."""
        ways = self.ways()
        positions = [options.get(name) is not None for name in ("q_positions", "kv_positions")]
        others = query.shape[1] != key.shape[1]
        if ways == 1 or (others and (query.shape[1] % ways or not all(positions))):
            return self.local.attention(query, key, value, **options)
        check_multiple("seq_len", query.shape[1], f"mesh axis {self.axis!r}", ways)
        if options.get("blocks") is not None:
            raise ValueError(
                f"blocks: got a selection, expected None where {type(self).__name__} lays tokens "
                "over devices: its block numbers are of whole rows"
            )
        masks = options.get("mask", Causal())
        masks = [masks] * query.shape[2] if isinstance(masks, Mask) else list(masks)
        if len(set(masks)) == 1:
            out, lse = self._one_mask(ways, query, key, value, masks[0], options)
        else:
            parts = []
            groups = heads_by_mask(masks, key.shape[2])
            for mask, heads, kv in groups:
                arrays = query[:, :, heads], key[:, :, kv], value[:, :, kv]
                extra = {
                    name: options[name][:, :, kv]
                    for name in ("extra_key", "extra_value")
                    if options.get(name) is not None
                }
                parts.append(self._one_mask(ways, *arrays, mask, {**options, **extra}))
            back = np.argsort(np.concatenate([heads for _, heads, _ in groups]))
            out, lse = (jnp.concatenate(x, axis=2)[:, :, back] for x in zip(*parts, strict=True))
        return (out, lse) if options.get("return_lse") else out

    def _one_mask(
        self, ways: int, query: Any, key: Any, value: Any, mask: Mask, options: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        free = free_axes()
        batch, length, num_heads = query.shape[:3]
        # Keys that are not the queries' own tokens are few, and on every device.
        along = self.axis if key.shape[1] == length else None
        num_kv_heads = key.shape[2]
        rows = dividing_axes(self.batch_axes, free, batch)
        heads = dividing_axes(
            self.head_axes, free, num_heads if num_kv_heads == 1 else num_kv_heads
        )
        if along is not None:
            self.check(ways, length, num_heads // math.prod(free[a] for a in heads), mask)
        kv_heads = () if num_kv_heads == 1 else heads
        pair = AttentionPair(
            mask,
            options.get("scale"),
            options.get("logit_soft_cap"),
            options.get("implementation", "auto"),
        )

        def ids(name: str, default: Any) -> Any:
            given = options.get(name)
            given = default if given is None else given
            if given is None:
                return None
            given = jnp.asarray(given, jnp.int32)
            return given[None] if given.ndim == 1 else given

        order = self.order(length)
        q_positions = ids("q_positions", np.arange(length) if order is None else order)
        q_segments = ids("q_segment_ids", None)
        tokens = {
            "q_positions": q_positions,
            "kv_positions": ids("kv_positions", q_positions),
            "q_segment_ids": q_segments,
            "kv_segment_ids": ids("kv_segment_ids", q_segments),
        }
        extra = options.get("extra_key"), options.get("extra_value")

        def run(query: Any, key: Any, value: Any, tokens: Any, extra: Any) -> Any:
            queries = Queries(query, tokens["q_positions"], tokens["q_segment_ids"])
            keys = Keys(key, value, tokens["kv_positions"], tokens["kv_segment_ids"])
            meet = self.shards if along is not None else _all_here
            out, lse = meet(pair, ways, queries, keys)
            if extra[0] is None:
                return out, lse
            real = queries.segment_ids
            more = attention(
                query,
                *extra,
                mask=Full(),
                kv_positions=np.zeros(extra[0].shape[1], np.int32),
                q_positions=queries.positions,
                q_segment_ids=None if real is None else (real != 0).astype(jnp.int32),
                kv_segment_ids=None if real is None else np.ones(extra[0].shape[1], np.int32),
                scale=pair.scale,
                logit_soft_cap=pair.logit_soft_cap,
                implementation=pair.implementation,
                return_lse=True,
            )
            return merge(out, lse, *more)

        of_tokens = {
            name: P(
                rows if x is not None and len(x) == batch else None,
                self.axis if name.startswith("q") else along,
            )
            for name, x in tokens.items()
        }
        of_keys, of_extra = P(rows, along, kv_heads), P(rows, None, kv_heads)
        specs = P(rows, self.axis, heads), of_keys, of_keys, of_tokens, (of_extra, of_extra)
        out_specs = P(rows, self.axis, heads), P(rows, self.axis, heads)
        return shard_map(run, free, (query, key, value, tokens, extra), specs, out_specs)

    def neighborhood_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return self.local.neighborhood_attention(query, key, value, **options)

    def decode_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        return self.local.decode_attention(query, key, value, **options)

    def check_order(self) -> None:
        """Raises ValueError, in a sentence, where tokens do not come in the order of the row."""

    def _ways_in_order(self) -> int:
        ways = self.ways()
        if ways > 1:
            self.check_order()
        return ways

    def linear_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> tuple[jax.Array, LinearState]:
        """`linear_attention` over the whole sequence; states travel, tokens do not."""
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.linear_attention(query, key, value, **options)
        return linear_attention_over(
            self.axis, ways, self.batch_axes, self.head_axes, query, key, value, options
        )

    def delta_rule(
        self, query: jax.Array, key: jax.Array, value: jax.Array, beta: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.delta_rule(query, key, value, beta, **options)
        return delta_rule_over(
            self.axis, ways, self.batch_axes, self.head_axes, query, key, value, beta, options
        )

    def softmax_scan(
        self, scores: jax.Array, values: jax.Array, **options: Any
    ) -> tuple[jax.Array, SoftmaxState]:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.softmax_scan(scores, values, **options)
        return softmax_scan_over(self.axis, ways, scores, values, options)

    def gated_scan(
        self, gate: jax.Array, x: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.gated_scan(gate, x, **options)
        return gated_scan_over(self.axis, ways, gate, x, options)

    def halo(
        self, x: jax.Array, width: int, *, behind: int = 0, first: jax.Array | None = None
    ) -> jax.Array:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.halo(x, width, behind=behind, first=first)
        return halo_over(self.axis, ways, x, width, behind, first)

    def previous(self, tree: Any, valid: jax.Array, first: Any) -> tuple[Any, Any]:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.previous(tree, valid, first)
        return previous_over(self.axis, ways, tree, valid, first)

    def reduce_runs(self, x: jax.Array, runs: jax.Array, kind: str) -> jax.Array:
        ways = self._ways_in_order()
        if ways == 1:
            return self.local.reduce_runs(x, runs, kind)
        return reduce_runs_over(self.axis, ways, x, runs, kind)


def _all_here(
    pair: AttentionPair, ways: int, queries: Queries, keys: Keys
) -> tuple[jax.Array, jax.Array]:
    """`OverSequence.shards` where all keys are on this device."""
    return attend(pair, queries, keys)
