"""Word-pooled models: what a word is, what sees what at the granularity of bytes and of words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models.word_pooled import WordPooled, WordPooledConfig, in_words
from effattn.nn.compact import CapacityConfig
from effattn.train.flops import forward_flops

SMALL: dict[str, Any] = {
    "encoder_layers": 1,
    "num_layers": 1,
    "decoder_layers": 1,
    "width": 16,
    "num_heads": 2,
    "backbone_width": 24,
    "backbone_heads": 2,
    "longest_word": 8,
    "initializer_range": 0.3,
}
TEXT = b"one three, seventeenletters end"


def build(**options: Any) -> WordPooled:
    return WordPooledConfig(**{**SMALL, **options}).build(vocab_size=256, rngs=nnx.Rngs(0))


def tokens_of(*texts: bytes) -> np.ndarray:
    return np.stack([np.frombuffer(text, np.uint8).astype(np.int32) for text in texts])


def words_of(tokens: np.ndarray) -> list[bytes]:
    """The words of the first row, as the model cuts them."""
    model = build()
    _, words, _, _ = jax.jit(lambda: model._words(tokens, whole_rows(tokens), None))()
    row = np.asarray(words[0])
    return [bytes(tokens[0, row == n].tolist()) for n in range(1, row.max() + 1)]


def test_words_begin_with_their_space_and_long_ones_are_cut_not_shortened():
    words = words_of(tokens_of(TEXT))
    assert words == [b"one", b" three,", b" sevente", b"enletter", b"s", b" end"]
    assert b"".join(words) == TEXT


def test_a_byte_is_seen_by_its_word_from_there_on_and_by_words_after_its_own():
    """What each byte's logits hang on, byte by byte: by gradients."""
    tokens = tokens_of(b"ab cd ef")
    words = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    model = build()
    info = whole_rows(tokens)
    table = model.embedding.table[...]

    @jax.jit
    @jax.jacrev
    def depends(offsets: jax.Array) -> jax.Array:
        """How the sum of each byte's output changes with each byte's own copy of its vector."""
        own = jnp.arange(256, 256 + 8)[None]
        graphdef, params = nnx.split(model)
        params = nnx.to_pure_dict(params)
        params["embedding"]["table"] = jnp.concatenate([table, table[tokens[0]] + offsets])
        copied = nnx.merge(graphdef, params)
        # The copies' numbers are no white space: the words are given by the text itself.
        copied.router = lambda _, info, state=None: model.router(tokens, info, state)
        return jnp.sum(jnp.sin(copied(own, info).hidden[0]), axis=-1)

    seen = np.any(np.asarray(depends(jnp.zeros((8, 16)))), axis=-1)
    index = np.arange(8)
    same = (words[:, None] == words) & (index <= index[:, None])
    np.testing.assert_array_equal(seen, same | (words < words[:, None]))


def test_the_sum_of_decoder_and_backbone_reaches_every_byte_of_the_next_word():
    tokens = tokens_of(b"ab cd ef", b"xb cd ef")
    hidden = jax.jit(lambda: build()(tokens, whole_rows(tokens)).hidden)()
    assert np.all(np.any(np.asarray(hidden[0] != hidden[1]), axis=-1))


@pytest.mark.slow
def test_a_bucket_of_words_computes_what_exact_does():
    tokens = tokens_of(TEXT, TEXT[::-1])

    @jax.jit
    def run() -> list[Any]:
        outs = []
        for mode in ("exact", "bucket"):
            out = build(capacity=CapacityConfig(mode=mode, rungs=(0.5, 1.0)))(
                tokens, whole_rows(tokens)
            )
            outs.append((out.hidden, out.metrics))
        return outs

    (exact, _), (bucket, metrics) = run()
    np.testing.assert_allclose(bucket, exact, rtol=0, atol=2e-5)
    assert metrics["words_overflow"] == 0 and metrics["words_capacity"] < tokens.size
    assert metrics["bytes_per_word"] == pytest.approx(tokens.size / metrics["words_count"])


def test_demotion_is_for_training_and_is_counted():
    tokens = tokens_of(TEXT)
    model = build(capacity=CapacityConfig(mode="demote", share=0.1))  # 4 words of 31 bytes

    @jax.jit
    def run() -> list[Any]:
        keys = (jax.random.key(0), None)
        return [model(tokens, whole_rows(tokens), key=key).metrics for key in keys]

    trained, evaluated = run()
    assert trained["words_count"] == 6 and trained["words_overflow"] == 2
    assert evaluated["words_overflow"] == 0 and evaluated["words_capacity"] == 31


def test_several_slots_pool_a_word_differently():
    tokens = tokens_of(b"ab cd ef")
    model = build(cls_slots=4)
    assert model.pool_query.shape == (4, 16) and model.to_backbone.kernel.shape == (64, 24)
    assert np.all(np.isfinite(jax.jit(lambda: model(tokens, whole_rows(tokens)).hidden)()))


def test_words_are_documents_of_their_own_also_across_padding():
    words = np.array([[3, 3, 0, 3, 4, 4, 0, 5]])
    info = in_words(words, np.array([3]), np.array([2]))
    assert isinstance(info, TokenInfo)
    np.testing.assert_array_equal(info.positions, [[2, 3, 0, 4, 0, 1, 0, 0]])
    np.testing.assert_array_equal(info.segment_ids, words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"longest_word": 0}, "model.longest_word: got 0"),
        ({"cls_slots": 0}, "model.cls_slots: got 0"),
        ({"backbone_heads": 5}, "model.backbone_width: got 24, expected a multiple of"),
        ({"num_heads": 3}, "model.width: got 16, expected a multiple of model.num_heads=3"),
        ({"capacity": CapacityConfig(mode="some")}, "model.capacity.mode: got 'some'"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**options))


def test_flops_of_the_backbone_are_spread_over_the_bytes_of_a_word():
    def count(**options: Any) -> float:
        config = WordPooledConfig(**{**SMALL, **options})
        return forward_flops(config, vocab_size=256, seq_len=80)

    layer = 2 * 24 * (4 * 24 + 3 * 64) + 4 * 24 * (16 + 1) / 2
    assert count(num_layers=3) - count(num_layers=1) == pytest.approx(2 * layer / 5)
