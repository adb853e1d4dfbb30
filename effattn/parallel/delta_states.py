"""The delta rule over devices: to the state, a part of a row is a matrix that acts and one added.

S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T is affine in S and acts on each column
by itself. So one pass with the unit matrix beside the state gives a part's transition T and what it
adds, and at every token what a query reads of them; the state that came in enters afterwards.
Source: the gather of states of LASP-2 (Sun et al. 2025, arXiv 2502.07563), with matrices as decay.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effattn.checks import check_multiple
from effattn.pallas_kernels.delta_rule import delta_rule
from effattn.pallas_kernels.delta_rule.step import state_dtype
from effattn.parallel.mesh import dividing_axes, free_axes
from effattn.parallel.passing import documents_of, fold, gathered
from effattn.parallel.sequence import shard_map


def delta_rule_over(
    axis: str,
    ways: int,
    batch_axes: tuple[str, ...],
    head_axes: tuple[str, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """`delta_rule` of whole arrays whose tokens lie over the mesh axis `axis`.

    Moves (ways - 1) key_dim (key_dim + value_dim) float32 numbers per row and head. Raises
    ValueError where the sequence does not divide.
    """
    check_multiple("seq_len", query.shape[1], f"mesh axis {axis!r}", ways)
    free = free_axes()
    rows = dividing_axes(batch_axes, free, query.shape[0])
    heads = dividing_axes(head_axes, free, key.shape[2])
    of_tokens, of_state = P(rows, axis, heads), P(rows, heads)
    places = {"log_decay": of_tokens, "segment_ids": P(rows, axis), "state": of_state}
    traced = {n: x for n, x in options.items() if n in places and x is not None}
    static = {n: x for n, x in options.items() if n not in places}

    def run(query: jax.Array, key: jax.Array, value: jax.Array, beta: jax.Array, given: Any) -> Any:
        given = dict(given)
        before = given.pop("state", None)
        batch, _, num_heads, value_dim = value.shape
        key_dim = key.shape[3]
        dtype = state_dtype(query, key, value)
        nothing = jnp.zeros((batch, num_heads, key_dim, value_dim), dtype)
        unit = jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), (*nothing.shape[:3], key_dim))
        # In the state's dtype, so that what is read of the transition is not rounded on the way.
        wide = jnp.pad(value.astype(dtype), ((0, 0), (0, 0), (0, 0), (0, key_dim)))
        entry = jnp.concatenate([nothing, unit], axis=-1)
        out, summary = delta_rule(query, key, wide, beta, state=entry, **given, **static)

        def after(part: jax.Array, entering: jax.Array, whole: jax.Array) -> jax.Array:
            # A document that ends within the part has left nothing of the unit matrix.
            moved = jnp.matmul(part[..., value_dim:], entering, precision="highest")
            return moved + part[..., :value_dim]

        parts, documents = gathered((summary, documents_of(given.get("segment_ids"), query)), axis)
        me = jax.lax.axis_index(axis)
        mine, last = fold(parts, documents, me, before=before, empty=nothing, after=after)
        read = jnp.einsum("bshd,bhde->bshe", out[..., value_dim:], mine)
        return (out[..., :value_dim] + read).astype(value.dtype), last

    specs = (*(of_tokens,) * 4, {name: places[name] for name in traced})
    return shard_map(run, free, (query, key, value, beta, traced), specs, (of_tokens, of_state))
