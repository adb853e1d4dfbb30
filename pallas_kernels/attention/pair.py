"""Attention's forward and backward apart, for callers that own the rule of differentiation.

A ring adds up partial attention over keys that pass by: its gradient needs every block's backward
under the log-sum-exp of all blocks together, which `jax.grad` of a single block does not know.
"""

from dataclasses import dataclass

import jax

from effattn.masks import Mask
from effattn.pallas_kernels import dispatch
from effattn.pallas_kernels.attention.api import BACKENDS
from effattn.pallas_kernels.attention.call import AttentionCall, Tokens, describe


@dataclass(frozen=True)
class AttentionPair:
    """The options of `attention` for one mask; a static value."""

    mask: Mask
    scale: float | None = None
    logit_soft_cap: float | None = None
    implementation: str = "auto"

    def _of(
        self, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
    ) -> tuple[dispatch.Backend, AttentionCall, Tokens]:
        call, tokens = describe(
            query,
            key,
            value,
            self.mask,
            tokens,
            scale=self.scale,
            logit_soft_cap=self.logit_soft_cap,
            block_sizes=None,
        )
        backend = dispatch.choose("attention", BACKENDS, call, self.implementation)
        return backend, call, call.with_positions(tokens)

    def forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
    ) -> tuple[jax.Array, jax.Array]:
        """(out, lse) as `attention(..., return_lse=True)` gives them."""
        backend, call, tokens = self._of(query, key, value, tokens)
        return backend.forward(call, query, key, value, tokens)

    def backward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        tokens: Tokens,
        out: jax.Array,
        lse: jax.Array,
        d_out: jax.Array,
        d_lse: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What these keys and values add to the gradients, in the dtypes of query, key and value.

        out, lse: of the softmax over all keys, of which these may be a part.
        """
        backend, call, tokens = self._of(query, key, value, tokens)
        return backend.backward(call, query, key, value, tokens, out, lse, d_out, d_lse)
