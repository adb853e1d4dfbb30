"""JRT's prefix linear attention: BASED's, and a first part of the document that all tokens see.

A recurrent state must choose what to remember before it knows what will be asked. So the first
enc_length tokens are read twice: in order, and by a second pair of projections whose keys and
values every query sees. Source: Arora et al. 2024, Just read twice (arXiv 2407.05483).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least
from effattn.nn.mixers.based import Based, BasedConfig
from effattn.nn.param import Dense, normal
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class JRTConfig(BasedConfig):
    """enc_length: tokens of the prefix, by their position in the document; 0 gives BASED.

    padding_as_zero_keys: padding keeps its value and loses its key before the feature map, as in
    the authors' code, where it thus still counts as one token of score 1; False: padding counts
    for nothing. For comparison with that code, it reads padding's segment_ids as its document.
    """

    enc_length: int = 1024
    padding_as_zero_keys: bool = False

    def build(
        self,
        width: int,
        *,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "JRT":
        """Raises ValueError where heads and widths do not fit together, or enc_length < 0."""
        check_at_least("enc_length", self.enc_length, 0)
        return JRT(
            width,
            enc_length=self.enc_length,
            padding_as_zero_keys=self.padding_as_zero_keys,
            **self.module_options(width),
            sequence=sequence,
            dtype=dtype,
            rngs=rngs,
        )


class JRT(Based):
    """BASED's sums, where a prefix token j also adds a_tj and a_tj v_j from prefix_key(x_j) and
    prefix_value(x_j) for every t of its document, those before j among them.

    Outputs inside the prefix see all of it: a next-token loss there would read its own answers.
    After a `prefill` that holds the document's prefix, a step is BASED's; a token that comes by a
    step adds nothing to the prefix. With fewer than enc_length tokens the prompt is the prefix.
    """

    def __init__(
        self,
        width: int,
        *,
        enc_length: int,
        padding_as_zero_keys: bool,
        init_std: float,
        dtype: Any,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(width, init_std=init_std, dtype=dtype, rngs=rngs, **options)
        self.causal = enc_length == 0
        self.prefix_length = enc_length
        self.padding_as_zero_keys = padding_as_zero_keys

        def project(head_width: int) -> Dense:
            axes, init = ("embed", "heads"), normal(init_std)
            features = self.num_heads * head_width
            return Dense(width, features, axes, init=init, dtype=dtype, rngs=rngs)

        self.prefix_key, self.prefix_value = project(self.feature_dim), project(self.head_dim)

    def _operands(self, x: jax.Array, info: TokenInfo) -> dict[str, jax.Array]:
        if not self.prefix_length and not self.padding_as_zero_keys:
            return super()._operands(x, info)
        query, key, value = self._project(x)
        heads = (*x.shape[:2], self.num_heads, -1)
        prefix_key = self._features(self.prefix_key(x).reshape(heads))
        prefix_value = self.prefix_value(x).reshape(heads)
        segments = info.segments
        if self.padding_as_zero_keys:
            segments = info.segment_ids
            key, prefix_key = (
                jnp.where(info.valid[..., None, None], k, 0) for k in (key, prefix_key)
            )
        # Positions say what a prefix is, wherever in a packed row its document stands.
        in_prefix = jnp.where(info.positions < self.prefix_length, segments, 0)
        return {
            "query": query,
            "key": key,
            "value": value,
            "prefix_key": prefix_key,
            "prefix_value": prefix_value,
            "prefix_segment_ids": in_prefix,
            "segment_ids": segments,
        }
