"""Laws that every registered mixer and model keeps, and mutants that each law must catch.

A mixer or model is tested by being listed in MIXERS or MODELS. Parameters are redrawn from
N(0, 0.3), so that a layer whose output starts near zero hides nothing. One batch has a row for
every split of its tokens, so that "for every n" costs one compiled call.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effattn.batch import TokenInfo, whole_rows
from effattn.models import MODELS
from effattn.models.based import BasedModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.compact import CapacityConfig
from effattn.nn.mixers import MIXERS
from effattn.nn.moe import ExpertsConfig
from effattn.nn.param import parameter_axes

LEN, WIDTH, VOCAB = 13, 32, 29
ROWS = LEN + 1  # row r is split after r tokens
SEGMENTS = (5, 1, 7)  # lengths of the documents in a packed row
# float32 sums in another order: up to 1e-6 of the largest output was measured.
TOLERANCE = 2e-5
# Relative to the norm of the output; 0.4% to 0.9% was measured, weights and activations rounded to
# 8 bits.
BFLOAT16_TOLERANCE = 0.02
# Small sizes and options beside the defaults; a registered name without an entry gets none.
SMALL = {
    "aaren": {"num_heads": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "based": {"num_heads": 4, "feature_dim": 4, "chunk_size": 4},
    "delta": {"num_heads": 4, "chunk_size": 4},
    "gla": {"num_heads": 4, "gate_rank": 3, "chunk_size": 4},
    "jrt": {"num_heads": 4, "feature_dim": 4, "chunk_size": 4, "enc_length": 4},
    "lightning": {"num_heads": 4, "layer": 1, "num_layers": 4, "chunk_size": 4},
    "neighborhood": {"window": (3,), "stride": (2,), "dilation": (2,), "num_kv_heads": 2},
    "ponet": {"num_heads": 4, "num_segments": 3},
    "rat": {"num_heads": 4, "chunk_size": 4},
    "routing": {"num_heads": 4, "num_clusters": 3, "window": 2},
    "ssd": {"head_dim": 8, "state_dim": 6, "num_groups": 2, "chunk_size": 4},
}
SMALL_MODELS = {
    "aaren": {"num_layers": 2, "num_heads": 4, "pattern": ("conv", "aaren")},
    "rat": {
        "num_layers": 2,
        "num_heads": 4,
        "pattern": ("rat", "local"),
        "chunk_size": 4,
        "window": 3,
    },
    # A hybrid; its first layer has LRPE.
    "lightning": {"num_layers": 2, "num_heads": 4, "pattern": ("lightning", "softmax")},
    "mamba2": {"num_layers": 2, "head_dim": 8, "state_dim": 6, "num_groups": 2},
    "tokenformer": {"num_layers": 2, "num_heads": 4, "mlp_slots": 40},
    "hnet": {
        "layout": '["m1", ["t1", ["T1"], "t1"], "m1"]',
        "inner_widths": (32, 40),
        "windows": (None, 2, None),
        "targets": (2.0, 2.0),
        "state_dim": 6,
        "ssm_head_dim": 16,
    },
    "adaptive_width": {"num_layers": 2, "num_heads": 4, "mlp_width": 48, "gate_width": 8},
    # Deleted tokens would leave the gate without a gradient.
    "mrt5": {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "gate_layer": 1,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_width": 40,
        "source_length": 4,
        "deletion": "soft",
    },
    "routing": {"num_layers": 2, "num_heads": 2, "window": 3, "num_clusters": 2},
    # Tokens 9 to 13 are white space.
    "word_pooled": {
        "encoder_layers": 1,
        "num_layers": 2,
        "decoder_layers": 1,
        "num_heads": 4,
        "backbone_width": 40,
        "backbone_heads": 4,
        "longest_word": 3,
        "cls_slots": 2,
    },
    "transformer": {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "tied": False},
    "based": {"num_layers": 3, "num_heads": 4, "feature_dim": 4, "window": 3},
    # Two shared layers, three times; one row's tokens stop at different depths.
    "moe": {
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "dense_layers": 1,
        "experts": ExpertsConfig(
            count=5, top_k=2, mlp_width=20, shared=1, score="sigmoid", routing="capacity"
        ),
    },
    "mor": {"num_layers": 8, "num_heads": 4, "num_kv_heads": 2},
    "parscale": {
        "base": TransformerConfig(
            num_layers=2, width=WIDTH, num_heads=4, num_kv_heads=2, window=3, qkv_bias=True
        ),
        "prefix_length": 3,
    },
    "nat": {
        "axes": (1, LEN),
        "channels": 1,
        "depths": (1, 1),
        "head_dim": 8,
        "window": 3,
        "stem_strides": (1,),
    },
}
VARIANTS = {
    "elu": ("based", {"num_heads": 4, "feature_dim": 4, "feature_map": "elu", "chunk_size": 4}),
    "elu_prefix": (
        "jrt",
        {"num_heads": 4, "feature_dim": 4, "feature_map": "elu"} | {"enc_length": 4},
    ),
    "simple_gla": ("gla", {"num_heads": 4, "gate": "scalar"}),
    "model:duo": (
        "model:adaptive_width",
        {"num_layers": 2, "num_heads": 4, "mlp": "duo", "mlp_width": 48},
    ),
    "retention": ("gla", {"num_heads": 4, "gate": "retention", "rotary_base": 10000.0}),
    "lrpe": ("lightning", {"num_heads": 3, "head_dim": 4, "slopes": "paper", "lrpe": True}),
    "low_rank_lightning": ("lightning", {"num_heads": 4, "version": 2, "slopes": "fla"}),
    "window": (
        "attention",
        {"num_heads": 4, "num_kv_heads": 1, "window": 3, "qk_norm": True, "soft_cap": 5.0},
    ),
    "top_routing": (
        "routing",
        {"num_heads": 4, "num_clusters": 3, "membership": "top", "window": 4},
    ),
    "gated_delta": (
        "delta",
        {"num_key_heads": 2, "value_dim": 6, "gated": True, "negative_eigenvalues": True},
    ),
    # Two layers that see the prefix: what reaches it in the first comes out in the second.
    "model:jrt": (
        "model:based",
        {"num_layers": 3, "pattern": ("prefix", "window", "prefix"), "enc_length": 4}
        | {"num_heads": 4, "feature_dim": 4, "window": 3},
    ),
    # Streams over layers without a start, with keys and values added to sums, and to a window.
    "model:parscale_based": (
        "model:parscale",
        {
            "base": BasedModelConfig(
                num_layers=3, width=WIDTH, num_heads=4, feature_dim=4, window=3
            ),
            "prefix_length": 3,
        },
    ),
    "model:mor_token": (
        "model:mor",
        {"num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "routing": "token", "alpha": 1.0}
        | {"evaluation_capacity": CapacityConfig(mode="bucket")},
    ),
    "model:mor_shared_keys": (
        "model:mor",
        {"num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "sharing": "cycle", "kv": "shared"}
        | {"update_cache": True, "capacities": (0.9, 0.5, 0.3), "router": "mlp"},
    ),
    "model:recursive": (
        "model:mor",
        {"num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "routing": "none"}
        | {"sharing": "middle_sequence", "num_recursions": 2},
    ),
    # Chunks by rule; of these tokens 9 to 13 are white space.
    "model:words": (
        "model:hnet",
        {"layout": '["t1", ["T1"], "m1"]', "segmenter": "words", "longest_word": 3}
        | {"state_dim": 6, "ssm_head_dim": 16},
    ),
    # A grid read row by row, of which a row of tokens is the beginning.
    "causal_grid": ("neighborhood", {"axes": (3, 5), "window": (2, 3)}),
    "grid": ("neighborhood", {"axes": (3, 5), "window": (3, 2), "causal": (False,)}),
}
CASES = [*MIXERS, *VARIANTS, *(f"model:{name}" for name in MODELS)]


class ModelAsMixer:
    """A model seen as a mixer from tokens to logits, so that one law reads both."""

    def __init__(self, model: Any):
        self.model = model
        if getattr(model, "decodes", True):
            self.init_state, self.prefill, self.step = model.init_state, model.prefill, model.step

    def __call__(self, tokens: jax.Array, info: TokenInfo) -> tuple[jax.Array, None]:
        return self.model.logits(self.model(tokens, info).hidden), None


def build(case: str, dtype: Any, **more: Any) -> nnx.Module:
    """more: `sequence`, and fields of the config that take the place of the small ones."""
    kwargs = {"dtype": dtype, "rngs": nnx.Rngs(0)}
    kwargs |= {"sequence": more.pop("sequence")} if "sequence" in more else {}
    name, options = VARIANTS.get(case, (case, None))
    if name.startswith("model:"):
        name = name.removeprefix("model:")
        options = SMALL_MODELS.get(name, {}) if options is None else options
        width = {} if "base" in options else {"width": WIDTH}
        config = pkgutil.resolve_name(MODELS[name])(**{**width, **options, **more})
        return config.build(vocab_size=VOCAB, **kwargs)
    options = SMALL.get(name, {}) if options is None else options
    return pkgutil.resolve_name(MIXERS[name])(**{**options, **more}).build(WIDTH, **kwargs)


class Subject:
    """A mixer or model with drawn parameters, and its jitted routes; `mutate` plants a fault."""

    def __init__(self, case: str, mutate: Callable[[Any], Any] = lambda mixer: mixer):
        abstract = nnx.eval_shape(lambda: build(case, jnp.float32))
        self.causal, self.decodes, self.packs = (
            getattr(abstract, name, True) for name in ("causal", "decodes", "packs")
        )
        self.chooses = getattr(abstract, "chooses", False)
        self.untrained = getattr(abstract, "untrained", ())  # moved by other means than gradients
        # One that is causal beyond a prefix is asked wherever the prefix lies before the split.
        self.prefix_length = getattr(abstract, "prefix_length", 0)
        self.causal = self.causal or self.prefix_length > 0
        graphdef, state = nnx.split(abstract)
        leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
        draw = np.random.default_rng(0)
        self.params = tree.unflatten(
            [draw.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
        )
        shape = (ROWS, LEN)
        if case.startswith("model:"):
            self.x = draw.integers(0, VOCAB, shape, dtype=np.int32)
            self.other = (self.x + draw.integers(1, VOCAB, shape, dtype=np.int32)) % VOCAB
        else:
            self.x = draw.normal(size=(*shape, WIDTH)).astype(np.float32)
            self.other = draw.normal(size=self.x.shape).astype(np.float32)
        half = nnx.graphdef(nnx.eval_shape(lambda: build(case, jnp.bfloat16)))

        def module(graphdef: nnx.GraphDef, params: Any) -> Any:
            built = nnx.merge(graphdef, params)
            return mutate(ModelAsMixer(built) if case.startswith("model:") else built)

        def full(graphdef: nnx.GraphDef, params: Any, x: jax.Array, info: TokenInfo) -> jax.Array:
            return module(graphdef, params)(x, info)[0]

        def loss(params: Any, x: jax.Array, info: TokenInfo) -> jax.Array:
            """A sum over valid tokens that no two tokens enter alike."""
            y = full(graphdef, params, x, info)
            weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return jnp.sum(jnp.where(info.valid[..., None], jnp.tanh(y) * weight, 0))

        self.full = jax.jit(functools.partial(full, graphdef))
        self.half = jax.jit(functools.partial(full, half))
        self.gradients = jax.jit(jax.grad(loss))
        self.decode = jax.jit(lambda params, *args: decode(module(graphdef, params), *args))


def decode(
    mixer: Any, x: jax.Array, info: TokenInfo, first: jax.Array, second: jax.Array, active: Any
) -> jax.Array:
    """Every token's output on the way prefill `first` tokens, prefill to `second`, then steps.

    first, second: [batch]. active: [steps, batch]; a row moves on only in its active steps, and
    is handed rubbish with valid=False in the others.
    """
    rows, index = jnp.arange(x.shape[0]), jnp.arange(LEN)
    state = mixer.init_state(x.shape[0], LEN, jnp.float32)
    y, state = mixer.prefill(x, info._replace(valid=index < first[:, None]), state)

    source = jnp.minimum(first[:, None] + index, LEN - 1)
    rest = jax.tree.map(lambda a: a[rows[:, None], source], (x, info))
    in_second = index < (second - first)[:, None]
    y_rest, state = mixer.prefill(rest[0], rest[1]._replace(valid=in_second), state)
    target = jnp.where(in_second, source, LEN)
    y = y.at[rows[:, None], target].set(y_rest, mode="drop")

    def move(carry: Any, active: jax.Array) -> tuple[Any, None]:
        state, place, y = carry
        active = active & (place < LEN)
        at = jnp.minimum(place, LEN - 1)
        x_t, info_t = jax.tree.map(lambda a: a[rows, at], (x, info))
        y_t, state = mixer.step(x_t, info_t._replace(valid=active), state)
        y = y.at[rows, jnp.where(active, place, LEN)].set(y_t, mode="drop")
        return (state, place + active, y), None

    (_, place, y), _ = jax.lax.scan(move, (state, second, y), active)
    return jnp.where((place == LEN)[:, None, None], y, jnp.nan)


def packed_info() -> TokenInfo:
    """Every row holds documents of SEGMENTS tokens."""
    positions = np.concatenate([np.arange(n) for n in SEGMENTS])
    numbers = np.repeat(np.arange(1, len(SEGMENTS) + 1), SEGMENTS)
    rows = (np.tile(a.astype(np.int32), (ROWS, 1)) for a in (positions, numbers))
    return TokenInfo(*rows, np.ones((ROWS, LEN), bool))


def prefix_in_one_piece(subject: Subject, info: TokenInfo, *, after: bool) -> np.ndarray:
    """[ROWS, LEN]: row r is split after r tokens; does the split leave t's prefix in one piece?

    after: whether a prefix that lies after the split counts as well.
    """
    positions, numbers = (np.asarray(field) for field in (info.positions, info.segment_ids))
    split = np.arange(ROWS)[:, None]
    index = np.arange(LEN)
    same = numbers[:, :, None] == numbers[:, None, :]
    in_prefix = same & (positions < subject.prefix_length)[:, None, :]
    before = ~np.any(in_prefix & (index >= split)[:, None, :], axis=2)
    return before | (after & ~np.any(in_prefix & (index < split)[:, None, :], axis=2))


def schedule() -> np.ndarray:
    """Which rows step when: each of them pauses now and then, and all of them arrive."""
    return np.random.default_rng(1).random((3 * LEN, ROWS)) < 0.6


def assert_close(got: jax.Array, wanted: jax.Array, tolerance: float = TOLERANCE) -> None:
    scale = max(1.0, float(np.max(np.abs(wanted))))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale)


# ---- the laws


def law_prefill_then_steps_equals_full_pass(subject: Subject) -> None:
    for info in (whole_rows(subject.x), packed_info()):
        full = subject.full(subject.params, subject.x, info)
        split = np.arange(ROWS)
        steps = subject.decode(subject.params, subject.x, info, split, split, schedule())
        asked = prefix_in_one_piece(subject, info, after=False)
        assert_close(np.asarray(steps)[asked], np.asarray(full)[asked])


def law_prefill_in_two_pieces_equals_one(subject: Subject) -> None:
    for info in (whole_rows(subject.x), packed_info()):
        full = subject.full(subject.params, subject.x, info)
        first, second = np.arange(ROWS), np.full(ROWS, LEN)
        pieces = subject.decode(subject.params, subject.x, info, first, second, schedule())
        asked = prefix_in_one_piece(subject, info, after=True)
        assert_close(np.asarray(pieces)[asked], np.asarray(full)[asked])


def law_packed_equals_unpacked(subject: Subject) -> None:
    packed = subject.full(subject.params, subject.x, packed_info())
    start = 0
    for length in SEGMENTS:
        alone = np.roll(subject.x, -start, axis=1)
        info = whole_rows(alone, np.full(ROWS, length))
        unpacked = subject.full(subject.params, alone, info)
        assert_close(packed[:, start : start + length], unpacked[:, :length])
        start += length


def law_future_tokens_do_not_change_past_outputs(subject: Subject) -> None:
    past = np.arange(LEN) < np.arange(ROWS)[:, None]  # row r changes from token r on
    changed = np.where(
        past.reshape(ROWS, LEN, *(1,) * (subject.x.ndim - 2)), subject.x, subject.other
    )
    for info in (whole_rows(subject.x), packed_info()):
        before = subject.full(subject.params, subject.x, info)
        after = subject.full(subject.params, changed, info)
        asked = past & prefix_in_one_piece(subject, info, after=False)
        np.testing.assert_array_equal(np.asarray(before)[asked], np.asarray(after)[asked])


def law_bfloat16_is_near_float32(subject: Subject) -> None:
    info = whole_rows(subject.x)
    full = np.asarray(subject.full(subject.params, subject.x, info), np.float64)
    half = np.asarray(subject.half(subject.params, subject.x, info), np.float64)
    if subject.chooses:  # a row in which a rounding tips a choice over is another row
        off, size = (np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (half - full, full))
        assert np.mean(off <= BFLOAT16_TOLERANCE * size) >= 0.75
        return
    assert np.linalg.norm(half - full) <= BFLOAT16_TOLERANCE * np.linalg.norm(full)


def law_gradients_are_finite(subject: Subject) -> None:
    # Row r has r valid tokens: the first has none at all.
    info = whole_rows(subject.x, np.arange(ROWS))
    gradients = subject.gradients(subject.params, subject.x, info)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), jax.tree_util.keystr(path)
        if path[-1].key not in subject.untrained:
            assert np.any(leaf), f"{jax.tree_util.keystr(path)} gets no gradient"


def law_microbatched_gradients_add_up(subject: Subject) -> None:
    info = whole_rows(subject.x)
    whole = subject.gradients(subject.params, subject.x, info)
    parts = []
    for first in range(3):
        mine = np.arange(ROWS)[:, None] % 3 == first
        part = subject.gradients(subject.params, subject.x, info._replace(valid=info.valid & mine))
        parts.append(part)
    jax.tree.map(lambda w, *p: assert_close(sum(p), w), whole, *parts)


# The property of a mixer that a law is about; a mixer without it is not asked.
NEEDS = {
    law_prefill_then_steps_equals_full_pass: "decodes",
    law_prefill_in_two_pieces_equals_one: "decodes",
    law_future_tokens_do_not_change_past_outputs: "causal",
    law_packed_equals_unpacked: "packs",
}
LAWS = [
    law_prefill_then_steps_equals_full_pass,
    law_prefill_in_two_pieces_equals_one,
    law_packed_equals_unpacked,
    law_future_tokens_do_not_change_past_outputs,
    law_bfloat16_is_near_float32,
    law_gradients_are_finite,
    law_microbatched_gradients_add_up,
]


@functools.cache
def subject(case: str) -> Subject:
    return Subject(case)


def law_cases() -> list[Any]:
    """Every law for every case. Those that compile a program of their own are slow, but for the
    mixers and models that the others are made of."""
    own_program = {
        law_bfloat16_is_near_float32,
        law_gradients_are_finite,
        law_microbatched_gradients_add_up,
    }
    always = {"attention", "based", "short_conv", "model:transformer", "model:based"}
    return [
        pytest.param(
            law,
            case,
            id=f"{law.__name__}-{case}",
            marks=pytest.mark.slow if law in own_program and case not in always else (),
        )
        for law in LAWS
        for case in CASES
    ]


@pytest.mark.parametrize(("law", "case"), law_cases())
def test_law(law: Callable[[Subject], None], case: str):
    it = subject(case)
    if law in NEEDS and not getattr(it, NEEDS[law]):
        pytest.skip(f"{case} declares {NEEDS[law]} = False")
    law(it)


# ---- the mutants: each breaks one promise, and the law that guards it must notice


class Mutant:
    def __init__(self, mixer: Any):
        self.mixer = mixer
        self.init_state = mixer.init_state

    def __call__(self, x: jax.Array, info: TokenInfo) -> tuple[jax.Array, None]:
        return self.mixer(x, info)

    def prefill(self, x: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        return self.mixer.prefill(x, info, state)

    def step(self, x_t: jax.Array, info: TokenInfo, state: Any) -> tuple[jax.Array, Any]:
        return self.mixer.step(x_t, info, state)


class OffByOnePosition(Mutant):
    def step(self, x_t, info, state):
        return self.mixer.step(x_t, info._replace(positions=info.positions + 1), state)


class StepIgnoresValid(Mutant):
    def step(self, x_t, info, state):
        return self.mixer.step(x_t, info._replace(valid=jnp.ones_like(info.valid)), state)


class PrefillForgets(Mutant):
    def prefill(self, x, info, state):
        return self.mixer.prefill(x, info, jax.tree.map(jnp.zeros_like, state))


class PrefillCountsPadding(Mutant):
    def prefill(self, x, info, state):
        return self.mixer.prefill(x, info._replace(valid=jnp.ones_like(info.valid)), state)


class MissingReset(Mutant):
    def __call__(self, x, info):
        return self.mixer(x, info._replace(segment_ids=jnp.ones_like(info.segment_ids)))


class LeakyMask(Mutant):
    def __call__(self, x, info):
        y, aux = self.mixer(x, info)
        return y + 1e-6 * jnp.roll(y, -1, axis=1), aux


class CoarseSums(Mutant):
    def __call__(self, x, info):
        y, aux = self.mixer(x, info)
        if y.dtype == jnp.bfloat16:
            y = y.astype(jnp.float8_e4m3fn).astype(y.dtype)
        return y, aux


class InfiniteSlope(Mutant):
    def __call__(self, x, info):
        y, aux = self.mixer(x, info)
        return y + jnp.sqrt(jnp.square(y - y)), aux


class RowsMeet(Mutant):
    def __call__(self, x, info):
        y, aux = self.mixer(x, info)
        return y * (1 + jnp.mean(info.valid)), aux


MUTANTS = [
    (law_prefill_then_steps_equals_full_pass, OffByOnePosition, "attention"),
    (law_prefill_then_steps_equals_full_pass, StepIgnoresValid, "attention"),
    (law_prefill_then_steps_equals_full_pass, StepIgnoresValid, "based"),
    (law_prefill_then_steps_equals_full_pass, StepIgnoresValid, "short_conv"),
    (law_prefill_then_steps_equals_full_pass, PrefillCountsPadding, "short_conv"),
    (law_prefill_in_two_pieces_equals_one, PrefillForgets, "short_conv"),
    (law_prefill_in_two_pieces_equals_one, PrefillForgets, "window"),
    (law_packed_equals_unpacked, MissingReset, "attention"),
    (law_packed_equals_unpacked, MissingReset, "based"),
    (law_packed_equals_unpacked, MissingReset, "short_conv"),
    (law_future_tokens_do_not_change_past_outputs, LeakyMask, "short_conv"),
    (law_bfloat16_is_near_float32, CoarseSums, "short_conv"),
    (law_gradients_are_finite, InfiniteSlope, "short_conv"),
    (law_microbatched_gradients_add_up, RowsMeet, "short_conv"),
]


@pytest.mark.parametrize(
    ("law", "mutant", "case"), MUTANTS, ids=[f"{m.__name__}-{c}" for _, m, c in MUTANTS]
)
def test_the_law_catches_the_mutant(law: Callable, mutant: type[Mutant], case: str):
    with pytest.raises(AssertionError):
        law(Subject(case, mutant))


def test_every_law_has_a_mutant():
    assert {law for law, _, _ in MUTANTS} == set(LAWS)


# ---- configs

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_eval_shape_builds_the_config(name: str):
    experiment = importlib.import_module(f"effattn.configs.{name}").get_config()
    vocab_size = 257 if experiment.data.vocab_size is None else experiment.data.vocab_size
    sequence = experiment.sequence.build()

    def make() -> nnx.Module:
        return experiment.model.build(vocab_size=vocab_size, sequence=sequence, rngs=nnx.Rngs(0))

    abstract = nnx.eval_shape(make)
    state = nnx.state(abstract)
    assert parameter_axes(state).keys() == nnx.to_pure_dict(state).keys()
    tokens = jax.ShapeDtypeStruct((2, experiment.data.seq_len), jnp.int32)
    output = jax.eval_shape(lambda m, t: m(t, whole_rows(t)), abstract, tokens)
    assert output.hidden.shape == (*tokens.shape, experiment.model.width)
