"""Estimates from traced programs, against what can be counted by hand."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effattn.plan.moves import spelled_out
from effattn.plan.traced import estimate

F32 = 4


def of(fn, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    size = lambda shape, dtype: math.prod(shape) * dtype.itemsize  # noqa: E731
    return estimate(jax.make_jaxpr(fn)(*arrays), size, lambda shape: 1)


def test_elementwise_operations_make_no_arrays():
    found = of(lambda x: jnp.sum(jnp.exp(x) * 2 + 1), (64, 32))
    assert found.peak <= 2 * F32 and found.flops == 0  # the sum alone
    assert found.traffic == 64 * 32 * F32 + F32


def test_a_product_that_is_read_later_stays():
    def fn(x, w):
        first = x @ w
        second = first @ w
        return jnp.sum(first * second)

    found = of(fn, (64, 32), (32, 32))
    assert found.flops == 2 * (2 * 64 * 32 * 32)
    # Both products, and what is summed unless it fuses.
    assert 2 * 64 * 32 * F32 <= found.peak <= 3 * 64 * 32 * F32 + 2 * F32


def test_loops_count_as_often_as_they_run_and_keep_what_they_stack():
    def fn(x, ws):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    forward = of(fn, (64, 32), (10, 32, 32))
    assert forward.flops == 10 * 2 * 64 * 32 * 32
    backward = of(jax.grad(fn, argnums=1), (64, 32), (10, 32, 32))
    assert backward.flops == 3 * 10 * 2 * 64 * 32 * 32
    # tanh's result and x of each of the ten steps, besides the gradients, which are the result.
    assert backward.peak >= 10 * 64 * 32 * F32
    assert backward.peak <= 2 * 10 * 64 * 32 * F32 + 4 * 64 * 32 * F32


def test_recomputation_keeps_less_and_computes_again():
    def fn(x, ws, body):
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    def layer(x, w):
        return x + jnp.tanh(jnp.tanh(x @ w) @ w), None

    again = jax.checkpoint(layer, prevent_cse=False)
    shapes = (256, 32), (10, 32, 32)
    kept, less = (
        of(jax.grad(lambda x, ws, body=body: fn(x, ws, body), argnums=1), *shapes)
        for body in (layer, again)
    )
    assert less.peak < 0.7 * kept.peak
    assert less.flops == kept.flops + 2 * 10 * 2 * 256 * 32 * 32


def test_what_waits_on_the_host_is_counted_there():
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["kept"],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def layer(x, w):
        x = checkpoint_name(x, "kept")
        return jnp.tanh(x @ w), None

    def fn(x, ws):
        body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, x, ws)[0])

    found = of(jax.grad(fn, argnums=1), (256, 32), (10, 32, 32))
    assert found.host == 10 * 256 * 32 * F32
    assert found.peak < 10 * 256 * 32 * F32


def test_a_loop_that_writes_rows_moves_the_rows_and_not_the_array():
    def fn(x):
        def write(i, out):
            return jax.lax.dynamic_update_slice(out, x[:1] * i, (i, 0))

        return jnp.sum(jax.lax.fori_loop(0, 64, write, jnp.zeros_like(x)))

    found = of(fn, (64, 32))
    assert found.traffic == 3 * 64 * 32 * F32 + F32  # every row twice, and the sum of all
    assert found.peak <= 64 * 32 * F32 + 4 * 32 * F32


def test_collectives_of_a_program_are_counted_with_its_loops():
    mesh = jax.sharding.AbstractMesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("sequence")
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def body(x):
        def hop(x, _):
            return jax.lax.ppermute(x, "sequence", ring), None

        x, _ = jax.lax.scan(hop, x, None, length=3)
        gathered = jax.lax.all_gather(x, "sequence", axis=0, tiled=True)
        return x + jnp.sum(gathered)

    fn = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    jaxpr = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((64, 8), jnp.float32))
    moves = {m.kind: m for m in spelled_out(jaxpr.jaxpr, {"sequence": 4})}
    permute, gather = moves["collective-permute"], moves["all-gather"]
    assert (permute.times, permute.bytes) == (3, 16 * 8 * F32)
    assert (gather.times, gather.bytes) == (1, 3 * 16 * 8 * F32)
