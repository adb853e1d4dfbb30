"""What a document starts from where that is learned: the laws of mixers with a `start`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_laws import (
    Subject,
    law_future_tokens_do_not_change_past_outputs,
    law_packed_equals_unpacked,
    law_prefill_then_steps_equals_full_pass,
)

from effattn.batch import TokenInfo, whole_rows
from effattn.nn.linear_state import DocumentState
from effattn.nn.mixers.aaren import AarenConfig, AarenState
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.based import BasedConfig
from effattn.nn.mixers.gla import GLAConfig
from effattn.pallas_kernels.linear_attention import LinearState, linear_attention
from effattn.pallas_kernels.prefix_scan import SoftmaxState

WIDTH = 16


class Started:
    """A mixer whose documents begin from a drawn start, the rows of the batch in two streams."""

    def __init__(self, mixer: Any):
        self.mixer, self.init_state = mixer, mixer.init_state
        draw = np.random.default_rng(3)
        self.start = {
            name: draw.normal(size=(2, *learned.shape)).astype(np.float32)
            for name, learned in mixer.start_shapes(3).items()
        }

    def __call__(self, x: jax.Array, info: TokenInfo) -> tuple[jax.Array, None]:
        return self.mixer(x, info, start=self.start)

    def prefill(self, x: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        return self.mixer.prefill(x, info, state, start=self.start)

    def step(self, x_t: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        return self.mixer.step(x_t, info, state, start=self.start)


STARTED = ["aaren", "lightning"]
STARTED_SLOWLY = ["rat", "ssd", "window", "gla", "retention", "elu", "jrt", "neighborhood"]


@pytest.mark.parametrize(
    "case", [*STARTED, *(pytest.param(case, marks=pytest.mark.slow) for case in STARTED_SLOWLY)]
)
def test_every_document_begins_from_the_start_of_its_stream(case):
    """Packed or not, whole or step by step: the laws, of a mixer with a start."""
    subject = Subject(case, Started)
    law_packed_equals_unpacked(subject)
    if subject.causal and subject.prefix_length == 0:
        law_future_tokens_do_not_change_past_outputs(subject)
    law_prefill_then_steps_equals_full_pass(subject)


def linear_sums(start: dict) -> DocumentState:
    return DocumentState(LinearState(start["sums"]), jnp.ones(2, jnp.int32))


def softmax_sums(start: dict) -> AarenState:
    score, value = start["score"], start["value"]
    return AarenState(SoftmaxState(score, jnp.ones_like(score), value), jnp.ones(2, jnp.int32))


def taylor_sums(start: dict) -> DocumentState:
    key, value = start["key"], start["value"]
    _, linear = linear_attention(key, key, value, feature_map="taylor", normalize=True)
    return DocumentState(linear, jnp.ones(2, jnp.int32))


@pytest.mark.parametrize(
    ("config", "as_state"),
    [
        (GLAConfig(num_heads=2, gate_rank=3), linear_sums),
        (AarenConfig(num_heads=2), softmax_sums),
        (BasedConfig(num_heads=2, feature_dim=3), taylor_sums),
    ],
    ids=["linear", "softmax", "taylor"],
)
def test_a_start_is_the_state_that_a_document_goes_on_from(config, as_state):
    mixer = config.build(WIDTH, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, WIDTH)), jnp.float32)
    start, info = jax.tree.map(jnp.asarray, Started(mixer).start), whole_rows(x)
    got, wanted, without = jax.jit(
        lambda mixer, start: (
            mixer(x, info, start=start)[0],
            mixer(x, info, state=as_state(start))[0],
            mixer(x, info)[0],
        )
    )(mixer, start)
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # sums in another order
    assert np.max(np.abs(got - without)) > 1e-4


def test_prefix_keys_are_neither_rotated_nor_bounded_by_the_window():
    """The reference is a softmax over both sets of keys, written out."""
    config = AttentionConfig(num_heads=2, num_kv_heads=1, window=1, rotary_base=10.0)
    mixer = config.build(WIDTH, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, WIDTH)), jnp.float32)
    start, info = jax.tree.map(jnp.asarray, Started(mixer).start), whole_rows(x)
    query, key, value = mixer._project(x, info)
    scores = (
        jnp.einsum("btnh,bskh->bnts", query, jnp.concatenate([start["key"], key], axis=1))
        * (WIDTH // 2) ** -0.5
    )
    back = np.arange(6)[:, None] - np.arange(6)
    visible = np.concatenate([np.ones((6, 3), bool), (back >= 0) & (back <= 1)], axis=1)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    both = jnp.concatenate([start["value"], value], axis=1)
    wanted = jnp.einsum("bnts,bskh->btnh", weights, both).reshape(2, 6, WIDTH)
    got, _ = mixer(x, info, start=start)
    np.testing.assert_allclose(got, mixer.out(wanted), atol=1e-6)
