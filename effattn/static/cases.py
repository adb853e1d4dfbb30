"""What a case of `effattn bench --static` is, and what cases are made of.

A case is a function of (chip, parameters) that returns a `Problem`, and the parameters that it is
compiled with by default. Our kernels' are listed in `own.py`, others' in `rivals.py`.
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
from effattn.masks import FULL, PARTIAL, Causal, Mask, Window
from effattn.static.estimate import Counts

# The shape of the table: batch 1, bfloat16.
SEQ_LEN, NUM_HEADS, HEAD_DIM = 4096, 8, 128

CAUSAL = Causal()
# A window of 1024 keys, the query's own among them.
WINDOW = Causal() & Window(left=1023)


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
