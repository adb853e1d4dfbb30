"""Aaren: softmax attention whose query is learned, not computed, so that it is a recurrent network.

One query per head serves all tokens, so scores do not depend on who reads, and a softmax over every
prefix needs the largest score and two sums. Such a layer cannot look anything up by content: what
it weighs highly, it weighs highly for everyone. Source: Feng et al. 2024, Attention as an RNN
(arXiv 2405.13956); no official code exists.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_multiple
from effattn.nn.layers import statistics_dtype
from effattn.nn.linear_state import continued, segments_at_ends
from effattn.nn.param import Dense, normal, parameter, project
from effattn.nn.start import Learned, Start, first_tokens, rows_of
from effattn.pallas_kernels.prefix_scan import (
    SoftmaxState,
    init_softmax_state,
    softmax_scan_step,
)
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class AarenConfig:
    """head_dim None: width / num_heads. use_bias: of all four projections.

    token_std: of the learned query token. init_std, out_init_std: of the input and the output
    projections (None: the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    use_bias: bool = True
    token_std: float = 1.0
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Aaren":
        """Raises ValueError where heads and width do not fit together."""
        check_at_least("num_heads", self.num_heads, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        return Aaren(
            width,
            num_heads=self.num_heads,
            head_dim=head_dim,
            use_bias=self.use_bias,
            token_std=self.token_std,
            init_std=self.init_std,
            out_init_std=self.init_std if self.out_init_std is None else self.out_init_std,
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class AarenState(NamedTuple):
    """softmax: that of the tokens of segment `segment` [batch] (0: none yet)."""

    softmax: SoftmaxState
    segment: jax.Array


class Aaren(nnx.Module):
    """y[t] = out(sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j)), s_j = q . key(x_j) / sqrt(d),
    q = query(token) with a learned `token` of the layer. No position embedding.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        use_bias: bool,
        token_std: float,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.dtype = num_heads, head_dim, dtype
        self.sequence = sequence
        options: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        inner = num_heads * head_dim

        def projection() -> Dense:
            return Dense(width, inner, ("embed", "heads"), init=normal(init_std), **options)

        self.token = parameter((width,), ("embed",), normal(token_std), rngs)
        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = Dense(inner, width, ("heads", "embed"), init=normal(out_init_std), **options)

    def _scores(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., num_heads], float32 at least.

        q . key(x) = (q key) . x, so one column per head takes the place of the key projection:
        keys themselves, head_dim times as large, are never made.
        """
        query = self.token[...] @ self.query.kernel[...]
        if self.query.bias is not None:
            query = query + self.query.bias[...]
        query = query.reshape(self.num_heads, self.head_dim) * self.head_dim**-0.5
        heads = (-1, *query.shape)
        columns = jnp.einsum("dhe,he->dh", self.key.kernel[...].reshape(heads), query)
        scores = project(x, columns, self.dtype, statistics_dtype(self.dtype))
        if self.key.bias is not None:
            scores = scores + jnp.einsum("dhe,he->h", self.key.bias[...].reshape(heads), query)
        return scores

    def _values(self, x: jax.Array) -> jax.Array:
        return self.value(x).reshape(*x.shape[:-1], self.num_heads, self.head_dim)

    def _mix(
        self,
        x: jax.Array,
        info: TokenInfo,
        state: SoftmaxState | None,
        start: Start | None = None,
        begins: jax.Array | None = None,
    ) -> tuple[jax.Array, SoftmaxState]:
        """start: taken in by the tokens where `begins` [batch, seq_len] is True."""
        scores, values = self._scores(x), self._values(x)
        if start is not None and begins is not None:
            scores, values = _with_start(scores, values, start, begins)
        y, softmax = self.sequence.softmax_scan(
            scores, values, state=state, segment_ids=info.segments
        )
        y = checkpoint_name(y, "mixer")
        return self.out(y.reshape(*y.shape[:2], -1)), softmax

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: AarenState | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is None and start is not None:
            state = self.init_state(x.shape[0], x.shape[1], x.dtype)
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        return self._mix(x, info, None)[0], None

    def init_state(self, batch: int, max_len: int, dtype: Any) -> AarenState:
        """float32 sums whatever `dtype`, as large for one token as for a million."""
        softmax = init_softmax_state(batch, self.num_heads, self.head_dim, dtype)
        return AarenState(softmax, jnp.zeros((batch,), jnp.int32))

    def start_shapes(self, length: int) -> dict[str, Learned]:
        """The score and the value that a document begins with: all that keys before it leave."""
        return {
            "score": Learned((self.num_heads,), (None,)),
            "value": Learned((self.num_heads, self.head_dim), ("heads", None)),
        }

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: AarenState, start: Start | None = None
    ) -> tuple[jax.Array, AarenState]:
        first, last = segments_at_ends(info)
        begins = None if start is None else first_tokens(info.segments, state.segment)
        y, softmax = self._mix(x, info, _continued(state, first), start, begins)
        return y, AarenState(softmax, jnp.where(last == 0, state.segment, last))

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: AarenState, start: Start | None = None
    ) -> tuple[jax.Array, AarenState]:
        scores, values = self._scores(x_t), self._values(x_t)
        if start is not None:
            begins = (info.segments != 0) & (info.segments != state.segment)
            scores, values = _with_start(scores, values, start, begins)
        y, softmax = softmax_scan_step(
            scores,
            values,
            _continued(state, info.segments),
            valid=info.valid,
        )
        segment = jnp.where(info.valid, info.segment_ids, state.segment)
        return self.out(y.reshape(len(y), -1)), AarenState(softmax, segment)


def _continued(state: AarenState, segment: jax.Array) -> SoftmaxState:
    """What a token of `segment` [batch] goes on from; segment 0 (padding) keeps it."""
    before = continued(state.softmax, state.segment, segment)
    # Sums of zero alone would be an empty state too, but with 0 for a maximum that scores far below
    # 0 are measured from, and lost.
    empty = before.denominator == 0
    return before._replace(maximum=jnp.where(empty, -jnp.inf, before.maximum))


def _with_start(
    scores: jax.Array, values: jax.Array, start: Start, begins: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores [batch, ..., heads] and values [batch, ..., heads, head_dim] of tokens that, where
    `begins` [batch, ...] is True, stand for themselves and for a document's start together.

    exp(s) v + exp(s0) v0 = exp(s') v', so nothing but the first token of a document changes.
    """
    lead = (len(scores), *(1,) * (scores.ndim - 2))
    learned = rows_of(start, len(scores))
    score = learned["score"].reshape(*lead, -1).astype(scores.dtype)
    value = learned["value"].reshape(*lead, *values.shape[-2:]).astype(scores.dtype)
    both = jnp.logaddexp(scores, score)
    share = jnp.exp(score - both)[..., None]
    mixed = values + share * (value - values)
    begins = begins[..., None]
    return (
        jnp.where(begins, both, scores),
        jnp.where(begins[..., None], mixed.astype(values.dtype), values),
    )
