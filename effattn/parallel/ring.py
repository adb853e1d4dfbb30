"""Ring attention: queries stay, keys and values pass by, one neighbour at a time.

Every device holds a part of each row's tokens. In N - 1 hops the keys and values of all others come
by; partial results are joined by their log-sum-exps, and no device ever holds more than two parts.
The backward pass sends keys and values round once more, with their gradients travelling along.

Zigzag: a row is cut into 2 N chunks and device i holds chunks i and 2 N - 1 - i, so that under a
causal mask all devices have the same work, half a block per hop. Both cases of a hop contain the
product of the later queries with the earlier keys; the other half is chosen by a select, because
behind a `cond` XLA does not overlap the hop with the work.

Source: Liu, Zaharia and Abbeel 2023, Ring Attention (arXiv 2310.01889); zigzag: Zhu 2024,
zhuzilin/ring-flash-attention. The select and the peeled first and last blocks are ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effattn.masks import And, Causal, Mask
from effattn.pallas_kernels.attention.call import Tokens
from effattn.pallas_kernels.attention.merge import merge
from effattn.pallas_kernels.attention.pair import AttentionPair


@dataclass(frozen=True)
class RingSpec:
    """axis, size: the mesh axis of the ring and its devices. both_ways: half of every part's keys
    goes round one way and half the other. zigzag: parts are a zigzag's two chunks each, under a
    mask that is causal. gradient_dtype: in which the gradients of keys and values travel. stride:
    how far along the axis a neighbour is; there are so many rings side by side then.
    """

    axis: str
    size: int
    pair: AttentionPair
    zigzag: bool = False
    both_ways: bool = False
    gradient_dtype: str = "float32"
    stride: int = 1

    def pairs(self, way: int) -> list[tuple[int, int]]:
        """(from, to) along the axis, a hop in the direction `way`."""
        around = self.size * self.stride
        return [(i, (i + way * self.stride) % around) for i in range(around)]


class Keys(NamedTuple):
    """What travels: [batch, tokens, kv_heads, ...] and, of the tokens, positions and segments."""

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None


class Queries(NamedTuple):
    query: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None


def is_causal(mask: Mask) -> bool:
    """Whether no query sees a later key, as far as the mask's own form tells."""
    if isinstance(mask, And):
        return is_causal(mask.left) or is_causal(mask.right)
    return isinstance(mask, Causal)


def ring_attention(spec: RingSpec, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of this device's queries over all devices' keys; inside `jax.shard_map`.

    Differentiable in query, key and value, in reverse mode.
    """
    return _ring(spec, queries, keys)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(spec: RingSpec, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    out, lse = _forward(spec, queries, keys)
    return out.astype(queries.query.dtype), lse


def _forward(spec: RingSpec, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """The running sums stay in float32 until the last block."""
    accumulator = jnp.promote_types(queries.query.dtype, jnp.float32)
    out, lse = spec.pair.forward(queries.query, keys.key, keys.value, _tokens(queries, keys))
    sums = out.astype(accumulator), lse

    def visit(parts: Any, sums: Any, hop: Any) -> Any:
        for keys in parts:
            sums = _add_block(spec, queries, keys, sums, hop)
        return sums

    def body(carry: Any, hop: jax.Array) -> tuple[Any, None]:
        parts, sums = carry
        # The next hop is begun before the block, which does not wait for it.
        following = _hop(spec, parts)
        return (following, visit(parts, sums, hop)), None

    if spec.size > 1:
        carry = _hop(spec, _split(spec, keys)), sums
        (parts, sums), _ = jax.lax.scan(body, carry, jnp.arange(1, spec.size - 1))
        sums = visit(parts, sums, spec.size - 1)
    return sums


def _ring_forward(spec: RingSpec, queries: Queries, keys: Keys) -> Any:
    out, lse = _forward(spec, queries, keys)
    # As in the op itself: kept by name, the ring goes round once before the backward pass.
    out = checkpoint_name(out.astype(queries.query.dtype), "mixer")
    lse = checkpoint_name(lse, "mixer")
    return (out, lse), (queries, keys, out, lse)


def _ring_backward(spec: RingSpec, residuals: Any, cotangents: Any) -> tuple[Queries, Keys]:
    # Without it XLA finds that the keys have travelled before, and keeps all that came by.
    queries, keys, out, lse, d_out, d_lse = jax.lax.optimization_barrier((*residuals, *cotangents))
    results = out, lse, d_out, d_lse
    travelling = jnp.promote_types(keys.key.dtype, spec.gradient_dtype)
    wide = jnp.promote_types(queries.query.dtype, jnp.float32)
    first = spec.pair.backward(
        queries.query, keys.key, keys.value, _tokens(queries, keys), *results
    )
    d_query = first[0].astype(wide)
    d_keys = tuple(x.astype(travelling) for x in first[1:])

    def visit(parts: Any, d_parts: Any, d_query: jax.Array, hop: Any) -> tuple[Any, jax.Array]:
        moved = []
        for keys, d_keys in zip(parts, d_parts, strict=True):
            dq, *new = _block_gradients(spec, queries, keys, results, hop)
            d_query = d_query + dq.astype(wide)
            moved.append(tuple(d + n.astype(d.dtype) for d, n in zip(d_keys, new, strict=True)))
        return tuple(moved), d_query

    def body(carry: Any, hop: jax.Array) -> tuple[Any, None]:
        parts, d_parts, d_query = carry
        # The gradients follow one hop behind the keys they belong to.
        following, d_parts = _hop(spec, parts), _hop(spec, d_parts)
        return (following, *visit(parts, d_parts, d_query, hop)), None

    if spec.size > 1:
        parts, d_parts = _split(spec, keys), _split_arrays(spec, d_keys)
        carry = _hop(spec, parts), d_parts, d_query
        (parts, d_parts, d_query), _ = jax.lax.scan(body, carry, jnp.arange(1, spec.size - 1))
        d_parts, d_query = visit(parts, _hop(spec, d_parts), d_query, spec.size - 1)
        d_keys = _joined(_hop(spec, d_parts))  # home
    d_key, d_value = (d.astype(x.dtype) for d, x in zip(d_keys, keys[:2], strict=True))
    none = Queries(d_query.astype(queries.query.dtype), None, None)  # type: ignore[arg-type]
    return none, Keys(d_key, d_value, None, None)  # type: ignore[arg-type]


_ring.defvjp(_ring_forward, _ring_backward)


# ---- travelling


def _split(spec: RingSpec, keys: Keys) -> tuple[Keys, ...]:
    """What sets out, one entry per direction."""
    if not spec.both_ways:
        return (keys,)
    return tuple(Keys(*part) for part in zip(*map(_halves, keys), strict=True))


def _split_arrays(spec: RingSpec, arrays: Any) -> tuple[Any, ...]:
    if not spec.both_ways:
        return (arrays,)
    return tuple(zip(*map(_halves, arrays), strict=True))


def _joined(parts: Any) -> Any:
    if len(parts) == 1:
        return parts[0]
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))


def _halves(x: Any) -> tuple[Any, Any]:
    if x is None:
        return None, None
    first, second = jnp.split(x, 2, axis=1)
    return first, second


def _hop(spec: RingSpec, parts: Any) -> Any:
    """Every direction's arrays at the next device."""
    moved = []
    for way, arrays in zip((1, -1), parts, strict=False):
        ring = spec.pairs(way)
        moved.append(
            jax.tree.map(lambda x, ring=ring: jax.lax.ppermute(x, spec.axis, ring), arrays)
        )
    return tuple(moved)


# ---- one block


def _tokens(queries: Queries, keys: Keys) -> Tokens:
    return Tokens(queries.positions, keys.positions, queries.segment_ids, keys.segment_ids, None)


def _add_block(
    spec: RingSpec, queries: Queries, keys: Keys, sums: Any, hop: Any
) -> tuple[jax.Array, jax.Array]:
    """`sums` with the keys of the device `hop` places back (or ahead, going the other way)."""
    if not spec.zigzag:
        block = spec.pair.forward(queries.query, keys.key, keys.value, _tokens(queries, keys))
        return _merged(sums, block)
    early, late = _queries_halves(queries)
    first, second = (Keys(*part) for part in zip(*map(_halves, keys), strict=True))
    sums_early, sums_late = zip(*(jnp.split(x, 2, axis=1) for x in sums), strict=True)
    block = spec.pair.forward(late.query, first.key, first.value, _tokens(late, first))
    sums_late = _merged(sums_late, block)
    # From a device before: the early queries see its first chunk. From one behind: the late queries
    # see its second.
    before = _comes_before(spec, hop)
    chosen, seen = _choose(before, early, late), _choose(before, first, second)
    block = spec.pair.forward(chosen.query, seen.key, seen.value, _tokens(chosen, seen))
    added = _merged(_choose(before, sums_early, sums_late), block)
    sums_early = _choose(before, added, sums_early)
    sums_late = _choose(before, sums_late, added)
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(sums_early, sums_late, strict=True))
    return out, lse


def _block_gradients(
    spec: RingSpec, queries: Queries, keys: Keys, results: Any, hop: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the keys at hand add to the gradients of query, key and value."""
    if not spec.zigzag:
        return spec.pair.backward(
            queries.query, keys.key, keys.value, _tokens(queries, keys), *results
        )
    early, late = _queries_halves(queries)
    first, second = (Keys(*part) for part in zip(*map(_halves, keys), strict=True))
    of_early, of_late = zip(*(jnp.split(x, 2, axis=1) for x in results), strict=True)
    dq_late, dk_first, dv_first = spec.pair.backward(
        late.query, first.key, first.value, _tokens(late, first), *of_late
    )
    before = _comes_before(spec, hop)
    chosen, seen = _choose(before, early, late), _choose(before, first, second)
    dq, dk, dv = spec.pair.backward(
        chosen.query, seen.key, seen.value, _tokens(chosen, seen),
        *_choose(before, of_early, of_late),
    )  # fmt: skip

    def halves(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.concatenate([first, second], axis=1)

    zero = jnp.zeros_like
    return (
        halves(jnp.where(before, dq, zero(dq)), dq_late + jnp.where(before, zero(dq), dq)),
        halves(dk_first + jnp.where(before, dk, zero(dk)), jnp.where(before, zero(dk), dk)),
        halves(dv_first + jnp.where(before, dv, zero(dv)), jnp.where(before, zero(dv), dv)),
    )


def _queries_halves(queries: Queries) -> tuple[Queries, Queries]:
    early, late = zip(*map(_halves, queries), strict=True)
    return Queries(*early), Queries(*late)


def _comes_before(spec: RingSpec, hop: Any) -> jax.Array:
    """Whether the keys at hand are of a device with a smaller index: `hop` places back."""
    return hop <= jax.lax.axis_index(spec.axis) // spec.stride


def _choose(condition: jax.Array, one: Any, other: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _merged(sums: Any, block: Any) -> tuple[jax.Array, jax.Array]:
    out, lse = block
    return merge(sums[0], sums[1], out.astype(sums[0].dtype), lse)
