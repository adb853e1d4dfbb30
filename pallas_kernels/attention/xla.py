"""Attention in plain XLA: an online softmax over the pairs of blocks that the mask lets through.

Memory is linear in length, forward and backward: the backward pass recomputes the weights from
the log-sum-exp. Pairs are walked in two loops, FULL pairs without a mask and PARTIAL ones with it;
lengths of one block skip the loops.

Logits are held as [key, query], one column per query. Then every matrix product of both passes is
a row-major one without a transposed operand (on a CPU up to twice as fast as the others), and
the maximum and the sum over keys run across columns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSizes, Pairs, block_table, pairs_of, selected, shared_by_rows
from effattn.masks import EMPTY, FULL, PARTIAL
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens
from effattn.pallas_kernels.dispatch import Backend


class _Tuning(NamedTuple):
    """Block sizes to choose from; logits of all heads that one pair may hold; what a step costs
    beside its logits, counted in logits of one head."""

    candidates: tuple[int, ...]
    max_logits: int
    step_cost: int


# Measured on a 2-core Xeon with jax 0.12.0 (forward and backward, 4 to 64 heads of 16 to 64,
# 128 to 8192 tokens): a pair should fit the L2 cache, and blocks under 64 never win.
_CPU = _Tuning((512, 256, 128, 64), 2**20, 3000)
# An accelerator wants few, large steps: each costs several kernel launches.
_ACCELERATOR = _Tuning((1024, 512, 256), 2**26, 2**17)


def refuses(call: AttentionCall) -> str | None:
    return None


class _Plan(NamedTuple):
    """How a call is walked. positions, segments: [num_blocks, batch | 1, 1, block, 1] for keys and
    [num_blocks, batch | 1, 1, 1, group * block] for queries, in the order of the logits."""

    sizes: BlockSizes
    num_q: int
    num_kv: int
    full: Pairs
    partial: Pairs
    q_pos: Any
    kv_pos: Any
    q_ids: Any
    kv_ids: Any
    chosen: Any


def block_sizes(call: AttentionCall, tokens: Tokens) -> BlockSizes:
    """The sizes a call is cut into."""
    if tokens.blocks is not None:
        return BlockSizes(tokens.blocks.q_block, tokens.blocks.kv_block)
    if call.block_sizes is not None:
        return call.block_sizes
    return _best_sizes(call, _CPU if jax.default_backend() == "cpu" else _ACCELERATOR)


@functools.lru_cache(maxsize=1024)
def _best_sizes(call: AttentionCall, tuning: _Tuning) -> BlockSizes:
    """The cheapest sizes for the mask; traced positions are taken to be arange."""
    q_pos = np.arange(call.q_len)[None] if call.q_positions is None else call.q_positions.array
    kv_pos = np.arange(call.kv_len)[None] if call.kv_positions is None else call.kv_positions.array
    best: BlockSizes | None = None
    lowest = float("inf")
    for limit in tuning.candidates:
        sizes = BlockSizes(_even(call.q_len, limit), _even(call.kv_len, limit))
        num_q, num_kv = sizes.count(call.q_len, call.kv_len)
        last = limit == tuning.candidates[-1]
        if call.batch * call.num_heads * sizes.q * sizes.kv > tuning.max_logits and not last:
            continue
        # Lists stay short, and this search cheap, for the longest sequences.
        if best is not None and num_q * num_kv > 2**16:
            break
        kinds = shared_by_rows(block_table(call.mask, q_pos, kv_pos, sizes=sizes))
        cost = np.count_nonzero(kinds) * (sizes.q * sizes.kv + tuning.step_cost)
        if cost < lowest:
            best, lowest = sizes, float(cost)
    assert best is not None  # the last candidate is never passed over
    return best


def _even(length: int, limit: int) -> int:
    """The shortest multiple of 8 that covers `length` in as few blocks as `limit` does."""
    if length <= limit:
        return length
    return -(-length // (8 * -(-length // limit))) * 8


def _plan(call: AttentionCall, tokens: Tokens) -> _Plan:
    sizes = block_sizes(call, tokens)
    num_q, num_kv = sizes.count(call.q_len, call.kv_len)
    kinds = shared_by_rows(
        block_table(
            call.mask,
            tokens.q_positions,
            tokens.kv_positions,
            tokens.q_segment_ids,
            tokens.kv_segment_ids,
            sizes=sizes,
        )
    )
    chosen = None
    if tokens.blocks is not None:
        chosen = selected(tokens.blocks, num_kv)  # [b, h, num_q, num_kv]
        some, every = chosen.any((0, 1)), chosen.all((0, 1))
        kinds = jnp.where(every, kinds, jnp.where(some, jnp.minimum(kinds, PARTIAL), EMPTY))
        heads = chosen.shape[1]
        if heads == call.num_heads:
            chosen = chosen.reshape(len(chosen), call.num_kv_heads, call.group, num_q, num_kv)
        else:
            chosen = jnp.repeat(chosen[:, :, None], call.group, 2)
        # [num_q, num_kv, b, kv heads, 1, group * q_block]
        chosen = jnp.repeat(chosen.transpose(3, 4, 0, 1, 2), sizes.q, -1)[..., None, :]
    return _Plan(
        sizes,
        num_q,
        num_kv,
        pairs_of(kinds, FULL),
        pairs_of(kinds, PARTIAL),
        _tokens_of_queries(tokens.q_positions, sizes.q, call.group),
        _tokens_of_keys(tokens.kv_positions, sizes.kv),
        _tokens_of_queries(tokens.q_segment_ids, sizes.q, call.group),
        _tokens_of_keys(tokens.kv_segment_ids, sizes.kv),
        chosen,
    )


def _tokens_of_queries(x: Any, block: int, group: int) -> Any:
    if x is None:
        return None
    x = _cut(jnp.asarray(x), block)  # [num_blocks, b, block]
    return jnp.tile(x, (1, 1, group))[:, :, None, None, :]


def _tokens_of_keys(x: Any, block: int) -> Any:
    return None if x is None else _cut(jnp.asarray(x), block)[:, :, None, :, None]


def _cut(x: jax.Array, block: int) -> jax.Array:
    """[b, length, ...] -> [num_blocks, b, block, ...], zeros past the end."""
    missing = -x.shape[1] % block
    if missing:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)


def _rows(x: jax.Array, block: int, group: int = 1) -> jax.Array:
    """[b, length, kv heads * group, d] -> [num_blocks, b, kv heads, group * block, d]."""
    x = _cut(x, block)
    n, b, _, h, d = x.shape
    x = x.reshape(n, b, block, h // group, group, d).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(n, b, h // group, group * block, d)


def _columns(x: jax.Array, block: int, group: int = 1) -> jax.Array:
    """[b, length, kv heads * group, d] -> [num_blocks, b, kv heads, d, group * block]."""
    return _rows(x, block, group).swapaxes(-1, -2)


def _from_rows(x: jax.Array, length: int, group: int = 1) -> jax.Array:
    """The inverse of `_rows`."""
    n, b, k, rows, d = x.shape
    x = x.reshape(n, b, k, group, rows // group, d).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(b, n * rows // group, k * group, d)[:, :length]


def _from_columns(x: jax.Array, length: int, group: int = 1) -> jax.Array:
    return _from_rows(x.swapaxes(-1, -2), length, group)


def _product(a: jax.Array, b: jax.Array, accumulator: Any) -> jax.Array:
    """[b, k, m, n] @ [b, k, n, p], operands no wider than they came, sums in `accumulator`."""
    dtype = jnp.result_type(a, b)
    axes = (((3,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), axes, preferred_element_type=accumulator
    )


def _at(x: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, part: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, part.astype(x.dtype), i, 0)


def _logits(call: AttentionCall, key: jax.Array, query: jax.Array) -> tuple[jax.Array, Any]:
    """Logits [b, k, kv_block, group * q_block], and their derivative by the uncapped ones."""
    logits = _product(key, query, call.accumulator) * call.scale
    if call.logit_soft_cap is None:
        return logits, None
    capped = jnp.tanh(logits / call.logit_soft_cap)
    return call.logit_soft_cap * capped, 1 - capped * capped


def _allowed(call: AttentionCall, plan: _Plan, i: Any, j: Any) -> jax.Array:
    allowed = call.mask.allowed(_at(plan.q_pos, i), _at(plan.kv_pos, j))
    if plan.q_ids is not None:
        q_ids = _at(plan.q_ids, i)
        allowed &= (q_ids == _at(plan.kv_ids, j)) & (q_ids != 0)
    if plan.chosen is not None:
        allowed &= _at(_at(plan.chosen, i), j)
    if call.kv_len % plan.sizes.kv:
        slot = j * plan.sizes.kv + jnp.arange(plan.sizes.kv)
        allowed &= (slot < call.kv_len)[:, None]
    return allowed


def _walk(plan: _Plan, visit: Callable[..., Any], carry: Any) -> Any:
    """`visit(i, j, carry, masked)` for every pair that is not EMPTY."""
    for pairs, masked in ((plan.full, False), (plan.partial, True)):
        if isinstance(pairs.count, int) and pairs.count == 0:
            continue
        q, kv = jnp.asarray(pairs.q), jnp.asarray(pairs.kv)

        def step(t: Any, carry: Any, q: Any = q, kv: Any = kv, masked: bool = masked) -> Any:
            return visit(q[t], kv[t], carry, masked)

        carry = jax.lax.fori_loop(0, pairs.count, step, carry)
    return carry


def _masked_if_one_block(plan: _Plan) -> bool:
    return not (isinstance(plan.full.count, int) and plan.full.count == 1)


def varying(*arrays: jax.Array) -> jax.Array:
    """A zero that varies over the manual mesh axes that `arrays` vary over, for loop carries."""
    zeros = [(x.ravel()[0] != x.ravel()[0]) & False for x in arrays]
    return sum(zeros[1:], zeros[0]).astype(jnp.int32)


def forward(
    call: AttentionCall, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    plan = _plan(call, tokens)
    q = _columns(query, plan.sizes.q, call.group)
    k = _rows(key, plan.sizes.kv)
    # A row of ones under the values makes the same product add up the softmax's denominator.
    ones = jnp.ones((*value.shape[:-1], 1), value.dtype)
    v = _columns(jnp.concatenate([value, ones], -1), plan.sizes.kv)

    def block(i: Any, j: Any, masked: bool) -> tuple[jax.Array, jax.Array]:
        """(largest logit [b, k, 1, gq], sums of values and weights [b, k, e + 1, gq])."""
        logits, _ = _logits(call, _at(k, j), _at(q, i))
        if masked:
            logits = jnp.where(_allowed(call, plan, i, j), logits, -jnp.inf)
        top = logits.max(-2, keepdims=True)
        # exp(-inf - -inf) is nan, and a column with nothing allowed has top = -inf.
        weights = jnp.exp(logits - (jnp.where(top == -jnp.inf, 0, top) if masked else top))
        return top, _product(_at(v, j), weights, call.accumulator)

    def visit(i: Any, j: Any, carry: Any, masked: bool) -> Any:
        tops, sums = carry
        top, part = block(i, j, masked)
        old_top = _at(tops, i)
        new_top = jnp.maximum(old_top, top)
        reference = jnp.where(new_top == -jnp.inf, 0, new_top)
        part = _at(sums, i) * jnp.exp(old_top - reference) + part * jnp.exp(top - reference)
        return _put(tops, new_top, i), _put(sums, part, i)

    if plan.num_q == plan.num_kv == 1:
        tops, sums = (x[None] for x in block(0, 0, _masked_if_one_block(plan)))
    else:
        zero = varying(query, key, value, *_arrays(tokens)).astype(call.accumulator)
        shape = (plan.num_q, call.batch, call.num_kv_heads, call.value_dim + 1, q.shape[-1])
        sums = jnp.zeros(shape, call.accumulator) + zero
        tops, sums = _walk(plan, visit, (jnp.full_like(sums[..., :1, :], -jnp.inf) + zero, sums))
    sums, total = sums[..., :-1, :], sums[..., -1:, :]
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, tops + jnp.log(total), -jnp.inf)
    out = _from_columns((sums / total).astype(query.dtype), call.q_len, call.group)
    return out, _from_columns(lse, call.q_len, call.group)[..., 0]


def _arrays(tokens: Tokens) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tokens) if isinstance(x, jax.Array)]


def backward(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    plan = _plan(call, tokens)
    seen = lse > -jnp.inf
    # d lse / d logits are the weights themselves, so dlse joins the softmax's own correction.
    delta = (dout.astype(call.accumulator) * out).sum(-1) - dlse
    delta = jnp.where(seen, delta, 0)[..., None]
    lse = jnp.where(seen, lse, jnp.inf)[..., None]  # weights exp(logit - inf) = 0
    q_block, kv_block, group = plan.sizes.q, plan.sizes.kv, call.group
    q_rows, q_columns = _rows(query, q_block, group), _columns(query, q_block, group)
    k_rows, k_columns = _rows(key, kv_block), _columns(key, kv_block)
    v_rows = _rows(value, kv_block)
    dout_rows, dout_columns = _rows(dout, q_block, group), _columns(dout, q_block, group)
    delta, lse = _columns(delta, q_block, group), _columns(lse, q_block, group)

    def block(i: Any, j: Any, masked: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq columns, dk rows, dv rows) of one pair."""
        logits, slope = _logits(call, _at(k_rows, j), _at(q_columns, i))
        if masked:
            logits = jnp.where(_allowed(call, plan, i, j), logits, -jnp.inf)
        weights = jnp.exp(logits - _at(lse, i))
        dweights = _product(_at(v_rows, j), _at(dout_columns, i), call.accumulator)
        dlogits = weights * (dweights - _at(delta, i))
        if slope is not None:
            dlogits = dlogits * slope
        return (
            _product(_at(k_columns, j), dlogits, call.accumulator),
            _product(dlogits, _at(q_rows, i), call.accumulator),
            _product(weights, _at(dout_rows, i), call.accumulator),
        )

    def visit(i: Any, j: Any, carry: Any, masked: bool) -> Any:
        places = (i, j, j)
        parts = zip(carry, block(i, j, masked), places, strict=True)
        return tuple(_put(total, _at(total, at) + part, at) for total, part, at in parts)

    if plan.num_q == plan.num_kv == 1:
        dq, dk, dv = (x[None] for x in block(0, 0, _masked_if_one_block(plan)))
    else:
        zero = varying(query, key, value, dout, dlse, *_arrays(tokens)).astype(call.accumulator)
        empty = [jnp.zeros(x.shape, call.accumulator) + zero for x in (q_columns, k_rows, v_rows)]
        dq, dk, dv = _walk(plan, visit, tuple(empty))
    return (
        _from_columns(dq * call.scale, call.q_len, group).astype(query.dtype),
        _from_rows(dk * call.scale, call.kv_len).astype(key.dtype),
        _from_rows(dv, call.kv_len).astype(value.dtype),
    )


BACKEND = Backend("xla", refuses, forward, backward)
