"""Causal depthwise convolution over a few tokens, with a state for decoding and segment resets.

Within one call the valid tokens of a segment must stand together: a hole inside a segment would
count as zeros here, while `step` skips it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.param import parameter, uniform
from effattn.parallel.sequence import Local, SequenceParallel


class ConvState(NamedTuple):
    """inputs: [batch, kernel_size - 1, channels], the last ones of segment `segment` [batch]."""

    inputs: jax.Array
    segment: jax.Array


class ShortConv(nnx.Module):
    """`y[t] = sum_j kernel[j] * x[t - (kernel_size - 1) + j]` per channel, within a segment.

    x: [batch, seq_len, channels]; kernel: [kernel_size, channels], U(+-1 / sqrt(kernel_size)).
    Tokens before the segment's first count as zeros. use_bias: adds a number per channel, drawn
    like the kernel. sequence: where tokens lie over devices, a few of them go to the next one.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        use_bias: bool = False,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.channels, self.kernel_size, self.dtype = channels, kernel_size, dtype
        self.sequence = sequence
        init = uniform(kernel_size**-0.5)
        self.kernel = parameter((kernel_size, channels), (None, "conv"), init, rngs)
        self.bias = parameter((channels,), ("conv",), init, rngs) if use_bias else None

    def __call__(self, x: jax.Array, info: TokenInfo) -> jax.Array:
        return self._convolve(x, info.segments)

    def _convolve(
        self, x: jax.Array, segments: jax.Array, first: tuple[Any, Any] = (None, None)
    ) -> jax.Array:
        """first: the kernel_size - 1 tokens and segments before the row, zeros where None."""
        kernel, last = self.kernel[...].astype(self.dtype), self.kernel_size - 1
        seq_len = x.shape[1]
        # [batch, parts, last + tokens of a part, ...]
        x, segments = (
            self.sequence.halo(tokens, last, first=before)
            for tokens, before in zip((x, segments), first, strict=True)
        )
        size = x.shape[2] - last
        here = segments[:, :, last:]
        y = x[:, :, last:] * kernel[last]
        for j in range(last):
            same = (segments[:, :, j : j + size] == here)[..., None]
            y += jnp.where(same, x[:, :, j : j + size], 0) * kernel[j]
        y = y.reshape(y.shape[0], seq_len, self.channels)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def init_state(self, batch: int, dtype: Any) -> ConvState:
        inputs = jnp.zeros((batch, self.kernel_size - 1, self.channels), dtype)
        return ConvState(inputs, jnp.zeros((batch,), jnp.int32))

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: ConvState
    ) -> tuple[jax.Array, ConvState]:
        """Continues from `state`. x: [batch, seq_len, channels], rows padded on the right."""
        kept = self.kernel_size - 1
        inputs = jnp.concatenate([state.inputs.astype(x.dtype), x], axis=1)
        earlier = jnp.broadcast_to(state.segment[:, None], (x.shape[0], kept))
        segments = jnp.concatenate([earlier, info.segments], axis=1)
        # Index of each row's last token in `inputs`; the state's own last where none is valid.
        index = jnp.arange(x.shape[1]) + kept
        last = jnp.max(jnp.where(info.valid, index, kept - 1), axis=1)
        tail = last[:, None] + jnp.arange(1 - kept, 1)
        segment = jnp.take_along_axis(segments, last[:, None], axis=1)
        same = jnp.take_along_axis(segments, tail, axis=1) == segment
        new_inputs = jnp.take_along_axis(inputs, tail[..., None], axis=1)
        new_inputs = jnp.where(same[..., None], new_inputs, 0).astype(state.inputs.dtype)
        y = self._convolve(x, info.segments, (state.inputs.astype(x.dtype), earlier))
        return y, ConvState(new_inputs, segment[:, 0])
