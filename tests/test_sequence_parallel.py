"""Tokens over a mesh axis: every strategy gives what one device gives, in values and gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import each_value
from jax.sharding import AxisType

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.masks import Causal, Full, Sink, Window
from effattn.models.based import BasedModelConfig
from effattn.models.hnet import HNetConfig
from effattn.models.lightning import LightningModelConfig
from effattn.models.moe import MoEConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.moe import ExpertsConfig
from effattn.pallas_kernels.attention import attention
from effattn.parallel.auto import Auto
from effattn.parallel.gather_keys import GatherKeys
from effattn.parallel.halo import Halo, reach
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.ring_strategy import Ring, zigzag_order
from effattn.parallel.ring_ulysses import RingUlysses
from effattn.parallel.sequence import Local, SequenceConfig
from effattn.parallel.token_ring import TokenRing
from effattn.parallel.ulysses import Ulysses
from effattn.train.loop import train

BATCH, LEN, DIM = 2, 32, 8
# Sums of float32 in another order.
TOLERANCE = 2e-6
STRATEGIES = {
    "ring": Ring(),
    "both_ways": Ring(both_ways=True),
    "zigzag": Ring(zigzag=True, devices=4),
    "token_ring": TokenRing(),
    "ulysses": Ulysses(),
    "gather": GatherKeys(),
    "halo": Halo(),
    "ring_ulysses": RingUlysses(degree=2),
    "ring_ulysses_zigzag": RingUlysses(degree=2, zigzag=True, devices=4),
    "auto": Auto(),
    "auto_zigzag": Auto(zigzag=True, devices=4),
}
MASKS = {
    "causal": Causal(),
    "window": Causal() & Window(left=11),
    "sinks": Causal() & (Window(left=5) | Sink(2)),
    "full": Full(),
}


def mesh_of(sequence=4, tensor=1):
    shape, names = (2, sequence, tensor), ("data", "sequence", "tensor")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)


def arguments(heads, kv_heads, *, packed, extra, seed=0):
    """(arrays to differentiate by, the others)"""
    draw = np.random.default_rng(seed)

    def new(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    arrays = {
        "query": new(BATCH, LEN, heads, DIM),
        "key": new(BATCH, LEN, kv_heads, DIM),
        "value": new(BATCH, LEN, kv_heads, 6),
    }
    others = {}
    if extra:
        arrays |= {"extra_key": new(BATCH, 3, kv_heads, DIM)}
        arrays |= {"extra_value": new(BATCH, 3, kv_heads, 6)}
    if packed:
        segments = [[1] * 5 + [2] * 19 + [3] * 8, [4] * 20 + [5] * 7 + [0] * 5]
        others["q_segment_ids"] = jnp.asarray(segments, jnp.int32)
        places = [
            np.concatenate([np.arange(r.count(s)) for s in dict.fromkeys(r)]) for r in segments
        ]
        others["q_positions"] = jnp.asarray(np.stack(places), jnp.int32)
    return arrays, others


def results(attend, arrays, others, order=None):
    """out, lse and gradients of a sum that both enter; tokens laid out by `order` and back."""

    def laid(x, by):
        return x if by is None or x.shape[1] != LEN else x[:, by]

    @jax.jit
    def run(arrays, others):
        def loss(arrays):
            out, lse = attend(**arrays, **others, return_lse=True)
            weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            weight = laid(weight, order)
            seen = jnp.isfinite(lse)
            return jnp.sum(weight * out) + jnp.sum(jnp.where(seen, lse, 0) ** 2), (out, lse)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    arrays, others = ({n: laid(x, order) for n, x in d.items()} for d in (arrays, others))
    (_, (out, lse)), gradients = run(arrays, others)
    back = None if order is None else np.argsort(order)
    return {n: np.asarray(laid(x, back)) for n, x in {"out": out, "lse": lse, **gradients}.items()}


def assert_equal(got, wanted, tolerance=TOLERANCE):
    for name, value in wanted.items():
        finite = np.isfinite(value)
        np.testing.assert_array_equal(np.isfinite(got[name]), finite, err_msg=name)
        scale = max(1.0, np.abs(value[finite]).max())
        off = np.abs(np.where(finite, got[name] - np.where(finite, value, 0), 0)).max()
        assert off <= tolerance * scale, f"{name}: {off / scale}"


@functools.cache
def wanted_of(mask, heads, packed, extra):
    arrays, others = arguments(*heads, packed=packed, extra=extra)
    return results(functools.partial(attention, mask=MASKS[mask]), arrays, others)


def cases():
    """Every strategy under every mask it takes, the layouts spread over them."""
    found = []
    for i, name in enumerate(STRATEGIES):
        for j, mask in enumerate(MASKS):
            if name == "halo" and mask != "window":
                continue
            heads = ((4, 4), (4, 2), (8, 2))[(i + j) % 3]
            packed, extra = (i + j) % 2 == 0, j % 2 == 1
            found.append((name, mask, heads, packed, extra))
    return found


@pytest.mark.parametrize(("name", "mask", "heads", "packed", "extra"), each_value(cases()))
def test_attention_equals_one_device(name, mask, heads, packed, extra):
    strategy = STRATEGIES[name]
    arrays, others = arguments(*heads, packed=packed, extra=extra)
    with jax.set_mesh(mesh_of()):
        attend = functools.partial(strategy.attention, mask=MASKS[mask])
        got = results(attend, arrays, others, strategy.order(LEN))
    assert_equal(got, wanted_of(mask, heads, packed, extra))


def test_a_mask_per_head_and_heads_over_the_mesh():
    masks = (Causal(), Causal() & Window(left=4)) * 2
    arrays, others = arguments(4, 2, packed=True, extra=False)
    wanted = results(functools.partial(attention, mask=masks), arrays, others)
    with jax.set_mesh(mesh_of(sequence=2, tensor=2)):
        got = results(functools.partial(Ring().attention, mask=masks), arrays, others)
        assert_equal(got, wanted)
        one = {"mask": Causal()}
        got = results(functools.partial(Ring().attention, **one), arrays, others)
    assert_equal(got, results(functools.partial(attention, **one), arrays, others))


# Each hop's partial result is rounded once more before it is added; those of TokenRing travel so.
HALF_PRECISION = {
    "ring": (Ring(), 1.2),
    "both_ways": (Ring(both_ways=True), 1.2),
    "ulysses": (Ulysses(), 1.05),
    "gather": (GatherKeys(), 1.05),
    "token_ring": (TokenRing(), 1.3),
}


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_bfloat16_is_as_near_as_on_one_device(name):
    strategy, bound = HALF_PRECISION[name]
    half, others, exact, alone = in_half_precision()
    with jax.set_mesh(mesh_of()):
        over = results(strategy.attention, half, others)
    for array in ("out", "query", "key", "value"):
        of = [np.linalg.norm(np.float32(r[array]) - exact[array]) for r in (over, alone)]
        assert of[0] <= bound * of[1], array


@functools.cache
def in_half_precision():
    """(arrays, the others, results in float32, on one device)"""
    arrays, others = arguments(4, 2, packed=False, extra=False)
    half = {n: x.astype(jnp.bfloat16) for n, x in arrays.items()}
    exact = results(attention, {n: x.astype(jnp.float32) for n, x in half.items()}, others)
    return half, others, exact, results(attention, half, others)


def test_without_the_axis_it_is_local():
    arrays, others = arguments(4, 2, packed=True, extra=True)
    wanted = results(Local().attention, arrays, others)
    assert_equal(results(Ring().attention, arrays, others), wanted)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))):
        assert_equal(results(Ulysses().attention, arrays, others), wanted)


def test_zigzag_order():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    order = zigzag_order(48, 4)
    np.testing.assert_array_equal(np.arange(48)[order][np.argsort(order)], np.arange(48))
    assert Ring().order(48) is None and Ring(zigzag=True).order(48) is None


def test_reach():
    assert reach(Causal()) is None and reach(Causal() & Window(left=3)) == 3
    assert reach(Window(left=7) & Causal() & Window(left=3)) == 3
    assert reach(Causal() & (Window(left=3) | Sink(1))) is None


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (Ring(), {"length": 30}, "seq_len: got 30, expected a multiple of mesh axis 'sequence'=4"),
        (Ring(zigzag=True, devices=4), {"length": 36}, "expected a multiple of 2 x mesh axis"),
        (Ring(zigzag=True, devices=2), {}, "sequence.devices: got 2, expected the 4 devices"),
        (Ulysses(), {"heads": 6}, "num_heads on a device: got 6, expected a multiple of mesh axis"),
        (Halo(), {}, r"expected Causal\(\) & Window"),
        (Ring(), {"blocks": True}, "blocks: got a selection"),
    ],
)
def test_bad_input_is_one_sentence(strategy, options, message):
    length, heads = options.get("length", LEN), options.get("heads", 4)
    x = jnp.ones((BATCH, length, heads, DIM))
    blocks = {"blocks": object()} if "blocks" in options else {}
    with jax.set_mesh(mesh_of()), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: strategy.attention(x, x, x, **blocks), x)


# ---- training


def run_of(tmp_path, name, model, mesh, sequence, **data):
    experiment = Experiment(
        model=model,
        data=DataConfig(source="copy", seq_len=32, batch_size=4, vocab_size=32, **data),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0),
        train=TrainConfig(steps=3, checkpoint_every=None, loss_tile=16),
        mesh=mesh,
        sequence=sequence,
    )
    result = train(experiment, tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
    return [line["loss"] for line in lines] + [result["validation"]["loss"]]


SMALL = {"num_layers": 2, "width": 32, "num_heads": 4}
TRAINED = {
    "transformer_zigzag": (
        TransformerConfig(**SMALL, num_kv_heads=2),
        {"kind": "ring", "zigzag": True},
    ),
    "transformer_ulysses": (TransformerConfig(**SMALL), {"kind": "ulysses"}),
    "lightning_ring": (
        LightningModelConfig(**SMALL, pattern=("lightning", "softmax")),
        {"kind": "ring", "both_ways": True},
    ),
    "based_gather": (BasedModelConfig(**SMALL, feature_dim=4), {"kind": "gather"}),
    "experts_zigzag": (
        MoEConfig(
            **SMALL,
            experts=ExpertsConfig(
                count=4,
                mlp_width=24,
                routing="capacity",
                capacity_factor=0.8,
                group_size=8,
                fold="all",
            ),
        ),
        {"kind": "ring", "zigzag": True},
    ),
}
# The others train in the slow tests: each is two runs of a whole program.
TRAINED_FAST = ("transformer_zigzag",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in TRAINED_FAST else pytest.mark.slow)
        for name in TRAINED
    ],
)
def test_training_over_a_sequence_axis_is_that_of_one_device(name, tmp_path):
    model, options = TRAINED[name]
    alone = run_of(tmp_path, "alone", model, MeshConfig(data=1), SequenceConfig())
    mesh = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)
    over = run_of(tmp_path, "over", model, mesh, SequenceConfig(**options))
    # Three steps of Adam on sums in another order.
    np.testing.assert_allclose(over, alone, rtol=2e-5)


def test_zigzag_is_refused_where_order_counts(tmp_path):
    mesh, zigzag = MeshConfig(data=1, sequence=2), SequenceConfig(kind="ring", zigzag=True)
    for model, name in (
        (BasedModelConfig(**SMALL, feature_dim=4), "Based, GatedShortConv"),
        (HNetConfig(layout='["t1", ["T1"], "t1"]', width=32), "HNet"),
    ):
        with pytest.raises(ValueError, match=f"sequence.zigzag: got True, but {name}"):
            run_of(tmp_path, name, model, mesh, zigzag)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rings"}, "sequence.kind: got 'rings', expected one of local, auto, ring"),
        ({"kind": "halo", "zigzag": True}, "sequence.zigzag: got True, expected False with 'halo'"),
        ({"kind": "ring", "zigzag": True, "both_ways": True}, "sequence.both_ways: got True"),
        ({"kind": "ring", "gradient_dtype": "float16"}, "sequence.gradient_dtype: got 'float16'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceConfig(**options).build(2)


@pytest.mark.parametrize("strategy", [Ulysses(), RingUlysses(degree=4)])
def test_heads_that_a_tensor_axis_leaves_too_few_are_a_sentence(strategy):
    """4 heads divide over 4 devices, but not once a tensor axis of 2 has taken half of them."""
    arrays, _ = arguments(4, 2, packed=False, extra=False)
    names = ("data", "sequence", "tensor")
    mesh = jax.make_mesh((1, 4, 2), names, axis_types=(AxisType.Auto,) * 3)
    says = "num_heads on a device: got 2, expected a multiple"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=says):
        strategy.attention(**arrays)
