"""Masks that are a band around the diagonal: what other people's kernels mean by causal or window.

Their kernels know token slots, not positions, so a band is theirs only where positions count up
by one on both sides from the same start. Where a band lies wholly outside the matrix, its side is
open: a window as long as the sequence is no window.
"""

from typing import NamedTuple

import numpy as np

from effattn.masks import And, Causal, Full, Mask, Window
from effattn.pallas_kernels.attention.call import AttentionCall


class Band(NamedTuple):
    """Keys from `left` before the query to `right` after it; None leaves a side open."""

    left: int | None
    right: int | None


OPEN = Band(None, None)


def band_of_mask(mask: Mask) -> Band | None:
    """The band that a mask is by its form; None for every other form, even where it is one too."""
    # Exact types: a subclass may answer `allowed` otherwise.
    if type(mask) is Full:
        return OPEN
    if type(mask) is Causal:
        return Band(None, 0)
    if type(mask) is Window:
        return Band(mask.left, mask.right)
    if type(mask) is And:
        one, other = band_of_mask(mask.left), band_of_mask(mask.right)
        if one is None or other is None:
            return None
        return Band(_narrower(one.left, other.left), _narrower(one.right, other.right))
    return None


def band_of_call(call: AttentionCall) -> Band | str:
    """The band of slots that a call attends, or the sentence that says why it has none."""
    band = band_of_mask(call.mask)
    if band is None:
        return f"the mask must be made of Full, Causal, Window and &, got {call.mask}"
    if band == OPEN:
        return band
    if not _count_up_together(call):
        return "q_positions and kv_positions must count up by one from the same start"
    left, right = band
    if left is not None and left >= call.q_len - 1:
        left = None
    if right is not None and right >= call.kv_len - 1:
        right = None
    # Query t's last key is min(t + right, kv_len - 1), its first is t - left.
    if left is not None and call.q_len - 1 - left > call.kv_len - 1:
        return f"the last of {call.q_len} queries see none of {call.kv_len} keys in {call.mask}"
    return Band(left, right)


def _narrower(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _count_up_together(call: AttentionCall) -> bool:
    if call.q_positions is None or call.kv_positions is None:  # traced
        return False
    q, kv = call.q_positions.array, call.kv_positions.array
    counting = all((x == x[:, :1] + np.arange(x.shape[1])).all() for x in (q, kv))
    return bool(counting and (q[:, 0] == kv[:, 0]).all())
