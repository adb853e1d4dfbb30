"""PoNet: tokens mixed by three poolings instead of attention; it sees the whole document.

y_t = (g + s_t) * O_t + l_t: g from all tokens, s_t from t's segment, l_t from t's neighbours.
Source: Tan et al. 2021 (arXiv 2110.02442), the authors' code for Long Range Arena.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.nn.layers import statistics_dtype
from effattn.nn.param import Dense, normal
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.sequence import Local, SequenceParallel

# What padding holds before a maximum is taken, as in the authors' code.
LOW = -10000.0


@dataclass(kw_only=True)
class PoNetConfig:
    """num_segments: a row of n tokens is cut every n // num_segments + 1 positions of a document,
    unless a call says where segments end. window: tokens of the local maximum, an odd number.

    head_dim None: width / num_heads. init_std, out_init_std: of the input and the output
    projections (None: the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    num_segments: int = 64
    window: int = 3
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "PoNet":
        """Raises ValueError where heads and widths do not fit together or the window is even."""
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("num_segments", self.num_segments, 1)
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window: got {self.window}, expected an odd number of tokens")
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        return PoNet(
            width,
            num_heads=self.num_heads,
            head_dim=head_dim,
            num_segments=self.num_segments,
            window=self.window,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class PoNet(nnx.Module):
    """`out(poolings(query(x), key(x), gate(x), local(x), segment(x)))`, all with biases."""

    causal = False
    decodes = False

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        num_segments: int,
        window: int,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_segments, self.window = num_heads, num_segments, window
        self.sequence = sequence
        inner = num_heads * head_dim

        def project(fan_in: int, fan_out: int, axes: tuple[str, str], std: float) -> Dense:
            init = normal(std)
            return Dense(fan_in, fan_out, axes, init=init, use_bias=True, dtype=dtype, rngs=rngs)

        def pooled() -> Dense:
            return project(width, inner, ("embed", "heads"), init_std)

        self.query, self.key, self.gate = pooled(), pooled(), pooled()
        self.local, self.segment = pooled(), pooled()
        self.out = project(inner, width, ("heads", "embed"), out_init_std)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: None = None,
        key: jax.Array | None = None,
        boundaries: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """boundaries: bool [batch, seq_len], tokens that separate segments; see `segment_index`."""
        if state is not None:
            _refuse_to_decode()
        heads = (*x.shape[:2], self.num_heads, -1)
        query, keys, gate = (f(x).reshape(heads) for f in (self.query, self.key, self.gate))
        local, segment = self.local(x), self.segment(x)
        index = segment_index(info, self.num_segments, boundaries)
        over = self.sequence
        y = global_mean(query, keys, info, over).reshape(local.shape)
        y = y + segment_max(segment, index, info, boundaries, over)
        y = y * gate.reshape(local.shape) + local_max(local, self.window, info, boundaries, over)
        return self.out(checkpoint_name(y.astype(x.dtype), "mixer")), None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> NoReturn:
        _refuse_to_decode()

    def prefill(self, x: jax.Array, info: TokenInfo, state: Any) -> NoReturn:
        _refuse_to_decode()

    def step(self, x_t: jax.Array, info: TokenInfo, state: Any) -> NoReturn:
        _refuse_to_decode()


def _refuse_to_decode() -> NoReturn:
    raise ValueError(
        "mixer: got PoNet with causal=False, but decoding wants a causal mixer: its poolings see "
        "later tokens"
    )


# --- the poolings: [batch, seq_len, ...] in, the same out in float32; 0 at padding --------------


def global_mean(
    query: jax.Array,
    key: jax.Array,
    info: TokenInfo,
    sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
) -> jax.Array:
    """sum_l a_l k_l over the document, a = softmax(mean(q) . k_l / sqrt(d)); value is key.

    query, key: [batch, seq_len, num_heads, head_dim].
    """
    query, key = (x.astype(statistics_dtype(x.dtype)) for x in (query, key))
    documents, valid = runs_of_segments(info.segments)
    seen = valid[..., None, None]
    ones = jnp.broadcast_to(seen, (*valid.shape, 1, 1)).astype(query.dtype)

    def over_document(x: jax.Array, kind: str = "sum") -> jax.Array:
        return sequence.reduce_runs(x, documents, kind)

    mean = over_document(jnp.where(seen, query, 0)) / jnp.maximum(over_document(ones), 1)
    scores = jnp.sum(mean * key, axis=-1, keepdims=True) * query.shape[-1] ** -0.5
    scores = jnp.where(seen, scores, LOW)
    # Of the document, not of the row: what a row holds beside it changes no bit.
    highest = over_document(jax.lax.stop_gradient(scores), "max")
    weights = jnp.where(seen, jnp.exp(scores - highest), 0)
    total = over_document(weights)
    mixed = over_document(weights * jnp.where(seen, key, 0))
    return jnp.where(seen, mixed / jnp.where(total > 0, total, 1), 0)


def segment_index(
    info: TokenInfo, num_segments: int, boundaries: jax.Array | None = None
) -> jax.Array:
    """Which segment of its document each token is in, int32 [batch, seq_len].

    Position // (seq_len // num_segments + 1), seq_len with padding, so fewer than num_segments
    can occur. With boundaries, each of these is a segment of its own, and so is what lies between
    two: the pre-trained models take the tokens CLS and SEP.
    """
    if boundaries is None:
        return info.positions // (info.positions.shape[1] // num_segments + 1)
    ends = (boundaries & info.valid).astype(jnp.int32)
    return 2 * jnp.cumsum(ends, axis=1) - ends


def segment_max(
    x: jax.Array,
    index: jax.Array,
    info: TokenInfo,
    boundaries: jax.Array | None = None,
    sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
) -> jax.Array:
    """Per channel, the largest of the tokens with t's index; 0 at boundaries.

    x: [batch, seq_len, channels]. The first of equals gets the gradient.
    """
    x = x.astype(statistics_dtype(x.dtype))
    # Documents have numbers from 1: one number per segment of one of them.
    most = jnp.max(index, axis=1, keepdims=True) + 1
    runs, valid = runs_of_segments(jnp.where(info.segments == 0, 0, info.segments * most + index))
    seen = valid[..., None]
    x = jnp.where(seen, x, LOW)
    number = jnp.arange(x.shape[1])[:, None]
    fixed = jax.lax.stop_gradient(x)
    largest = fixed == sequence.reduce_runs(fixed, runs, "max")
    earliest = -sequence.reduce_runs(jnp.where(largest, -number, -x.shape[1]), runs, "max")
    first = largest & (number == earliest)
    pooled = sequence.reduce_runs(jnp.where(first, x, 0), runs, "sum")
    return jnp.where(seen if boundaries is None else seen & ~boundaries[..., None], pooled, 0)


def local_max(
    x: jax.Array,
    window: int,
    info: TokenInfo,
    boundaries: jax.Array | None = None,
    sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
) -> jax.Array:
    """Per channel, the largest of the window around t within the document; 0 at boundaries.

    x: [batch, seq_len, channels]. Boundaries take no part.
    """
    x = x.astype(statistics_dtype(x.dtype))
    seen = info.segments != 0
    taken = seen if boundaries is None else seen & ~boundaries
    side = window // 2
    x = jnp.where(taken[..., None], x, LOW)
    # [batch, parts, side + tokens of a part + side, ...]
    near, segments = (sequence.halo(tokens, side, behind=side) for tokens in (x, info.segments))
    size = near.shape[2] - 2 * side
    own = segments[:, :, side : side + size]
    pooled = near[:, :, side : side + size]
    for start in (*range(side), *range(side + 1, window)):
        part = slice(start, start + size)
        same = (segments[:, :, part] == own)[..., None]
        pooled = jnp.maximum(pooled, jnp.where(same, near[:, :, part], LOW))
    return jnp.where(taken[..., None], pooled.reshape(x.shape), 0)
