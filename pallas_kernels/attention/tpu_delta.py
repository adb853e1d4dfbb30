"""delta = sum over value_dim of dout * out, the softmax's own part of its gradient, on a TPU.

XLA sums over lanes into a layout that the backward kernel then needs transposed; here the rows of
[batch, heads, 1, length] come out as they are read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from effattn.pallas_kernels.attention.tpu_plan import Plan, compiler_params
from effattn.pallas_kernels.varying import varying_shape

NAME = "effattn_flash_delta"


def delta_rows(
    plan: Plan, out: jax.Array, dout: jax.Array, *, vmem: int, interpret: Any
) -> jax.Array:
    """float32 [batch, num_heads, 1, padded length] from `plan.out`'s packed arrays."""
    call, block = plan.call, plan.sizes.q

    def of_head(batch: Any, head: Any, i: Any) -> tuple[Any, ...]:
        return batch, head, i

    spec = plan.out.spec(block, of_head)
    shape = (call.batch, call.num_heads, 1, plan.out.length)
    return pl.pallas_call(
        _body,
        grid=(call.batch, call.num_heads, plan.out.length // block),
        in_specs=[spec, spec],
        out_specs=pl.BlockSpec((None, None, 1, block), lambda batch, head, i: (batch, head, 0, i)),
        out_shape=varying_shape(shape, jnp.float32, (out, dout)),
        compiler_params=compiler_params(2, vmem),
        interpret=interpret,
        name=NAME,
    )(out, dout)


def _body(out_ref: Any, dout_ref: Any, delta_ref: Any) -> None:
    product = out_ref[...].astype(jnp.float32) * dout_ref[...].astype(jnp.float32)
    # A sum across registers of the transposed product leaves the queries in lanes.
    delta_ref[...] = product.T.sum(0, keepdims=True)
