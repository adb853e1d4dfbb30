"""BASED's linear attention: the softmax's exponential replaced by its second-order Taylor series.

Its state does not grow with the sequence: a query of feature_dim channels sees every earlier token
through 1 + d + d (d + 1) / 2 features. Source: Arora et al. 2024 (arXiv 2402.18668). With "elu" in
the place of the Taylor features it is plain linear attention: Katharopoulos et al. 2020 (arXiv
2006.16236).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in, check_multiple
from effattn.nn.layers import statistics_dtype
from effattn.nn.linear_state import (
    DocumentState,
    attend_step,
    continued,
    init_document_state,
    segments_at_ends,
)
from effattn.nn.param import Dense, normal
from effattn.nn.start import Learned, Start, prefix_shapes
from effattn.pallas_kernels.linear_attention import LinearState
from effattn.parallel.sequence import Local, SequenceParallel

# Ours -> the op's. The features 1 + elu(x) are as many as the channels and made before the op.
FEATURE_MAPS = {"taylor": "taylor", "elu": "identity"}


@dataclass(kw_only=True)
class BasedConfig:
    """feature_dim: channels d of a query or key head, before the feature map.

    feature_map: "taylor", or "elu" for 1 + elu(x).
    head_dim: channels of a value head; None: width / num_heads. eps: added to the normaliser.
    init_std, out_init_std: of the input and the output projections (None: the same).
    """

    num_heads: int = 4
    head_dim: int | None = None
    feature_dim: int = 16
    feature_map: str = "taylor"
    eps: float = 1e-12
    chunk_size: int | None = None
    init_std: float = 0.02
    out_init_std: float | None = None

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "Based":
        """Raises ValueError where heads and widths do not fit together, chunk_size < 1, or for an
        unknown feature_map."""
        options = self.module_options(width)
        return Based(width, **options, sequence=sequence, dtype=dtype, rngs=rngs)

    def module_options(self, width: int) -> dict[str, Any]:
        """What the module takes of the config, at a width."""
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("feature_dim", self.feature_dim, 1)
        check_in("feature_map", self.feature_map, FEATURE_MAPS)
        if self.chunk_size is not None:
            check_at_least("chunk_size", self.chunk_size, 1)
        head_dim = self.head_dim
        if head_dim is None:
            check_multiple("width", width, "num_heads", self.num_heads)
            head_dim = width // self.num_heads
        return {
            "num_heads": self.num_heads,
            "head_dim": head_dim,
            "feature_dim": self.feature_dim,
            "feature_map": self.feature_map,
            "eps": self.eps,
            "chunk_size": self.chunk_size,
            "init_std": self.init_std,
            "out_init_std": self.init_std if self.out_init_std is None else self.out_init_std,
        }


class Based(nnx.Module):
    """y[t] = sum_{j<=t} a_tj v_j / (sum_{j<=t} a_tj + eps), a = 1 + s + s^2/2, s = q.k / sqrt(d).

    With feature_map "elu": a = phi(q).phi(k), phi(x) = 1 + elu(x). No rotary, no biases.
    """

    causal = True
    decodes = True

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        head_dim: int,
        feature_dim: int,
        feature_map: str,
        eps: float,
        chunk_size: int | None,
        init_std: float,
        out_init_std: float,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.head_dim, self.feature_dim = num_heads, head_dim, feature_dim
        self.feature_map, self.op_feature_map = feature_map, FEATURE_MAPS[feature_map]
        self.eps, self.chunk_size, self.sequence = eps, chunk_size, sequence

        def project(head_width: int) -> Dense:
            axes, init = ("embed", "heads"), normal(init_std)
            return Dense(width, num_heads * head_width, axes, init=init, dtype=dtype, rngs=rngs)

        self.query, self.key = project(feature_dim), project(feature_dim)
        self.value = project(head_dim)
        axes, init = ("heads", "embed"), normal(out_init_std)
        self.out = Dense(num_heads * head_dim, width, axes, init=init, dtype=dtype, rngs=rngs)

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., width] -> query and key [..., heads, feature_dim], value [..., heads, head_dim]."""
        heads = (*x.shape[:-1], self.num_heads, -1)
        query, key = (self._features(p(x).reshape(heads)) for p in (self.query, self.key))
        return query, key, self.value(x).reshape(heads)

    def _features(self, x: jax.Array) -> jax.Array:
        """What the op has as query or key: its own map is all but "elu"."""
        return 1 + jax.nn.elu(x) if self.feature_map == "elu" else x

    def _operands(self, x: jax.Array, info: TokenInfo) -> dict[str, jax.Array]:
        """The arrays of the op, by name."""
        query, key, value = self._project(x)
        return {"query": query, "key": key, "value": value, "segment_ids": info.segments}

    def _mix(
        self, x: jax.Array, info: TokenInfo, state: LinearState | None, start: Start | None = None
    ) -> tuple[jax.Array, LinearState]:
        operands = self._operands(x, info)
        options: dict[str, Any] = {
            "feature_map": self.op_feature_map,
            "chunk_size": self.chunk_size,
        }
        if start is None:
            y, linear = self.sequence.linear_attention(
                **operands, **options, normalize=True, eps=self.eps, state=state
            )
        else:
            operands |= {n: with_ones(v) for n, v in operands.items() if n.endswith("value")}
            sums, linear = self.sequence.linear_attention(
                **operands, **options, state=None if state is None else _joined(state)
            )
            y, linear = self._with_start(sums, operands["query"], start), _parted(linear)
        y = checkpoint_name(y, "mixer")
        return self.out(y.reshape(*y.shape[:2], -1)), linear

    def _with_start(self, sums: jax.Array, query: jax.Array, start: Start) -> jax.Array:
        """The quotient of sums [batch, ..., heads, head_dim + 1], the normaliser last, to which the
        keys and values of `start` are added. query: [batch, ..., heads, feature_dim].
        """
        key, value = self._features(start["key"]), with_ones(start["value"])
        by_stream = query.reshape(len(key), -1, *query.shape[1:])
        scores = jnp.einsum("pb...hd,pthd->pb...ht", by_stream, key.astype(query.dtype))
        if self.op_feature_map == "taylor":
            scores = scores * self.feature_dim**-0.5
            scores = 1 + scores + jnp.square(scores) / 2
        learned = jnp.einsum("pb...ht,pthe->pb...he", scores, value.astype(query.dtype))
        wide = sums.astype(statistics_dtype(sums.dtype)) + learned.reshape(sums.shape)
        return (wide[..., :-1] / (wide[..., -1:] + self.eps)).astype(sums.dtype)

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        *,
        state: DocumentState | None = None,
        key: jax.Array | None = None,
        start: Start | None = None,
    ) -> tuple[jax.Array, None]:
        if state is not None:
            return self.prefill(x, info, state, start)[0], None
        return self._mix(x, info, None, start)[0], None

    def start_shapes(self, length: int) -> dict[str, Learned]:
        """Keys and values rather than the sums that they make: any sums whatever could make the
        normaliser negative, and those of keys cannot."""
        return prefix_shapes(length, self.num_heads, self.feature_dim, self.head_dim)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> DocumentState:
        heads = (self.num_heads, self.feature_dim, self.head_dim)
        return init_document_state(
            batch, *heads, dtype, feature_map=self.op_feature_map, normalize=True
        )

    def prefill(
        self, x: jax.Array, info: TokenInfo, state: DocumentState, start: Start | None = None
    ) -> tuple[jax.Array, DocumentState]:
        first, last = segments_at_ends(info)
        y, linear = self._mix(x, info, continued(state.linear, state.segment, first), start)
        return y, DocumentState(linear, jnp.where(last == 0, state.segment, last))

    def step(
        self, x_t: jax.Array, info: TokenInfo, state: DocumentState, start: Start | None = None
    ) -> tuple[jax.Array, DocumentState]:
        query, key, value = self._project(x_t)
        if start is None:
            y, state = attend_step(
                query,
                key,
                value,
                info,
                state,
                feature_map=self.op_feature_map,
                normalize=True,
                eps=self.eps,
            )
        else:
            joined = state._replace(linear=_joined(state.linear))
            sums, state = attend_step(
                query, key, with_ones(value), info, joined, feature_map=self.op_feature_map
            )
            y = self._with_start(sums, query, start)
            state = state._replace(linear=_parted(state.linear))
        return self.out(y.reshape(y.shape[0], -1)), state


def with_ones(value: jax.Array) -> jax.Array:
    """[..., head_dim + 1]: the last channel of the sums is then their normaliser."""
    return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def _joined(state: LinearState) -> LinearState:
    """The normaliser as one more channel of values."""
    return LinearState(jnp.concatenate([state.kv, state.normalizer[..., None]], axis=-1))


def _parted(state: LinearState) -> LinearState:
    return LinearState(state.kv[..., :-1], state.kv[..., -1])
