"""How a call of linear attention is laid out for its TPU kernels.

A grid step is one chunk of tokens for a few heads; the chunks of a row come one after another and
the states of the heads stay in VMEM in between. Heads lie side by side in lanes, as a projection
makes them, [batch, length, heads * dim]; inside, tokens stand in lanes and channels in sublanes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.linear_attention.call import LinearAttentionCall, Operands
from effattn.pallas_kernels.linear_attention.state import LinearState
from effattn.pallas_kernels.linear_attention.tpu_features import (
    num_kernel_features,
    packed_from_kernel,
)
from effattn.pallas_kernels.tuning import LANES, LinearTuning

SUBLANES = 16  # of bfloat16
ROWS = 8  # of float32: statistics of heads come in as many rows at least
FORGOTTEN = -110.0  # exp of less is 0 in float32, and sums of it would drown their neighbors
# Runs of padding, which no token shares: as queries and as keys.
_NO_QUERY, _NO_KEY = -2.0, -1.0


class Plan(NamedTuple):
    """strip: tokens of a piece of a chunk, of which pipeline are begun ahead of the one that is
    finished. key_heads, heads: key and value heads of one step. groups: steps for all of the heads;
    parts: of these, how many share a key head and give partial sums of its gradients. key_dim,
    value_dim, length: padded. features, columns: of a head's state; with `normalize` the columns
    of the values are followed by one of ones. has_runs: whether tokens are told apart by run."""

    call: LinearAttentionCall
    chunk: int
    strip: int
    pipeline: int
    key_heads: int
    heads: int
    groups: int
    parts: int
    key_dim: int
    value_dim: int
    length: int
    features: int
    columns: int
    has_runs: bool
    vmem: int

    @property
    def num_chunks(self) -> int:
        return self.length // self.chunk

    @property
    def repeats(self) -> int:
        """Value heads of one key head in a step."""
        return self.heads // self.key_heads

    @property
    def rows(self) -> int:
        return -(-self.heads // ROWS) * ROWS


def make_plan(call: LinearAttentionCall, tuning: LinearTuning) -> Plan:
    key_dim, value_dim = (-(-n // SUBLANES) * SUBLANES for n in (call.key_dim, call.value_dim))
    key_heads, heads = _heads_of_a_step(call, key_dim, value_dim, tuning.heads)
    wanted = tuning.chunk if call.chunk_size is None else call.chunk_size
    # Tokens lie in lanes.
    chunk = LANES * max(1, min(wanted, call.seq_len + LANES - 1) // LANES)
    length = -(-call.seq_len // chunk) * chunk
    groups = call.num_heads // heads
    padded = length > call.seq_len
    # phi(0) is not 0 under the Taylor map: what counts in the denominator must be told.
    told = padded and call.normalize and call.feature_map == "taylor"
    return Plan(
        call,
        chunk,
        min(tuning.strip, chunk),
        tuning.pipeline,
        key_heads,
        heads,
        groups,
        groups * key_heads // call.num_key_heads,
        key_dim,
        value_dim,
        length,
        num_kernel_features(call.feature_map, key_dim),
        value_dim + (SUBLANES if call.normalize else 0),
        call.segmented or told,
        tuning.vmem,
    )


def _heads_of_a_step(
    call: LinearAttentionCall, key_dim: int, value_dim: int, wanted: int
) -> tuple[int, int]:
    """(key heads, value heads): whole lanes of both, at least `wanted` value heads if there are."""
    repeats = call.num_heads // call.num_key_heads
    if key_dim % LANES == 0 and repeats > wanted:
        for heads in range(wanted, repeats):
            if repeats % heads == 0 and heads * value_dim % LANES == 0:
                return 1, heads
    for key_heads in range(1, call.num_key_heads):
        heads = key_heads * repeats
        whole = key_heads * key_dim % LANES == 0 and heads * value_dim % LANES == 0
        if call.num_key_heads % key_heads == 0 and whole and heads >= wanted:
            return key_heads, heads
    return call.num_key_heads, call.num_heads


# --- arrays as the kernels take them --------------------------------------------------------------


def pack(plan: Plan, x: jax.Array, dim: int) -> jax.Array:
    """[b, s, heads, d] -> [b, length, heads * dim], padded with zeros."""
    missing = plan.length - x.shape[1], dim - x.shape[3]
    if any(missing):
        x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
    return x.reshape(*x.shape[:2], -1)


def unpack(plan: Plan, x: jax.Array, dim: int, wanted: int) -> jax.Array:
    """The inverse of `pack`; wanted: channels of a head."""
    x = x.reshape(*x.shape[:2], -1, dim)
    return x[:, : plan.call.seq_len, :, :wanted]


def head_rows(plan: Plan, x: jax.Array) -> jax.Array:
    """[b | 1, s, h] -> float32 [b | 1, groups, rows, length]: a group's heads as rows."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, plan.length - x.shape[1]), (0, 0)))
    x = x.swapaxes(1, 2).reshape(x.shape[0], plan.groups, plan.heads, plan.length)
    return jnp.pad(x, ((0, 0), (0, 0), (0, plan.rows - plan.heads), (0, 0)))


def from_head_rows(plan: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `head_rows`."""
    x = x[:, :, : plan.heads].reshape(x.shape[0], -1, plan.length)
    return x[:, :, : plan.call.seq_len].swapaxes(1, 2)


class Steps(NamedTuple):
    """The arrays that say how tokens decay and which of them belong together.

    decay: float32 [b | 1, groups, rows, length], the sum of the log decays from the chunk's first
    token to each one. runs: float32 [b, 8, length], each token's run as a query, then as a key.
    bounds: int32 [b, 1, num_chunks + 1], the run that a state before and after a chunk belongs to.
    """

    decay: jax.Array | None
    runs: jax.Array | None
    bounds: jax.Array | None


def make_steps(plan: Plan, operands: Operands) -> Steps:
    call = plan.call
    decay = runs = bounds = None
    if call.decay != "none":
        log_decay = jnp.maximum(operands.log_decay, FORGOTTEN)
        if call.decay == "head":
            log_decay = jnp.broadcast_to(log_decay, (1, call.seq_len, call.num_heads))
        rows = head_rows(plan, log_decay)
        by_chunk = rows.reshape(*rows.shape[:-1], plan.num_chunks, plan.chunk)
        decay = jnp.cumsum(by_chunk, -1).reshape(rows.shape)
    if plan.has_runs:
        shape = (call.batch, call.seq_len)
        run = jnp.zeros(shape, jnp.int32) if operands.runs is None else operands.runs
        valid = jnp.ones(shape, bool) if operands.valid is None else operands.valid
        missing = (0, 0), (0, plan.length - call.seq_len)
        run, valid = jnp.pad(run, missing, mode="edge"), jnp.pad(valid, missing)
        rows = jnp.stack([jnp.where(valid, run, x) for x in (_NO_QUERY, _NO_KEY)], 1)
        runs = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, ROWS - 2), (0, 0)))
        last = run[:, plan.chunk - 1 :: plan.chunk]
        bounds = jnp.concatenate([jnp.zeros_like(last[:, :1]), last], 1)[:, None]
    return Steps(decay, runs, bounds)


def state_in(plan: Plan, state: LinearState) -> jax.Array:
    """A state, or a cotangent of one, as [b, groups, heads, features, columns]."""
    call = plan.call
    kv = state.kv
    if call.normalize:
        kv = jnp.pad(kv, ((0, 0),) * 3 + ((0, plan.columns - kv.shape[-1]),))
        kv = kv.at[..., plan.value_dim].set(state.normalizer)
    else:
        kv = jnp.pad(kv, ((0, 0),) * 3 + ((0, plan.columns - kv.shape[-1]),))
    if call.feature_map == "taylor":
        table = jnp.asarray(packed_from_kernel(call.key_dim, plan.key_dim), kv.dtype)
        kv = jnp.einsum("pf,bhpe->bhfe", table, kv, precision="highest")
    else:
        kv = jnp.pad(kv, ((0, 0), (0, 0), (0, plan.features - kv.shape[2]), (0, 0)))
    return kv.reshape(call.batch, plan.groups, plan.heads, plan.features, plan.columns)


def state_out(plan: Plan, x: jax.Array) -> LinearState:
    """The inverse of `state_in`."""
    call = plan.call
    x = x.reshape(call.batch, call.num_heads, plan.features, plan.columns)
    if call.feature_map == "taylor":
        table = jnp.asarray(packed_from_kernel(call.key_dim, plan.key_dim), x.dtype)
        x = jnp.einsum("pf,bhfe->bhpe", table, x, precision="highest")
    else:
        x = x[:, :, : call.key_dim]
    normalizer = x[..., plan.value_dim] if call.normalize else None
    return LinearState(x[..., : call.value_dim], normalizer)


# --- grids and blocks -----------------------------------------------------------------------------


class Blocks(NamedTuple):
    """BlockSpecs of a grid (batch, group, step); reverse: the last chunk first."""

    plan: Plan
    reverse: bool

    def _chunk(self, step: Any) -> Any:
        return self.plan.num_chunks - 1 - step if self.reverse else step

    def keys(self) -> pl.BlockSpec:
        """Of query, key and their like."""
        plan = self.plan
        return pl.BlockSpec(
            (None, plan.chunk, plan.key_heads * plan.key_dim),
            lambda b, group, step: (b, self._chunk(step), group // plan.parts),
        )

    def key_parts(self) -> pl.BlockSpec:
        """Of the gradients of query and key, [b, parts, length, heads * dim]."""
        plan = self.plan
        return pl.BlockSpec(
            (None, None, plan.chunk, plan.key_heads * plan.key_dim),
            lambda b, group, step: (
                b, group % plan.parts, self._chunk(step), group // plan.parts
            ),
        )  # fmt: skip

    def values(self) -> pl.BlockSpec:
        plan = self.plan
        return pl.BlockSpec(
            (None, plan.chunk, plan.heads * plan.value_dim),
            lambda b, group, step: (b, self._chunk(step), group),
        )

    def head_rows(self, x: jax.Array | None = None) -> pl.BlockSpec:
        """Of `head_rows`; x: an array of one row for all of the batch, perhaps."""
        shared = x is not None and x.shape[0] == 1
        return pl.BlockSpec(
            (None, None, self.plan.rows, self.plan.chunk),
            lambda b, group, step: (0 if shared else b, group, 0, self._chunk(step)),
        )

    def state(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of states [b, groups, *shape]."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((None, None, *shape), lambda b, group, step: (b, group, *zeros))

    def by_chunk(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Of arrays [b, groups, num_chunks, *shape]."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec(
            (None, None, None, *shape),
            lambda b, group, step: (b, group, self._chunk(step), *zeros),
        )

    def steps(self, steps: Steps) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """The arrays of `Steps` that there are."""
        result = []
        if steps.decay is not None:
            result.append((steps.decay, self.head_rows(steps.decay)))
        if steps.runs is not None and steps.bounds is not None:
            spec = pl.BlockSpec(
                (None, ROWS, self.plan.chunk), lambda b, group, step: (b, 0, self._chunk(step))
            )
            result.append((steps.runs, spec))
            spec = pl.BlockSpec(
                (None, 1, self.plan.num_chunks + 1),
                lambda b, group, step: (b, 0, 0),
                memory_space=pltpu.SMEM,
            )
            result.append((steps.bounds, spec))
        return result


def compiler_params(plan: Plan) -> pltpu.CompilerParams:
    semantics = (pltpu.PARALLEL, pltpu.PARALLEL, pltpu.ARBITRARY)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=plan.vmem)
