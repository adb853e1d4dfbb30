"""Chunks: where they begin, what they get back, and what keeps them from being all or none.

A token begins a chunk where it is unlike its predecessor; the chunk's first token stands for it in
the stage inside; what comes back is smoothed and laid on all tokens of the chunk. Source: Hwang et
al. 2025, H-Net (arXiv 2507.07955), section 2.2 and its released code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.nn.layers import statistics_dtype
from effattn.nn.linear_state import continued, segments_at_ends
from effattn.nn.param import Initializer, parameter
from effattn.pallas_kernels.linear_attention.packing import runs_of_segments
from effattn.parallel.sequence import Local, SequenceParallel

NORM_EPS = 1e-12
P_MIN = 1e-4  # a chunk's share in the moving average lies in [P_MIN, 1 - P_MIN]


class Boundaries(NamedTuple):
    """[batch, seq_len] each. probability: float32, 1 where a document begins; begins: bool."""

    probability: jax.Array
    begins: jax.Array

    @property
    def confidence(self) -> jax.Array:
        """How sure the choice was: p of a boundary, 1 - p of no boundary."""
        return jnp.maximum(self.probability, 1 - self.probability)


class RouterState(NamedTuple):
    """The last token of every row. token: [batch, width]; segment: [batch], 0 before the first."""

    token: jax.Array
    segment: jax.Array


def _identity(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    del key
    return jnp.eye(*shape, dtype=dtype)


class Router(nnx.Module):
    """p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2; a chunk begins where p_t > 1/2.

    p is 1 at the first token of a document. Both matrices start as the identity. In float32
    whatever the compute dtype: rounded cosines near 1/2 would move chunks.
    """

    def __init__(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        rngs: nnx.Rngs,
    ):
        self.sequence = sequence
        # No two named axes: an optimizer of matrices has nothing to orthogonalise in a similarity.
        init: Initializer = _identity
        self.query = parameter((width, width), ("embed", None), init, rngs)
        self.key = parameter((width, width), ("embed", None), init, rngs)

    def init_state(self, batch: int, width: int, dtype: jnp.dtype) -> RouterState:
        token = jnp.zeros((batch, width), statistics_dtype(dtype))
        return RouterState(token, jnp.zeros((batch,), jnp.int32))

    def __call__(
        self, x: jax.Array, info: TokenInfo, state: RouterState | None = None
    ) -> tuple[Boundaries, RouterState]:
        """x: [batch, seq_len, width]. state: the tokens before; None: there are none."""
        x = x.astype(statistics_dtype(x.dtype))
        if state is None:
            state = self.init_state(x.shape[0], x.shape[2], x.dtype)
        segments, token = info.segments, state.token.astype(x.dtype)
        tree = _unit(x @ self.query[...]), segments, x
        first = _unit(token @ self.query[...]), state.segment, token
        # Each looks at the last valid token before it.
        (query, ids, _), (_, segment, token) = self.sequence.previous(tree, info.valid, first)
        continues = (ids == segments) & (segments != 0)
        cosine = jnp.sum(query * _unit(x @ self.key[...]), axis=-1)
        probability = jnp.where(continues, jnp.clip((1 - cosine) / 2, 0, 1), 1)
        begins = (jax.lax.stop_gradient(probability) > 0.5) & info.valid
        return Boundaries(probability, begins), RouterState(token, segment)


def _unit(x: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12), with a gradient of zero at x = 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    tiny = square <= NORM_EPS**2
    return x / jnp.where(tiny, NORM_EPS, jnp.sqrt(jnp.where(tiny, 1, square)))


class WordState(NamedTuple):
    """[batch] each: the last byte of every row, bytes since its word began, its segment."""

    last: jax.Array
    length: jax.Array
    segment: jax.Array


class WordRouter(nnx.Module):
    """Chunks by rule: at white space that follows something else, so that a word goes with what
    leads it, and again after every `longest` bytes of one word: long words are split, never cut.

    A space is where models of words begin their tokens (Slagle 2024, SpaceByte, arXiv 2404.14408;
    Neitemeier et al. 2025, Hierarchical Autoregressive Transformers, arXiv 2501.10322). The vector
    of the chunk that a space begins comes from an encoder that has read the word before it.
    """

    def __init__(self, longest: int):
        self.longest = longest

    def init_state(self, batch: int, width: int, dtype: jnp.dtype) -> WordState:
        zeros = jnp.zeros((batch,), jnp.int32)
        return WordState(zeros, zeros, zeros)

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, state: WordState | None = None
    ) -> tuple[Boundaries, WordState]:
        """tokens: int [batch, seq_len], bytes."""
        if state is None:
            state = self.init_state(len(tokens), 0, jnp.dtype(jnp.float32))

        tokens, segments = tokens.astype(jnp.int32), info.segments
        last = jnp.concatenate([state.last[:, None], tokens], axis=1)
        ids = jnp.concatenate([state.segment[:, None], segments], axis=1)
        before, latest = _previous_valid(info.valid)
        row = jnp.arange(len(tokens))[:, None]
        opens = (ids[row, before] != segments) | (_is_space(tokens) & ~_is_space(last[row, before]))
        rank = jnp.cumsum(info.valid, axis=1, dtype=jnp.int32)
        begun = jnp.where(opens & info.valid, rank, 1 - state.length[:, None])
        length = rank - jax.lax.cummax(begun, axis=1)
        begins = info.valid & (length % self.longest == 0)
        some = info.valid.any(axis=1)
        state = WordState(
            last[row, latest][:, 0],
            jnp.where(some, length[:, -1] + 1, state.length),
            ids[row, latest][:, 0],
        )
        return Boundaries(begins.astype(jnp.float32), begins), state


def _previous_valid(valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slots of arrays that carry one earlier token in front: for every token the last valid one
    before it, [batch, seq_len], and for every row the last valid one of all, [batch, 1]."""
    latest = jax.lax.cummax(jnp.where(valid, jnp.arange(1, valid.shape[1] + 1), 0), axis=1)
    return jnp.pad(latest[:, :-1], ((0, 0), (1, 0))), latest[:, -1:]


def _is_space(byte: jax.Array) -> jax.Array:
    return (byte == 32) | ((byte >= 9) & (byte <= 13))


def chunk_positions(
    begins: jax.Array,
    info: TokenInfo,
    chunks: jax.Array | None = None,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(the number of the chunk that each token is in, from 0 in its document; the next `chunks`).

    chunks, segment: [batch], chunks that the row's document `segment` had before these tokens.
    """
    runs, valid = runs_of_segments(info.segments)
    if chunks is None or segment is None:
        chunks = segment = jnp.zeros(len(begins), jnp.int32)
    first, _ = segments_at_ends(info)
    earlier = jnp.where(first == segment, chunks, 0)[:, None]
    total = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    # The first valid token of a document here: the run of the last valid one before is another.
    latest = jax.lax.cummax(jnp.where(valid, runs, -1), axis=1)
    opens = valid & (jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1) != runs)
    before = jax.lax.cummax(jnp.where(opens, total - begins, 0), axis=1)
    count = total - before + jnp.where(latest <= 0, earlier, 0)
    empty = ~jnp.any(valid, axis=1)
    return count - 1, jnp.where(empty, chunks, count[:, -1])


class SmoothingState(NamedTuple):
    """value: [batch, width], the moving average within segment `segment` [batch]."""

    value: jax.Array
    segment: jax.Array


def init_smoothing(batch: int, width: int, dtype: jnp.dtype) -> SmoothingState:
    zeros = jnp.zeros((batch, width), statistics_dtype(dtype))
    return SmoothingState(zeros, jnp.zeros((batch,), jnp.int32))


def dechunk(
    chunks: jax.Array,
    probability: jax.Array,
    begins: jax.Array,
    info: TokenInfo,
    state: SmoothingState | None = None,
    sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
) -> tuple[jax.Array, SmoothingState]:
    """Chunks' vectors on all their tokens: h_j = P_j z_j + (1 - P_j) h_{j-1}, held until the next.

    chunks: [batch, seq_len, width], z_j at the token where chunk j begins; what lies elsewhere is
    not read. P is clipped to [1e-4, 1 - 1e-4], and h is zero before a document, so its first chunk
    comes back times 0.9999. Returns float32 [batch, seq_len, width], of tokens, and the state.
    """
    dtype = statistics_dtype(chunks.dtype)
    if state is None:
        state = init_smoothing(chunks.shape[0], chunks.shape[2], dtype)
    share = jnp.clip(probability.astype(dtype), P_MIN, 1 - P_MIN)
    share = jnp.where(begins, share, 0)[..., None]
    first, last = segments_at_ends(info)
    held, value = sequence.gated_scan(
        1 - share,
        share * jnp.where(begins[..., None], chunks.astype(dtype), 0),
        state=continued(state.value, state.segment, first),
        segment_ids=info.segments,
    )
    return held, SmoothingState(value, jnp.where(last == 0, state.segment, last))


def straight_through(confidence: jax.Array) -> jax.Array:
    """1, with the gradient of `confidence`."""
    return confidence + jax.lax.stop_gradient(1 - confidence)


def ratio_loss(begins: jax.Array, probability: jax.Array, count: jax.Array, target: float):
    """N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)), which pulls the share of boundaries to 1 / N.

    begins, probability: of the tokens that count, 0 elsewhere; count: their number; target: N > 1.
    F, the share of boundaries, has no gradient; G is the mean probability. The loss is 1 wherever
    F = 1 / N.
    """
    count = jnp.maximum(count, 1)
    share = jax.lax.stop_gradient(jnp.sum(begins) / count)
    mean = jnp.sum(probability) / count
    return target / (target - 1) * ((target - 1) * share * mean + (1 - share) * (1 - mean))
