"""Generation: what a row says is decided by its prompt, its seed and the model, by nothing else."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from effattn.batch import whole_rows
from effattn.data.tokenizer import ByteTokenizer
from effattn.generate import _decode_block, generate
from effattn.parallel.mesh import MeshConfig

VOCAB = 24
MODELS = {
    "transformer": (
        "effattn.models.transformer:TransformerConfig",
        {"num_layers": 2, "width": 16, "num_heads": 2},
    ),
    "based": (
        "effattn.models.based:BasedModelConfig",
        {"num_layers": 3, "width": 16, "num_heads": 2, "feature_dim": 4, "window": 5},
    ),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7], [2, 7, 1, 8]]


def redrawn(name: str) -> Any:
    module, cls = MODELS[name][0].split(":")
    config = getattr(importlib.import_module(module), cls)(**MODELS[name][1])
    with nnx.use_eager_sharding(False):
        model = config.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.3, p.shape), p.dtype), params)
    return nnx.merge(graphdef, params)


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    return redrawn(request.param)


def tokens(model, prompts, **settings):
    settings = {"max_new_tokens": 12, **settings}
    return [c.tokens for c in generate(model, prompts, **settings).completions]


@jax.jit
def forward(model, row):
    return model.logits(model(row, whole_rows(row)).hidden)[0]


def full_logits(model, row):
    """[len(row), vocab]; one compiled length, since later tokens change nothing."""
    return np.asarray(forward(model, jnp.asarray([row + [0] * (48 - len(row))]))[: len(row)])


def test_greedy_tokens_are_the_argmax_of_the_full_pass(model):
    for prompt, new in zip(PROMPTS, tokens(model, PROMPTS), strict=True):
        assert len(new) == 12
        logits = full_logits(model, prompt + new)
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == new


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}])
def test_a_row_says_the_same_alone_as_among_unequal_others(model, settings):
    together = tokens(model, PROMPTS, seed=10, **settings)
    for row, prompt in enumerate(PROMPTS):
        assert tokens(model, [prompt], seed=10 + row, **settings) == [together[row]]


def test_a_seed_decides_what_is_drawn(model):
    first = tokens(model, [[1, 2]], temperature=1.5, seed=3)
    assert tokens(model, [[1, 2]], temperature=1.5, seed=3) == first
    assert tokens(model, [[1, 2]], temperature=1.5, seed=4) != first


def test_the_one_likeliest_token_is_the_greedy_one(model):
    greedy = tokens(model, PROMPTS)
    assert tokens(model, PROMPTS, temperature=2.0, top_k=1) == greedy
    assert tokens(model, PROMPTS, temperature=2.0, top_p=1e-6) == greedy


def test_only_the_top_k_are_drawn(model):
    for prompt, new in zip(PROMPTS, tokens(model, PROMPTS, temperature=9.0, top_k=3), strict=True):
        logits = full_logits(model, prompt + new)[len(prompt) - 1 : -1]
        best = np.argsort(-logits, axis=-1)[:, :3]
        assert all(token in row for token, row in zip(new, best, strict=True))


def test_more_tokens_than_a_block_continue_the_same_text(model):
    short, long = tokens(model, [[5, 6]]), tokens(model, [[5, 6]], max_new_tokens=40)
    assert long[0][:12] == short[0] and len(long[0]) == 40


def test_the_second_block_is_not_compiled_again(model):
    # As a run's parameters come from a checkpoint: on a mesh of one device.
    mesh = MeshConfig(data=1).build(jax.devices()[:1])
    graphdef, params = nnx.split(model)
    placed = nnx.merge(graphdef, jax.device_put(params, NamedSharding(mesh, PartitionSpec())))
    before = _decode_block._cache_size()
    tokens(placed, [[1], [2], [3], [4]], max_new_tokens=40)
    assert _decode_block._cache_size() - before <= 1


def test_long_prompts_are_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr("effattn.generate.PREFILL_CHUNK", 16)
    long = [int(t) for t in np.random.default_rng(0).integers(0, VOCAB, 36)]
    prompts = [long, long[:16], long[:7]]
    for prompt, new in zip(prompts, tokens(model, prompts), strict=True):
        logits = full_logits(model, prompt + new)
        assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == new


def test_the_state_of_linear_layers_does_not_grow_with_length():
    def state_bytes(name, pattern, max_new_tokens):
        MODELS["linear"] = (MODELS[name][0], {**MODELS[name][1], **pattern})
        try:
            model = redrawn("linear")
        finally:
            del MODELS["linear"]
        return generate(model, [[1]], max_new_tokens=max_new_tokens).state_bytes

    linear = {"pattern": ("conv", "linear")}
    assert state_bytes("based", linear, 16) == state_bytes("based", linear, 64) > 0
    assert state_bytes("transformer", {}, 16) < state_bytes("transformer", {}, 64)


# ---- a model that says what it is told, to look at everything around the model


class Scripted(nnx.Module):
    """Follows token number `position` of `script` by the next one; its state is empty."""

    def __init__(self, script: list[int], vocab_size: int = 257):
        onehot = np.full((len(script) + 64, vocab_size), -30.0, np.float32)
        for position, token in enumerate(script[1:]):
            onehot[position, token] = 30.0
        self.table = nnx.Param(jnp.asarray(onehot))

    def init_state(self, batch, max_len, dtype):
        return jnp.zeros((batch, 1), dtype)

    def prefill(self, tokens, info, state):
        return self.table[...][info.positions], state

    def step(self, token, info, state):
        return self.table[...][info.positions], state


def says(text: str | list[int], prompt: str = ">", **settings):
    script = list(text.encode()) if isinstance(text, str) else text
    model = Scripted(list(prompt.encode()) + script + [0] * 40)
    pieces: list[bytes] = []
    settings = {"max_new_tokens": len(script), "tokenizer": ByteTokenizer(), **settings}
    result = generate(
        model, [list(prompt.encode())], on_text=lambda row, piece: pieces.append(piece), **settings
    )
    (completion,) = result.completions
    assert b"".join(pieces) == completion.text
    return completion, pieces


def test_text_ends_before_a_stop_string_that_spans_tokens_and_blocks():
    text = "0123456789abcd STOP and more"  # the stop string lies over the end of the first block
    completion, _ = says(text, stop=["STOP", "never"])
    assert completion.text == b"0123456789abcd " and completion.reason == "stop"
    assert bytes(completion.tokens) == b"0123456789abcd STOP"


def test_the_first_of_two_stop_strings_ends_the_text():
    assert says("one two three", stop=["three", "two"])[0].text == b"one "
    assert says("aab", stop=["ab", "aab"])[0].text == b""


def test_what_only_begins_like_a_stop_string_is_said_in_the_end():
    completion, _ = says("ends with STO", stop=["STOP"])
    assert completion.text == b"ends with STO" and completion.reason == "length"


def test_no_piece_holds_what_may_become_a_stop_string():
    _, pieces = says("0123456789abcdSTOP, and more", stop=["STOP, and"])
    assert pieces[0] == b"0123456789abcd"


def test_a_stop_string_in_the_prompt_does_not_count():
    assert says("on", prompt="STOP ", stop=["STOP"])[0].text == b"on"


def test_the_end_of_a_document_ends_a_row():
    completion, _ = says([65, 66, 256, 67, 68])
    assert completion.text == b"AB" and completion.reason == "end"
    assert completion.tokens == [65, 66, 256]


def test_the_context_ends_a_row():
    completion, _ = says("abcdefghij", prompt="123", context=8)
    assert completion.text == b"abcde" and completion.reason == "context"


def test_characters_of_several_bytes_come_out_whole():
    assert says("naïve — 注意力")[0].text.decode() == "naïve — 注意力"


def test_draws_follow_the_tempered_probabilities():
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    model = Scripted([0, 0], vocab_size=4)
    model.table = nnx.Param(jnp.broadcast_to(jnp.log(probability), (40, 4)))
    rows, temperature = 4000, 2.0
    result = generate(model, [[0]] * rows, max_new_tokens=1, temperature=temperature)
    drawn = np.bincount([c.tokens[0] for c in result.completions], minlength=4) / rows
    wanted = probability ** (1 / temperature) / (probability ** (1 / temperature)).sum()
    # Four standard errors of a share from 4000 draws.
    np.testing.assert_allclose(drawn, wanted, atol=4 * 0.5 / rows**0.5)

    result = generate(model, [[0]] * rows, max_new_tokens=1, temperature=1.0, top_p=0.75)
    drawn = np.bincount([c.tokens[0] for c in result.completions], minlength=4) / rows
    np.testing.assert_allclose(drawn, [0.625, 0.375, 0, 0], atol=4 * 0.5 / rows**0.5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -0.5}, "temperature: got -0.5"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_p": 0.0}, "top_p: got 0.0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"stop": [""]}, "stop: got an empty string"),
        ({"seed": -1}, "seed: got -1"),
        ({"context": 1}, "context of 1"),
        ({"stop": ["x"], "tokenizer": None}, "stop: a stop string needs a tokenizer"),
    ],
)
def test_an_argument_out_of_range_is_a_sentence(settings, words):
    with pytest.raises(ValueError) as error:
        says("abc", **settings)
    assert words in str(error.value)


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[-1]], [[400]]])
def test_prompts_that_are_no_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="prompts"):
        generate(Scripted([1, 2]), prompts, max_new_tokens=2)


def test_logits_that_are_not_finite_are_not_sampled():
    model = Scripted([1, 2, 3])
    model.table = nnx.Param(model.table[...].at[2].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [[1]], max_new_tokens=4)
