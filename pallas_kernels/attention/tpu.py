"""Flash attention on TPUs: who is taken, and the way to the two passes.

`tpu_visits.py` lists the blocks, `tpu_plan.py` lays out the arrays, `tpu_pieces.py` has the inside
of a block, `tpu_forward.py` and `tpu_backward.py` the kernels. Those are imported by the first call
that runs one: "auto" asks this file on every machine, and Pallas takes 0.8 s to import.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from effattn.pallas_kernels.attention.call import AttentionCall, Tokens, check_listed
from effattn.pallas_kernels.attention.tpu_sizes import (
    MAX_ENTRIES,
    block_sizes,
    num_entries,
    vmem_bytes,
)
from effattn.pallas_kernels.dispatch import Backend
from effattn.pallas_kernels.rows import vmap_as_rows
from effattn.pallas_kernels.target import not_a_tpu, tpu_target
from effattn.pallas_kernels.tuning import LANES, MIB, FlashTuning, flash_tuning

MAX_HEAD_DIM = 256


def refuses(call: AttentionCall) -> str | None:
    return not_a_tpu() or _cannot(call)


def _cannot(call: AttentionCall) -> str | None:
    if call.accumulator != jnp.float32 or call.dtype not in (jnp.float32, jnp.bfloat16):
        return f"query, key and value must all be float32 or all bfloat16, got {call.dtype}"
    for name in ("head_dim", "value_dim"):
        if getattr(call, name) > MAX_HEAD_DIM:
            return f"{name} must be at most {MAX_HEAD_DIM}, got {getattr(call, name)}"
    sizes = call.block_sizes
    if sizes is not None and (sizes.q % LANES or sizes.kv % LANES):
        return f"block sizes must be multiples of {LANES}, got q={sizes.q}, kv={sizes.kv}"
    return _does_not_fit(call, _tuning())


@functools.lru_cache(maxsize=1024)
def _does_not_fit(call: AttentionCall, tuning: FlashTuning) -> str | None:
    for tiles in (tuning.forward, tuning.backward):
        sizes = block_sizes(call, tiles)
        what = f"blocks of q={sizes.q}, kv={sizes.kv}"
        needed = vmem_bytes(call, sizes, tiles)
        if needed > tuning.vmem:
            have = f"{tuning.vmem / MIB:.0f} MiB"
            return f"{what} need {needed / MIB:.1f} MiB of VMEM and the kernel may use {have}"
        entries = num_entries(call, sizes)
        if entries > MAX_ENTRIES:
            return (
                f"{what} make lists of {entries} entries, and the scalar memory holds "
                f"{MAX_ENTRIES}: larger blocks, or lists that more heads share, are wanted"
            )
    return None


def _tuning() -> FlashTuning:
    target = tpu_target()
    return flash_tuning("" if target is None else target.kind)


def forward(
    call: AttentionCall,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tokens: Tokens,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    from effattn.pallas_kernels.attention import tpu_forward

    tuning, blocks = _tuning(), tokens.blocks
    if interpret and blocks is not None:
        num_kv = block_sizes(call, tuning.forward).count(call.q_len, call.kv_len)[1]
        check = functools.partial(check_listed, num_kv_blocks=num_kv)
        jax.debug.callback(check, blocks.kv_blocks, blocks.counts)
    return tpu_forward.forward(call, query, key, value, tokens, tuning=tuning, interpret=interpret)


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    from effattn.pallas_kernels.attention import tpu_backward

    tuning = _tuning()
    entries = num_entries(call, block_sizes(call, tuning.backward))
    shared = call.selection is None or call.selection[1] <= call.num_kv_heads
    if call.group > 1 and shared and entries * call.group > MAX_ENTRIES:
        # The list by key blocks has an entry for each query head of a group: head by head it fits.
        one = replace(call, num_heads=call.num_kv_heads)
        run = functools.partial(backward, one, interpret=interpret)
        parts = []
        for head in range(call.group):
            heads = slice(head, None, call.group)
            q, *results = (x[:, :, heads] for x in (query, out, lse, dout, dlse))
            parts.append(run(q, key, value, tokens, *results))
        dq = jnp.stack([part[0] for part in parts], 3).reshape(query.shape)
        dk, dv = (jnp.stack([x[i] for x in parts]).astype(jnp.float32).sum(0) for i in (1, 2))
        return dq, dk.astype(key.dtype), dv.astype(value.dtype)
    return tpu_backward.backward(
        call,
        query,
        key,
        value,
        tokens,
        out,
        lse,
        dout,
        dlse,
        tuning=tuning,
        interpret=interpret,
    )


def _backend(name: str, refuses: Callable[[AttentionCall], str | None], **options: Any) -> Backend:
    passes = (functools.partial(run, **options) for run in (forward, backward))
    return Backend(name, refuses, *(functools.partial(vmap_as_rows, run) for run in passes))


BACKEND = _backend("tpu", refuses)
# The same kernels as ordinary XLA operations on any machine: for tests of their arithmetic.
INTERPRETED = _backend("tpu_interpret", _cannot, interpret=True)
