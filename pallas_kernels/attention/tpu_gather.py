"""Key blocks that a step gathers from all over the sequence, by copies of its own.

A block of 128 keys is too little for a step, and a `BlockSpec` for each of eight of them costs the
scalar unit more than their logits cost the matrix units (static, v5e: 1,600 cycles of 4,100). Here
the next step's copies are begun, side by side in one buffer, before this step's are waited for.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effattn.pallas_kernels.attention.tpu_plan import Layout, Plan, Walk
from effattn.pallas_kernels.attention.tpu_visits import CODE, SKIP


def gather_specs() -> list[pl.BlockSpec]:
    """Keys and values stay in HBM."""
    return [pl.BlockSpec(memory_space=pltpu.HBM)] * 2


def gather_scratch(plan: Plan, dtype: Any) -> list[Any]:
    """Two buffers for keys, two for values, and a semaphore for each."""
    rows = plan.fan * plan.sizes.kv
    buffers = [pltpu.VMEM((2, rows, x.head_dim), dtype) for x in (plan.key, plan.value)]
    return [*buffers, pltpu.SemaphoreType.DMA((2, 2))]


def gather(
    plan: Plan,
    walk: Walk,
    words: Sequence[Any],
    hbm_refs: Sequence[Any],
    scratch_refs: Sequence[Any],
) -> tuple[Any, Any]:
    """Readers (start, size) of this step's keys and values; the next step's are on their way.

    Copies do not cross from one head to the next: heads may run on different cores.
    """
    *buffer_refs, semaphores = scratch_refs
    batch, head, step = (pl.program_id(axis) for axis in range(3))
    kv_head = head // plan.call.group

    def copies(step: Any, buffer: Any) -> Iterator[Any]:
        entry = walk.entry(batch, head, step)
        for slot in range(plan.fan):
            block = walk.kv_block(words, entry, slot)
            rows = pl.ds(pl.multiple_of(block * plan.sizes.kv, plan.sizes.kv), plan.sizes.kv)
            there = pl.ds(slot * plan.sizes.kv, plan.sizes.kv)
            for i, layout in enumerate((plan.key, plan.value)):
                yield pltpu.make_async_copy(
                    _rows_of_head(layout, hbm_refs[i], batch, kv_head, rows),
                    buffer_refs[i].at[buffer, there, :],
                    semaphores.at[i, buffer],
                )

    def holds_blocks(step: Any) -> Any:
        return (words[1][walk.entry(batch, head, step)] & CODE) != SKIP

    def begin(step: Any, buffer: Any) -> None:
        @pl.when(holds_blocks(step))
        def _() -> None:
            for copy in copies(step, buffer):
                copy.start()

    this = jax.lax.rem(step, 2)
    pl.when(step == 0)(lambda: begin(step, this))
    pl.when(step + 1 < walk.length)(lambda: begin(step + 1, 1 - this))

    @pl.when(holds_blocks(step))
    def _() -> None:
        for copy in copies(step, this):
            copy.wait()

    def reader(ref: Any) -> Any:
        return lambda at, size: ref[this, pl.ds(at, size), :]

    return reader(buffer_refs[0]), reader(buffer_refs[1])


def _rows_of_head(layout: Layout, ref: Any, batch: Any, head: Any, rows: Any) -> Any:
    if layout.in_columns:
        width = layout.head_dim
        return ref.at[batch, rows, pl.ds(pl.multiple_of(head * width, width), width)]
    return ref.at[batch, head, rows, :]
