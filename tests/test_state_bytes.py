"""The table of decoding states against sums done by hand."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from effattn.config import load_config
from effattn.models.aaren import AarenModelConfig
from scripts.state_bytes import CONTEXTS, MODELS, model_config, parts, readable

ROOT = Path(__file__).resolve().parent.parent
FLOAT, BFLOAT = 4, 2

# Bytes of sums and activations, whatever the context.
CONSTANT = {
    # 16 heads of 153 Taylor features: values of 64 and a normaliser; windows of 128 and the token
    # itself; two inputs of a convolution 2 D wide.
    "based_360m": 5 * 16 * 153 * (64 + 1) * FLOAT + 5 * 129 * 2 * 1024 * BFLOAT
    + 17 * 2 * 2048 * BFLOAT,
    "based_1b3": 7 * 16 * 153 * (112 + 1) * FLOAT + 7 * 129 * 2 * 1792 * BFLOAT
    + 22 * 2 * 3584 * BFLOAT,
    # 8 heads of 128 x 128; LRPE doubles the keys of the first of 24 layers.
    "lightning_385m": (23 + 2) * 8 * 128 * 128 * FLOAT,
    # 64 heads of 64 channels and 128 states; three inputs of convolutions 4352 wide.
    "mamba2_1b3": 48 * (64 * 64 * 128 * FLOAT + 3 * 4352 * BFLOAT),
    # 8 heads: a maximum, a denominator and an average of 64.
    "Aaren, D 512, 8 heads": 6 * 8 * (2 + 64) * FLOAT,
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_recurrent_states_are_their_closed_forms_at_every_context(name):
    for context in (CONTEXTS[0], CONTEXTS[-1]):
        sums, numbers = parts(model_config(name), context)
        assert sums == CONSTANT[name]
        assert numbers < sums / 50


def test_published_figures_of_single_layers():
    """Per layer and sequence, as counted from the authors' code."""
    assert 16 * 153 * (64 + 1) * FLOAT == 636_480  # BASED's linear layer, packed features
    assert 129 * 2 * 1024 * BFLOAT == 528_384  # its window
    assert CONSTANT["lightning_385m"] == 13_107_200
    one = parts(AarenModelConfig(width=512, num_heads=8, num_layers=1), 4096)[0]
    assert one == 2_112
    one = model_config("mamba2_1b3")
    one.num_layers = 1
    assert parts(one, 4096)[0] == 2_097_152 + 3 * 4352 * BFLOAT
    one = model_config("rat_1b3")
    one.num_layers = 1  # the running pair is float32 here, bfloat16 (8,192 B) at the authors'
    assert parts(one, 4096)[0] == 2_097_152 + 2 * 2048 * FLOAT


@pytest.mark.parametrize("name", ["transformer_360m", "transformer_1b3"])
def test_a_cache_holds_a_key_and_a_value_per_token_and_layer(name):
    config = load_config(name).model
    for context in (CONTEXTS[0], CONTEXTS[-1]):
        expected = config.num_layers * context * 2 * config.width * BFLOAT
        assert parts(config, context)[0] == expected


def test_rat_keeps_a_sixteenth_of_a_cache():
    config = load_config("rat_1b3").model
    for context in (CONTEXTS[0], CONTEXTS[-1]):
        slots = 24 * 2 * (context // 16) * 2048 * BFLOAT
        assert parts(config, context)[0] == slots + 24 * 2 * 2048 * FLOAT


def test_states_of_float32_models_are_no_smaller():
    config = load_config("based_360m").model
    assert parts(config, 1024, jnp.float32)[0] > parts(config, 1024)[0]


def test_every_model_stands_in_the_page():
    page = (ROOT / "docs/results/state_bytes.md").read_text()
    for name in MODELS:
        config = model_config(name)
        cells = [readable(sum(parts(config, context))) for context in CONTEXTS[:2]]
        assert f"| {name} | {' | '.join(cells)} |" in page
