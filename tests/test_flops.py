"""FLOP counts against sums done by hand."""

import pkgutil

import jax.numpy as jnp
import numpy as np
import pytest

from effattn.masks import Causal, Window
from effattn.models.aaren import AarenModelConfig
from effattn.models.based import BasedModelConfig
from effattn.models.lightning import LightningModelConfig
from effattn.models.mamba2 import Mamba2Config
from effattn.models.nat import NATConfig
from effattn.models.rat import RATModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.train.flops import COUNTS, flops_by_part, forward_flops, training_flops
from effattn.train.layer_flops import mean_visible


@pytest.mark.parametrize("seq_len", [1, 7, 32])
@pytest.mark.parametrize("window", [None, 0, 1, 5, 31, 32, 100])
def test_visible_keys_are_those_the_mask_allows(seq_len, window):
    mask = Causal() if window is None else Causal() & Window(left=window)
    positions = np.arange(seq_len)
    allowed = mask.allowed(positions[:, None], positions[None, :])
    assert mean_visible(seq_len, window) == allowed.sum() / seq_len


def test_transformer():
    """Two layers of width 8, 2 query heads and 1 kv head of 4, MLP 16, 10 tokens, vocabulary 11."""
    config = TransformerConfig(num_layers=2, width=8, num_heads=2, num_kv_heads=1, mlp_width=16)
    query_and_output, key_and_value = 2 * (2 * 8 * 8), 2 * (2 * 8 * 4)
    pairs = 2 * 5.5 * (2 * 8)  # scores and values, 5.5 keys, 2 heads of 4
    mlp = 3 * 2 * 8 * 16
    layer = query_and_output + key_and_value + pairs + mlp
    assert forward_flops(config, vocab_size=11, seq_len=10) == 2 * layer + 2 * 8 * 11
    assert training_flops(config, vocab_size=11, seq_len=10) == 3 * (2 * layer + 2 * 8 * 11)


def test_transformer_with_a_window_counts_its_pairs_only():
    wide = TransformerConfig(num_layers=1, width=8, num_heads=2, mlp_width=16)
    narrow = TransformerConfig(num_layers=1, width=8, num_heads=2, mlp_width=16, window=2)
    full, windowed = (forward_flops(c, vocab_size=11, seq_len=10) for c in (wide, narrow))
    # 1 + 2 + 8 x 3 = 27 pairs instead of 55, over 10 tokens.
    assert full - windowed == pytest.approx(4 * 8 * (5.5 - 2.7))


def test_based():
    """One layer of each kind: width 8, 2 heads of 4, features of 3, MLP 16, 10 tokens."""
    config = BasedModelConfig(
        num_layers=3, width=8, num_heads=2, feature_dim=3, window=2, conv_kernel=3, conv_expand=4
    )
    mlp = 3 * 2 * 8 * 16
    conv = 3 * (2 * 8 * 16) + 2 * 3 * 16  # inner 16: to both halves and back, 3 taps
    features = 1 + 3 + 6
    linear = 2 * (2 * 8 * 6) + 2 * (2 * 8 * 8) + 2 * (2 * 2 * features * 4 + 2 * features)
    window = 4 * (2 * 8 * 8) + 2 * 2.7 * (2 * 8)
    want = conv + linear + window + 3 * mlp + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=10) == pytest.approx(want)


def test_a_prefix_layer_adds_a_second_key_and_value_of_the_prefix():
    """4 of 10 tokens, width 8, 2 heads of 4, features of 3."""
    sizes = dict(num_layers=1, width=8, num_heads=2, feature_dim=3, enc_length=4)
    linear, prefix = (
        forward_flops(BasedModelConfig(pattern=(kind,), **sizes), vocab_size=11, seq_len=10)
        for kind in ("linear", "prefix")
    )
    added = 2 * 8 * 6 + 2 * 8 * 8 + 2 * 2 * (1 + 3 + 6) * 4
    assert prefix - linear == pytest.approx(0.4 * added)


def test_lightning():
    """Layers with LRPE, without, and softmax: width 8, 2 heads of 4, MLP 16, 10 tokens."""
    config = LightningModelConfig(
        num_layers=3,
        width=8,
        num_heads=2,
        mlp_width=16,
        pattern=("lightning", "lightning", "softmax"),
    )
    mlp = 3 * 2 * 8 * 16
    lightning = 5 * (2 * 8 * 8) + 2 * (4 * 4 * 4)
    lrpe = lightning + 2 * (4 * 4 * 4)  # keys twice as wide
    softmax = 4 * (2 * 8 * 8) + 2 * 5.5 * (2 * 8)
    want = lrpe + lightning + softmax + 3 * mlp + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=10) == want


def test_mamba2():
    """One layer of width 8: inner width 16 in 4 heads of 4, a state of 6 channels."""
    config = Mamba2Config(num_layers=1, width=8, head_dim=4, state_dim=6)
    projections = 2 * 8 * (16 + 16 + 6 + 6 + 4) + 2 * 16 * 8
    conv = 2 * 4 * (16 + 6 + 6)
    state = 4 * 4 * 4 * 6
    want = projections + conv + state + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=10) == want


def test_aaren():
    """A convolution and an Aaren layer of width 8, 2 heads of 4, MLP 32."""
    config = AarenModelConfig(num_layers=2, width=8, num_heads=2, pattern=("conv", "aaren"))
    conv = 3 * (2 * 8 * 16) + 2 * 3 * 16
    aaren = 2 * 8 * (2 + 8 + 8) + 4 * 2 * 4
    want = conv + aaren + 2 * (2 * 2 * 8 * 32) + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=10) == want


def test_rat():
    """A RAT and a local layer of width 8, 4 heads of 2 in 2 groups, chunks of 4, 10 tokens."""
    sizes = dict(num_layers=2, width=8, num_heads=4, chunk_size=4, window=2)
    config = RATModelConfig(pattern=("rat", "local"), **sizes)
    rat = 2 * 8 * (4 * 8 + 2 * 4) + 4 * 8
    rat += 4 * 8 * (4 * 1 + 4 * 2 + 2 * 3) / 10  # slots of the tokens of each chunk
    local = 4 * (2 * 8 * 8) + 4 * 8 * 2.7
    want = rat + local + 2 * (2 * 2 * 8 * 32) + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=10) == pytest.approx(want)


def test_nat():
    """4 x 6 images through a stem of stride 1 to a width of 4, then 2 x 3 places of width 8."""
    config = NATConfig(
        axes=(4, 6), channels=1, depths=(1, 2), width=8, head_dim=4, window=3, stem_strides=(1,)
    )
    stem, downsampling = 24 * 2 * 9 * 4, 6 * 2 * 9 * 4 * 8
    first = 24 * (4 * 2 * 4 * 4 + 2 * 2 * 4 * 12 + 4 * 4 * 9)
    second = 6 * (4 * 2 * 8 * 8 + 2 * 2 * 8 * 24 + 4 * 8 * 6)  # windows of 2 x 3
    want = (stem + first + downsampling + 2 * second) / 24 + 2 * 8 * 11
    assert forward_flops(config, vocab_size=11, seq_len=24) == pytest.approx(want)


def test_projections_agree_with_the_parameters():
    """Without pairs and states, a forward pass is twice the matrices: ours and the model's own."""
    from effattn.experiment import Experiment
    from effattn.train.state import abstract_model

    config = TransformerConfig(num_layers=3, width=16, num_heads=4, num_kv_heads=2, window=0)
    model = abstract_model(Experiment(model=config), 24)
    sizes = [model.params["embedding"]["table"].size]  # tied: the head
    sizes += [kernel.size for kernel in _kernels(model.params["stack"]) if jnp.ndim(kernel) == 3]
    pairs = 3 * 4 * 16  # every token sees itself
    assert forward_flops(config, vocab_size=24, seq_len=4) == 2 * sum(sizes) + pairs


def _kernels(tree):
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _kernels(branch)]
    return [tree]


def test_a_model_nobody_counted_has_no_figure_or_its_own():
    class Own:
        def flops_by_part(self, *, vocab_size, seq_len):
            return (("layer", 1, "mlp", vocab_size), ("head", 1, "logits", seq_len))

    assert forward_flops(object(), vocab_size=2, seq_len=3) is None
    assert training_flops(Own(), vocab_size=2, seq_len=3) == 15


def test_every_model_of_the_package_is_counted():
    from effattn.models import MODELS

    for target in MODELS.values():
        config = pkgutil.resolve_name(target)
        assert config.__name__ in COUNTS or hasattr(config, "flops_by_part"), target


# Configs of models whose every matrix meets every token once (Aaren folds its queries away).
STACKS = [
    "based_360m",
    "lightning_7b",
    "mamba2_1b3",
    "rat_1b3",
    "tokenformer_stdlib",
    "transformer_1b3",
]


@pytest.mark.parametrize("name", STACKS)
def test_parts_that_read_weights_are_twice_the_weights(name):
    from effattn.config import load_config
    from effattn.train.state import abstract_model

    experiment = load_config(name)
    model = abstract_model(experiment, 24)
    sizes = [leaf.size for leaf in _kernels(model.params["stack"]) if jnp.ndim(leaf) == 3]
    read = {"projections", "convolution", "mlp"}
    parts = flops_by_part(experiment.model, vocab_size=24, seq_len=64)
    assert sum(p.flops for p in parts if p.part in read) == 2 * sum(sizes)
    assert parts[-1] == ("head", 1, "logits", 2 * experiment.model.width * 24)
    assert sum(p.layers for p in parts if p.part == "projections") == experiment.model.num_layers


@pytest.mark.parametrize("arch", ["1stage_XL", "2stage_XL"])
def test_layers_of_an_hnet_are_those_of_its_stages(arch):
    from effattn.config import load_config

    config = load_config(f"hnet:{arch}").model
    parts = flops_by_part(config, vocab_size=256, seq_len=8192)
    counted: dict[str, int] = {}
    for part in parts:
        counted[part.layer] = part.layers
    wanted = sum(len(stage.encoder) + len(stage.decoder) for stage in config.stages())
    assert sum(n for name, n in counted.items() if name.endswith(("attention", "ssd"))) == wanted
    assert min(part.flops for part in parts) > 0


def test_streams_of_parscale_read_the_base_as_often():
    from effattn.config import load_config

    config = load_config("parscale_1b8").model
    sizes = {"vocab_size": 24, "seq_len": 64}
    base, all_streams = (flops_by_part(c, **sizes) for c in (config.base, config))
    for part in base[:-1]:
        assert part._replace(flops=config.streams * part.flops) in all_streams
    assert all_streams[-1] == base[-1]
