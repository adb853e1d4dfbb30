"""Other people's TPU attention kernels as cases: what ours is measured against.

jax's flash and splash attention come with jax; tokamax's splash attention is the extra `peers`.
"""

from functools import partial
from typing import Any

from effattn.blocks import BlockSizes
from effattn.masks import EMPTY, Mask
from effattn.static.cases import (
    CAUSAL,
    HEAD_DIM,
    NUM_HEADS,
    SEQ_LEN,
    WINDOW,
    Case,
    Problem,
    bf16,
    kinds_of,
    matmul_flops,
    with_gradients,
)
from effattn.static.chips import Chip
from effattn.static.estimate import Counts


def jax_flash(chip: Chip, *, backward: bool, block: int) -> Problem:
    """jax.experimental.pallas.ops.tpu.flash_attention, causal: every block is a grid step."""
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    names = ["q", "k_major", "k", "q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv"]
    names += ["k_major_dq", "k_dq", "q_dq"]
    sizes = module.BlockSizes(block_b=1, **{f"block_{name}": block for name in names})

    def forward(query: Any, key: Any, value: Any) -> Any:
        return module.flash_attention(query, key, value, causal=True, block_sizes=sizes)

    one = matmul_flops(CAUSAL, SEQ_LEN, NUM_HEADS, HEAD_DIM)
    kinds = kinds_of(CAUSAL, SEQ_LEN, BlockSizes(block, block))
    counts = partial(
        Counts,
        NUM_HEADS * kinds.size,
        NUM_HEADS * int((kinds != EMPTY).sum()),
        NUM_HEADS * len(kinds),
    )
    return Problem(
        with_gradients(forward) if backward else forward,
        (bf16(1, NUM_HEADS, SEQ_LEN, HEAD_DIM),) * 3,
        (7 if backward else 2) * one,
        {
            "dkv": counts(flops=4 * one),
            "dq": counts(flops=3 * one),
            "flash_attention": counts(flops=2 * one),
        },
    )


def jax_splash(
    chip: Chip,
    *,
    backward: bool,
    block: int,
    compute: int | None = None,
    fused: bool = False,
    mask: Mask = CAUSAL,
) -> Problem:
    """jax.experimental.pallas.ops.tpu.splash_attention: its grid is as wide as the longest row."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    compute = block if compute is None else compute
    sizes: dict[str, Any] = dict(block_q=block, block_kv=block, block_kv_compute=compute)
    if backward:
        sizes |= dict(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute)
        sizes |= dict(use_fused_bwd_kernel=True) if fused else dict(block_q_dq=block)
        sizes |= {} if fused else dict(block_kv_dq=block)
    fn = kernel.make_splash_mha(
        masks.MultiHeadMask([_splash_mask(masks, mask)] * NUM_HEADS),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernel.BlockSizes(**sizes),
    )
    active = kinds_of(mask, SEQ_LEN, BlockSizes(block, block)) != EMPTY
    steps = NUM_HEADS * len(active) * int(active.sum(1).max())
    return _splash_problem(fn, mask, steps, int(active.sum()), len(active), backward, fused)


def tokamax_splash(
    chip: Chip,
    *,
    backward: bool,
    block: int,
    compute: int | None = None,
    mask: Mask = CAUSAL,
) -> Problem:
    """tokamax's splash attention: its grid holds active blocks only, its backward is fused."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    compute = block if compute is None else compute
    config = kernel.SplashConfig(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
    )
    built = kernel.make_splash_mha_single_device(_splash_mask(masks, mask), config=config)
    active = kinds_of(mask, SEQ_LEN, BlockSizes(block, block)) != EMPTY
    number = int(active.sum())
    return _splash_problem(
        lambda query, key, value: built(query, key, value),
        mask,
        NUM_HEADS * number,
        number,
        len(active),
        backward,
        True,
    )


def _splash_mask(masks: Any, mask: Mask) -> Any:
    shape = (SEQ_LEN, SEQ_LEN)
    return masks.CausalMask(shape) if mask == CAUSAL else masks.LocalMask(shape, (1023, 0), 0)


def _splash_problem(
    fn: Any, mask: Mask, steps: int, active: int, num_q_blocks: int, backward: bool, fused: bool
) -> Problem:
    one = matmul_flops(mask, SEQ_LEN, NUM_HEADS, HEAD_DIM)
    counts = partial(Counts, steps, NUM_HEADS * active, NUM_HEADS * num_q_blocks)
    return Problem(
        with_gradients(fn) if backward else fn,
        (bf16(NUM_HEADS, SEQ_LEN, HEAD_DIM),) * 3,
        (7 if backward else 2) * one,
        {
            "dkv|bwd": counts(flops=(5 if fused else 4) * one),
            "dq": counts(flops=3 * one),
            "fwd|splash": counts(flops=2 * one),
        },
    )


_SQUARE = tuple({"block": block} for block in (128, 512, 1024))
_BLOCKS = (*_SQUARE, {"block": 1024, "compute": 512})
_LARGE = _SQUARE[1:]

RIVALS = (
    Case("jax flash, causal, forward", partial(jax_flash, backward=False), _SQUARE, True, False),
    Case("jax splash, causal, forward", partial(jax_splash, backward=False), _BLOCKS, own=False),
    Case(
        "tokamax splash, causal, forward",
        partial(tokamax_splash, backward=False),
        (*_BLOCKS, {"block": 1024, "compute": 256}),
        own=False,
        package="tokamax",
    ),
    Case(
        "jax flash, causal, forward and backward",
        partial(jax_flash, backward=True),
        _LARGE[:1],
        own=False,
    ),
    Case(
        "jax splash, causal, forward and backward, two kernels",
        partial(jax_splash, backward=True),
        _LARGE,
        own=False,
    ),
    Case(
        "jax splash, causal, forward and backward, fused",
        partial(jax_splash, backward=True, fused=True),
        _LARGE,
        own=False,
    ),
    Case(
        "tokamax splash, causal, forward and backward",
        partial(tokamax_splash, backward=True),
        _LARGE,
        own=False,
        package="tokamax",
    ),
    Case(
        "jax splash, window 1024, forward",
        partial(jax_splash, backward=False, mask=WINDOW),
        _LARGE[:1],
        own=False,
    ),
    Case(
        "tokamax splash, window 1024, forward",
        partial(tokamax_splash, backward=False, mask=WINDOW),
        _LARGE[:1],
        own=False,
        package="tokamax",
    ),
)
