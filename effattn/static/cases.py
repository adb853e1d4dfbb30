"""The kernels that `effattn bench --static` compiles: ours here, others' in `rivals.py`.

A case is one line in the table: a function of (chip, parameters) that returns a `Problem`, and the
parameters it is compiled with by default. A new kernel needs such a function and a line in `CASES`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effattn.blocks import BlockSizes, block_table
from effattn.masks import FULL, PARTIAL, Causal, Mask
from effattn.static.chips import Chip
from effattn.static.estimate import Counts

# The shape of the table: batch 1, bfloat16.
SEQ_LEN, NUM_HEADS, HEAD_DIM = 4096, 8, 128


@dataclass(frozen=True)
class Problem:
    """A function to compile for a chip, and what it is worth.

    shapes: its arguments, pytrees of jax.ShapeDtypeStruct. flops: useful matrix FLOP of all of it.
    counts: pattern of a Pallas call's name -> how often its parts run; the first that fits counts.
    """

    fn: Callable[..., Any]
    shapes: tuple[Any, ...]
    flops: float
    counts: Mapping[str, Counts]


@dataclass(frozen=True)
class Case:
    """variants: the parameters of each line of the table; `--set` gives others.

    walk: its control flow hangs on grid indices alone, so that libtpu's own evaluation is right
    too. own: one of our kernels; their static cycles are checked against the recorded ones.
    package: what must be installed besides jax.
    """

    name: str
    problem: Callable[..., Problem]
    variants: Sequence[Mapping[str, Any]] = ({},)
    walk: bool = False
    own: bool = True
    package: str | None = None

    @property
    def parameters(self) -> list[str]:
        """The names that a variant may set."""
        bound = getattr(self.problem, "keywords", {})
        names = inspect.signature(self.problem).parameters.values()
        return [x.name for x in names if x.kind == x.KEYWORD_ONLY and x.name not in bound]


def matmul(chip: Chip, *, size: int = 1024, steps: int = 8) -> Problem:
    """A resident matrix product, `steps` times: the part of the peak that can be had at all."""
    from jax.experimental import pallas as pl

    def body(left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        product = jnp.dot(left_ref[...], right_ref[...], preferred_element_type=jnp.float32)
        out_ref[...] = product.astype(out_ref.dtype)

    block = pl.BlockSpec((size, size), lambda step: (0, 0))
    array = bf16(size, size)
    fn = pl.pallas_call(
        body,
        out_shape=array,
        grid=(steps,),
        in_specs=[block, block],
        out_specs=block,
        name="effattn_calibration_matmul",
    )
    flops = 2.0 * size**3 * steps
    return Problem(fn, (array, array), flops, {"calibration": Counts(steps, flops=flops)})


def flash(
    chip: Chip,
    *,
    mask: Mask,
    backward: bool,
    seq_len: int = SEQ_LEN,
    num_heads: int = NUM_HEADS,
    head_dim: int = HEAD_DIM,
    q: int | None = None,
    kv: int | None = None,
) -> Problem:
    """Our TPU kernel through `attention`; q, kv: its block sizes, its own choice where None."""
    from effattn.pallas_kernels.attention.api import attention

    sizes = BlockSizes(1024 if q is None else q, 1024 if kv is None else kv)

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attention(query, key, value, mask=mask, implementation="tpu", block_sizes=sizes)

    shape = bf16(1, seq_len, num_heads, head_dim)
    one = matmul_flops(mask, seq_len, num_heads, head_dim)
    return Problem(
        with_gradients(forward) if backward else forward,
        (shape, shape, shape),
        (7 if backward else 2) * one,
        {
            "flash_backward_dkv": block_counts(mask, seq_len, num_heads, sizes, flops=4 * one),
            "flash_backward_dq": block_counts(mask, seq_len, num_heads, sizes, flops=3 * one),
            "flash_backward": block_counts(mask, seq_len, num_heads, sizes, flops=5 * one),
            "flash_forward": block_counts(mask, seq_len, num_heads, sizes, flops=2 * one),
        },
    )


def block_counts(
    mask: Mask, seq_len: int, num_heads: int, sizes: BlockSizes, *, flops: float
) -> Counts:
    """Of a kernel with one grid step per active block of a head, and a branch each for full and
    for partial blocks, in this order; a kind that never occurs has no branch."""
    kinds = kinds_of(mask, seq_len, sizes)
    full, partial = int((kinds == FULL).sum()), int((kinds == PARTIAL).sum())
    return Counts(
        num_heads * (full + partial),
        hot=tuple(float(num_heads * count) for count in (full, partial) if count),
        outer=num_heads * kinds.shape[0],
        flops=flops,
    )


@functools.cache
def kinds_of(mask: Mask, seq_len: int, sizes: BlockSizes) -> np.ndarray:
    """EMPTY, PARTIAL or FULL, [num_q_blocks, num_kv_blocks]."""
    positions = np.arange(seq_len, dtype=np.int32)[None]
    return block_table(mask, positions, positions, sizes=sizes)[0]


@functools.cache
def allowed_pairs(mask: Mask, seq_len: int) -> int:
    """How many (query, key) pairs of one head a mask allows."""
    block = min(512, seq_len)
    sizes = BlockSizes(block, block)
    kinds = kinds_of(mask, seq_len, sizes)
    length = np.minimum(block, seq_len - block * np.arange(len(kinds)))  # the last may be short
    pairs = int(((kinds == FULL) * np.outer(length, length)).sum())
    for q_block, kv_block in np.argwhere(kinds == PARTIAL):
        q = q_block * block + np.arange(length[q_block], dtype=np.int32)
        kv = kv_block * block + np.arange(length[kv_block], dtype=np.int32)
        pairs += int(np.asarray(mask.allowed(q[:, None], kv[None])).sum())
    return pairs


def matmul_flops(mask: Mask, seq_len: int, num_heads: int, head_dim: int) -> float:
    """Useful FLOP of one of the products of attention (two forward, five backward)."""
    return 2.0 * allowed_pairs(mask, seq_len) * num_heads * head_dim


def with_gradients(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """fn and its gradients with respect to three arguments, under a loss that needs both."""

    def loss(*arguments: jax.Array) -> jax.Array:
        return jnp.sum(fn(*arguments).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


CAUSAL = Causal()

CASES = (Case("calibration matmul", matmul, walk=True),)
