"""Layers inside plain jax transforms, the scanned stack, published sizes and the import bar."""

import functools
import importlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models.based import BasedModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.decoder import REMAT, UNROLLED_LAYERS, Group, plan_groups
from effattn.nn.layers import RMSNorm
from effattn.nn.mixer import state_bytes
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.based import BasedConfig
from effattn.nn.mixers.short_conv import ShortConvConfig
from effattn.nn.param import parameter_axes
from effattn.nn.rotary import rotary_tables, rotate
from effattn.parallel.sequence import SequenceConfig


def build(config, *args, **kwargs) -> nnx.Module:
    """The module of `config`, its parameters drawn by numpy: initialisation is slow to compile."""
    make = functools.partial(config.build, *args, **kwargs)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype),
            nnx.to_pure_dict(state),
        ),
    )


@jax.jit
def apply(layer, x, info):
    """The layer's output."""
    return layer(x, info)[0]


def small_based(**options) -> BasedModelConfig:
    sizes = {"num_layers": 6, "width": 16, "num_heads": 2, "feature_dim": 4, "window": 3}
    return BasedModelConfig(**{**sizes, **options})


# ---- the plan of a stack


def test_the_plan_has_the_fewest_distinct_positions():
    assert plan_groups("aaaa") == (Group(("a",), 4),)
    assert plan_groups("abcabcc") == (Group(tuple("abc"), 2), Group(("c",), 1))
    assert plan_groups("abababb") == (Group(tuple("ab"), 3), Group(("b",), 1))
    published = "clwcc" * 5 + "cc"
    assert plan_groups(published) == (Group(tuple("clwcc"), 5), Group(("c",), 2))


@pytest.mark.parametrize("layers", ["a", "abc", "abcabcabc", "aabbaabb", "abbabba", "cabababd"])
def test_the_plan_spells_the_layers(layers):
    spelled = "".join("".join(g.pattern) * g.repeats for g in plan_groups(layers))
    assert spelled == layers


@pytest.mark.parametrize("num_layers", [3, UNROLLED_LAYERS + 2])
def test_a_stack_computes_its_layers_one_after_another(num_layers):
    config = small_based(num_layers=num_layers, pattern=("conv", "window"))
    tokens = jnp.arange(10).reshape(2, 5)
    info = whole_rows(tokens)

    def by_hand(model):
        x, first = model.embedding(tokens), 0
        for group in model.stack.plan:
            for repeat in range(group.repeats):
                for place in range(len(group.pattern)):
                    block = model.stack.blocks[first + place]
                    x, _ = jax.tree.map(lambda leaf, r=repeat: leaf[r], block)(x, info)
            first += len(group.pattern)
        return model.final_norm(x)

    both = jax.jit(lambda model: (model(tokens, info).hidden, by_hand(model)))
    np.testing.assert_allclose(*both(build(config, vocab_size=11)), atol=1e-5)


@pytest.mark.parametrize(("kind", "policies"), [("window", REMAT[1:]), ("linear", ["names"])])
def test_remat_policies_give_equal_losses_and_gradients(kind, policies):
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    info = whole_rows(tokens)

    def loss_and_gradients(remat: str):
        model = build(small_based(remat=remat, num_layers=2, pattern=(kind,)), vocab_size=11)

        @jax.jit
        @jax.value_and_grad
        def loss(model):
            return jnp.sum(jax.nn.logsumexp(model.logits(model(tokens, info).hidden), axis=-1))

        value, gradients = loss(model)
        return [value, *jax.tree.leaves(gradients)]

    plain = loss_and_gradients("none")
    for remat in policies:
        pairs = zip(loss_and_gradients(remat), plain, strict=True)
        for got, wanted in pairs:
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=remat)


@pytest.mark.slow
def test_full_remat_saves_memory_unrolled_and_scanned():
    tokens = jnp.zeros((4, 64), jnp.int32)
    info = whole_rows(tokens)

    def temporary_bytes(remat: str, num_layers: int) -> int:
        config = small_based(remat=remat, num_layers=num_layers, width=32, pattern=("conv",))
        model = nnx.eval_shape(lambda: config.build(vocab_size=11, rngs=nnx.Rngs(0)))
        gradient = jax.grad(lambda model: jnp.sum(model(tokens, info).hidden ** 2))
        return jax.jit(gradient).lower(model).compile().memory_analysis().temp_size_in_bytes

    for num_layers in (UNROLLED_LAYERS, UNROLLED_LAYERS + 2):
        assert temporary_bytes("full", num_layers) < 0.5 * temporary_bytes("none", num_layers)


# ---- plain jax on modules


@pytest.mark.parametrize(
    "config", [AttentionConfig(), BasedConfig(feature_dim=4), ShortConvConfig()]
)
def test_a_layer_works_inside_plain_jit_grad_and_vmap(config):
    layer = build(config, 16)
    x = jax.random.normal(jax.random.key(0), (3, 2, 5, 16))
    info = whole_rows(x[0])
    y = jax.jit(jax.vmap(apply, in_axes=(None, 0, None)))(layer, x, info)
    np.testing.assert_allclose(y[1], apply(layer, x[1], info), atol=1e-5)
    gradients = jax.jit(jax.grad(lambda layer: jnp.sum(apply(layer, x[0], info) ** 2)))(layer)
    assert type(gradients) is type(layer)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_a_given_state_is_where_a_call_starts_from():
    layer = build(BasedConfig(feature_dim=4), 16)
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    info = whole_rows(x)
    head, tail = (TokenInfo(*(f[:, part] for f in info)) for part in (slice(3), slice(3, 7)))
    state = jax.jit(lambda layer: layer.prefill(x[:, :3], head, layer.init_state(2, 7, x.dtype))[1])
    y, _ = jax.jit(lambda layer, state: layer(x[:, 3:], tail, state=state))(layer, state(layer))
    np.testing.assert_allclose(y, apply(layer, x, info)[:, 3:], atol=1e-6)


def test_every_parameter_names_its_axes():
    abstract = nnx.state(
        nnx.eval_shape(lambda: small_based(tied=False).build(vocab_size=11, rngs=nnx.Rngs(0)))
    )
    axes = parameter_axes(abstract)
    assert axes["embedding"]["table"] == ("vocab", "embed")
    assert axes["head"]["kernel"] == ("embed", "vocab")
    assert axes["stack"]["blocks"][1]["mixer"]["query"]["kernel"] == ("layers", "embed", "heads")
    assert axes["stack"]["blocks"][2]["mixer"]["key"]["kernel"] == ("layers", "embed", "kv_heads")
    assert axes["stack"]["blocks"][0]["mixer"]["conv"]["kernel"] == ("layers", None, "conv")
    assert axes["final_norm"]["scale"] == ("embed",)
    with pytest.raises(ValueError, match=r"parameter nameless: .* got None"):
        parameter_axes(nnx.State({"nameless": nnx.Param(jnp.zeros(3))}))


# ---- attention's options


def test_grouped_heads_equal_repeated_heads():
    grouped = build(AttentionConfig(num_heads=4, num_kv_heads=2), 16)
    single = build(AttentionConfig(num_heads=4, num_kv_heads=1), 16)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    for layer, num_kv_heads in ((grouped, 2), (single, 1)):
        full = build(AttentionConfig(num_heads=4), 16)
        full.query, full.out = layer.query, layer.out
        for name in ("key", "value"):
            kernel = getattr(layer, name).kernel[...].reshape(16, num_kv_heads, 1, 4)
            kernel = jnp.broadcast_to(kernel, (16, num_kv_heads, 4 // num_kv_heads, 4))
            getattr(full, name).kernel = nnx.Param(kernel.reshape(16, 16))
        got, wanted = apply(layer, x, whole_rows(x)), apply(full, x, whole_rows(x))
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_window_sees_so_many_tokens_to_the_left():
    layer = build(AttentionConfig(num_heads=2, window=3), 8)
    x = jax.random.normal(jax.random.key(0), (1, 9, 8))
    jacobian = jax.jit(jax.jacrev(lambda x: apply(layer, x, whole_rows(x))[0, :, 0]))
    sensitivity = jacobian(x)[:, 0]
    sees = np.any(np.asarray(sensitivity) != 0, axis=-1)
    distance = np.arange(9)[:, None] - np.arange(9)
    np.testing.assert_array_equal(sees, (distance >= 0) & (distance <= 3))


def test_a_prompt_longer_than_the_cache_is_refused():
    layer = build(AttentionConfig(num_heads=2), 8)
    x = jnp.zeros((1, 9, 8))
    with pytest.raises(ValueError, match="prefill: got 9 tokens, expected at most max_len=8"):
        layer.prefill(x, whole_rows(x), layer.init_state(1, 8, x.dtype))


def test_rotary_scores_depend_on_distance_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = (rotary_tables(jnp.full((1, 1), p), 6, 10000.0) for p in (i, j))
        turned = [rotate(a, tables) for a, tables in zip((x, y), at, strict=True)]
        return jnp.sum(turned[0] * turned[1])

    np.testing.assert_allclose(score(3, 1), score(1003, 1001), atol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rotary_pairs_are_half_a_head_apart():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    turned = rotate(x, rotary_tables(jnp.ones((1, 1), jnp.int32), 8, 10000.0))[0, 0, 0]
    np.testing.assert_allclose(
        turned, np.eye(8)[0] * np.cos(1) + np.eye(8)[4] * np.sin(1), atol=1e-6
    )


def test_rotary_angles_stay_exact_in_bfloat16():
    tables = rotary_tables(jnp.asarray([[257]]), 4, 10000.0, jnp.bfloat16)
    np.testing.assert_allclose(tables[0][0, 0, 0, 0], np.cos(257.0), atol=1e-5)


def test_rms_norm_takes_its_statistics_in_float32():
    norm = RMSNorm(256, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.full((1, 256), 300.0, jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(norm(x), np.float32), 1.0, atol=1e-2)
    assert norm(x).dtype == jnp.bfloat16


# ---- models


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_float32_and_exactly_the_vocabulary(tied):
    config = TransformerConfig(num_layers=1, width=16, num_heads=2, tied=tied)
    tokens = jnp.zeros((2, 3), jnp.int32)

    def run():
        model = config.build(vocab_size=13, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        hidden = model(tokens, whole_rows(tokens)).hidden
        return model, hidden, model.logits(hidden)

    model, hidden, logits = jax.eval_shape(run)
    assert hidden.dtype == jnp.bfloat16
    assert logits.shape == (2, 3, 13) and logits.dtype == jnp.float32
    assert model.embedding.table.shape == (16, 16)


def test_a_token_outside_the_table_gives_nan():
    model = build(small_based(num_layers=1, pattern=("conv",)), vocab_size=11)
    assert np.all(np.isnan(model.embedding(jnp.asarray([[16]]))))


def test_parameters_start_as_the_paper_says():
    config = small_based(num_layers=2, width=64, pattern=("conv",))
    params = jax.jit(lambda: nnx.state(config.build(vocab_size=256, rngs=nnx.Rngs(0))))()
    block = nnx.to_pure_dict(params)["stack"]["blocks"][0]
    mixer, mlp = block["mixer"], block["mlp"]
    for kernel in (mixer["inner"], mixer["gate"], mlp["up"], mlp["gate"]):
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02, rtol=0.05)
    for kernel in (mixer["out"], mlp["down"]):  # they write to the residual stream
        np.testing.assert_allclose(np.std(kernel["kernel"]), 0.02 / 4**0.5, rtol=0.05)
    bound = np.max(np.abs(mixer["conv"]["kernel"]))
    assert 0.95 * 3**-0.5 < bound <= 3**-0.5
    assert not np.any(mixer["inner"]["bias"]) and np.all(block["mixer_norm"]["scale"] == 1)
    table = nnx.to_pure_dict(params)["embedding"]["table"]
    np.testing.assert_allclose(np.std(table), 0.02, rtol=0.05)
    layers = mixer["inner"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])


PUBLISHED = {  # millions of parameters
    "based_360m": 362.6,
    "based_1b3": 1349.5,
    "transformer_360m": 360,
    "transformer_1b3": 1327,
}


@functools.cache
def published_model(name: str) -> nnx.Module:
    config = importlib.import_module(f"effattn.configs.{name}").get_config().model
    return nnx.eval_shape(lambda: config.build(vocab_size=50257, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameter_counts(name):
    leaves = jax.tree.leaves(nnx.state(published_model(name)))
    count = sum(leaf.size for leaf in leaves) / 1e6
    assert abs(count / PUBLISHED[name] - 1) < (1e-3 if name.startswith("based") else 0.01)


def test_state_bytes_are_those_of_the_packed_features_and_the_window():
    model = published_model("based_360m")
    linear = 5 * (16 * (64 * 153 + 153) * 4 + 4)  # float32 sums, one segment number
    window = 5 * (129 * (2 * 1024 * 2 + 2 * 4) + 4)  # bfloat16 keys and values, two numbers a slot
    conv = 17 * (2 * 2048 * 2 + 4)
    for max_len in (2048, 65536):
        assert state_bytes(model, 1, max_len, jnp.bfloat16) == linear + window + conv


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "width: got 16, expected a multiple of num_heads=3"),
        ({"num_kv_heads": 3, "num_heads": 4}, "num_heads: got 4, .* num_kv_heads=3"),
        ({"head_dim": 3}, "rotary_dim: got 3"),
        ({"pattern": ("conv", "liner")}, "model.pattern: got 'liner', .* did you mean linear"),
        ({"pattern": ()}, r"len\(model.pattern\): got 0"),
        ({"num_layers": 0}, "model.num_layers: got 0"),
        ({"remat": "most"}, "remat: got 'most'"),
        ({"window": -1}, "window: got -1"),
    ],
)
def test_a_config_that_does_not_fit_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        config = small_based(**options)
        nnx.eval_shape(lambda: config.build(vocab_size=11, rngs=nnx.Rngs(0)))


def test_an_unknown_sequence_layout_is_refused():
    with pytest.raises(ValueError, match="sequence.kind: got 'rings'"):
        SequenceConfig(kind="rings").build()


IMPORTS = """
import json, sys, time
import flax.nnx
before = time.process_time()
import effattn.nn.mixers.based
seconds = time.process_time() - before
from jax._src import xla_bridge
late = ["jax.experimental.pallas", "orbax", "grain", "scipy", "matplotlib"]
print(json.dumps([seconds, [m for m in late if m in sys.modules], bool(xla_bridge._backends)]))
"""


def test_a_mixer_imports_lightly_and_touches_no_device():
    def measure() -> list:
        run = [sys.executable, "-c", IMPORTS]
        return json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    seconds, heavy, backends = measure()
    assert heavy == [] and not backends
    # Of this process alone, whatever else the machine does; a cold disk costs some at first.
    assert seconds <= 0.2 or measure()[0] <= 0.2
