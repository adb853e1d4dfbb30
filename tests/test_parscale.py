"""ParScale: streams that start apart, their aggregation, and a base recycled into streams."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from train_setup import experiment

from effattn import cli
from effattn.batch import TokenInfo, whole_rows
from effattn.config import load_config, to_dict
from effattn.experiment import OPTIMIZERS, OptimizerConfig
from effattn.export import export_weights
from effattn.models.aaren import AarenModelConfig
from effattn.models.based import BasedModelConfig
from effattn.models.hnet import HNetConfig
from effattn.models.lightning import LightningModelConfig
from effattn.models.mamba2 import Mamba2Config
from effattn.models.parscale import ParScaleConfig
from effattn.models.rat import RATModelConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.streams import Aggregation, fold, unfold
from effattn.parallel.mesh import MeshConfig, named, parameter_specs
from effattn.train import resume
from effattn.train.checkpoint import load_run
from effattn.train.flops import forward_flops
from effattn.train.loop import train
from effattn.train.optimizer import make_optimizer
from effattn.train.state import abstract_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import parscale_decode
import parscale_study

WIDTH, VOCAB = 16, 29
TINY = TransformerConfig(num_layers=1, width=WIDTH, num_heads=2, num_kv_heads=1, mlp_width=24)
BASES = {
    "transformer": TINY,
    "based": BasedModelConfig(num_layers=3, width=WIDTH, num_heads=2, feature_dim=4, window=3),
    "lightning": LightningModelConfig(
        num_layers=2, width=WIDTH, num_heads=2, pattern=("lightning", "softmax")
    ),
    "mamba2": Mamba2Config(num_layers=2, width=WIDTH, head_dim=8, state_dim=4),
    "aaren": AarenModelConfig(num_layers=2, width=WIDTH, num_heads=2, pattern=("conv", "aaren")),
    "rat": RATModelConfig(num_layers=2, width=WIDTH, num_heads=2, chunk_size=4, window=3),
}


def build(seed: int = 0, **fields: Any) -> Any:
    config = ParScaleConfig(**{"base": TINY, "prefix_length": 3} | fields)
    return config.build(vocab_size=VOCAB, rngs=nnx.Rngs(seed))


def tokens(batch: int = 2, length: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length), dtype=np.int32)


# ---- the model


def test_one_stream_without_prefix_is_the_base():
    model, ids = build(streams=1, prefix_length=0), tokens()
    base = TINY.build(vocab_size=VOCAB, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model.base), nnx.state(base))
    assert set(nnx.to_pure_dict(nnx.state(model))) == {"base"}

    def logits(model: Any) -> tuple[jax.Array, jax.Array]:
        info = whole_rows(ids)
        one = TokenInfo(*(field[:, 0] for field in info))
        step, _ = model.step(ids[:, 0], one, model.init_state(len(ids), 8))
        return model.logits(model(ids, info).hidden), step

    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(logits)(m) for m in (model, base)))


def test_streams_in_another_order_are_the_same_model():
    """Their starts, and the rows and columns of the aggregation that belong to them."""
    order, ids = np.array([2, 0, 1]), tokens()
    model = build(streams=3)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    # Beginnings as large as what the tokens make, weights of the streams far from equal.
    draw = np.random.default_rng(1)
    new = {name: params[name] for name in ("starts", "aggregation")}
    new = jax.tree.map(lambda p: draw.normal(0, 1, p.shape).astype(np.float32), new)
    params |= new

    moved = jax.tree.map(lambda p: p, params)
    moved["starts"] = jax.tree.map(lambda p: p[:, order], params["starts"])
    inner = params["aggregation"]["inner"]["kernel"].reshape(WIDTH, 3, WIDTH)
    moved["aggregation"] = {
        "inner": {**params["aggregation"]["inner"], "kernel": inner[:, order].reshape(-1, WIDTH)},
        "out": jax.tree.map(lambda p: p[..., order], params["aggregation"]["out"]),
    }
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(ids, whole_rows(ids)).hidden)
    got, wanted, other = run(moved), run(params), run(params | {"starts": moved["starts"]})
    np.testing.assert_allclose(got, wanted, atol=1e-5)  # float32 sums in another order
    assert np.max(np.abs(other - wanted)) > 1e-2


def test_full_smoothing_is_the_plain_mean():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 5, WIDTH)), jnp.float32)

    def join(smoothing: float) -> tuple[jax.Array, jax.Array]:
        join = Aggregation(
            WIDTH, 4, smoothing=smoothing, init_std=1.0, dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        return join(x)

    y, weights = join(1.0)
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)
    np.testing.assert_allclose(y, x.mean(0), atol=1e-6)
    y, weights = join(0.1)
    assert float(weights.min()) >= 0.1 / 4
    np.testing.assert_allclose(y, jnp.einsum("...s,s...d->...d", weights, x), atol=1e-6)


def test_rows_are_stream_major():
    x = jnp.arange(6).reshape(3, 2)
    rows = fold(x, 4)
    np.testing.assert_array_equal(rows, np.tile(x, (4, 1)))
    np.testing.assert_array_equal(unfold(rows, 4)[2], x)
    assert fold(x, 1) is x


@pytest.mark.parametrize("name", BASES)
def test_every_decoder_of_the_zoo_is_read_by_streams(name):
    """Shapes alone; the laws, the golden vectors and the laws of starts below check the values."""
    ids = tokens()
    model = nnx.eval_shape(lambda: build(base=BASES[name]))

    def everything(model: Any) -> Any:
        info = whole_rows(ids)
        state = model.init_state(len(ids), 8)
        first, state = model.prefill(ids, info, state)
        second, state = model.step(ids[:, 0], TokenInfo(*(f[:, 0] for f in info)), state)
        return model(ids, info, key=jax.random.key(0)), first, second, state

    output, first, second, state = jax.eval_shape(everything, model)
    assert output.hidden.shape == (*ids.shape, WIDTH)
    assert first.shape == (*ids.shape, VOCAB) and second.shape == (len(ids), VOCAB)
    assert {leaf.shape[1] for leaf in jax.tree.leaves(state)} == {2 * len(ids)}


def test_float64_stays_float64():
    with jax.enable_x64(True):
        config = ParScaleConfig(base=BASES["lightning"], prefix_length=3)
        model = nnx.eval_shape(
            lambda: config.build(vocab_size=VOCAB, dtype=jnp.float64, rngs=nnx.Rngs(0))
        )
        wide = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float64), model)
        hidden = jax.eval_shape(lambda m: m(tokens(), whole_rows(tokens())).hidden, wide)
    assert hidden.dtype == jnp.float64


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"streams": 0}, r"model\.streams: got 0, expected at least 1"),
        ({"prefix_length": -1}, r"model\.prefix_length: got -1"),
        ({"prefix_length": 0}, "streams that start alike stay alike"),
        ({"smoothing": 1.5}, r"model\.smoothing: got 1\.5"),
        ({"streams": 1, "prefix_length": 0, "freeze_base": True}, r"model\.freeze_base"),
        ({"base": BasedModelConfig(width=WIDTH, pattern=("conv",))}, "would be the same"),
        (
            {"base": HNetConfig(layout='["t1", ["T1"], "t1"]', width=32, inner_widths=(48,))},
            "one stack of blocks",
        ),
    ],
)
def test_bad_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        nnx.eval_shape(lambda: build(**fields))


def num_parameters(config: Any, vocab_size: int) -> int:
    model = nnx.eval_shape(lambda: config.build(vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize(("streams", "more"), [(2, 2_382_466), (4, 4_764_036)])
def test_published_numbers_of_parameters(streams, more):
    base = TransformerConfig(
        num_layers=36, width=896, num_heads=16, num_kv_heads=2, mlp_width=4864, qkv_bias=True
    )
    alone = num_parameters(base, 8)
    assert alone - 8 * 896 == 535_813_376
    assert num_parameters(ParScaleConfig(base=base, streams=streams), 8) - alone == more


def test_the_config_has_the_published_number_of_parameters():
    for streams, count in (("1", 1_571_472_384), ("8", 1_595_669_000)):
        config = load_config(f"parscale_1b8:{streams}").model
        assert num_parameters(config, 8) - 8 * 1536 == count


def test_flops_are_those_of_the_streams_and_one_head():
    base, streams, length = TINY, 3, 5
    config = ParScaleConfig(base=base, streams=streams, prefix_length=length)
    head = 2 * WIDTH * VOCAB
    layers = forward_flops(base, vocab_size=VOCAB, seq_len=9) - head
    prefix = 2 * 2 * WIDTH * length  # one layer; scores and values of all query heads
    join = 2 * (streams * WIDTH * WIDTH + WIDTH * streams + streams * WIDTH)
    assert forward_flops(config, vocab_size=VOCAB, seq_len=9) == pytest.approx(
        streams * (layers + prefix) + join + head
    )
    alone = ParScaleConfig(base=base, streams=1, prefix_length=0)
    assert forward_flops(alone, vocab_size=VOCAB, seq_len=9) == pytest.approx(layers + head)


# ---- the recipe: a trained base, then streams


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A run of the base alone."""
    workdir = tmp_path_factory.mktemp("parscale") / "base"
    train(experiment(model=TINY, steps=2, checkpoint_every=None), workdir)
    return workdir


def stage_two(source, **fields):
    model = ParScaleConfig(**{"base": TINY, "prefix_length": 3} | fields)
    return experiment(model=model, steps=2, checkpoint_every=None, init_from=str(source))


def changed(source, workdir) -> set[str]:
    """The parts of a second stage that are not what they were in the first, to the bit."""
    base, params = load_run(source).params, load_run(workdir).params
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), params["base"], base)
    assert float(jnp.abs(params["aggregation"]["out"]["bias"]).max()) > 0  # it began at zero
    return set() if all(jax.tree.leaves(same)) else {"base"}


@pytest.mark.slow
def test_a_recycled_base_is_trained_on(stage_one, tmp_path):
    train(stage_two(stage_one), tmp_path / "run")
    assert changed(stage_one, tmp_path / "run") == {"base"}


@pytest.mark.slow
def test_a_weights_file_of_the_base_is_recycled_too(stage_one, tmp_path):
    run = load_run(stage_one)
    path = tmp_path / "weights.safetensors"
    export_weights(path, run.params, to_dict(run.experiment))
    train(stage_two(path, freeze_base=True), tmp_path / "run")
    found = load_run(tmp_path / "run").params["base"]
    jax.tree.map(np.testing.assert_array_equal, found, run.params)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"base": TransformerConfig(num_layers=1, width=WIDTH, num_heads=4, mlp_width=24)},
            r"init_from: .*base: it holds another model: model\.base\.num_heads is 4, was 2",
        ),
        (
            {"base": Mamba2Config(num_layers=2, width=WIDTH, head_dim=8, state_dim=4)},
            r"init_from: .*base: it holds another model: model\.base\.type is .*Mamba2Config",
        ),
    ],
)
def test_an_incompatible_base_is_refused(stage_one, fields, match):
    run = stage_two(stage_one, **fields)
    with pytest.raises(ValueError, match=match):
        resume.init_from(None, run.train.init_from, abstract_model(run, VOCAB).params, run.model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_parts_have_no_moments_and_stay_bit_for_bit(name):
    axes = {"base": {"kernel": ("embed", "mlp"), "scale": ("embed",)}, "new": ("embed", "mlp")}
    params = {
        "base": {"kernel": jnp.ones((3, 4)), "scale": jnp.array([-0.0, 0.0, 1.0])},
        "new": jnp.ones((3, 4)),
    }
    config = OptimizerConfig(name=name, weight_decay=0.5)
    optimizer = make_optimizer(config, axes, lambda step: 0.1, frozen=("base",))
    state = optimizer.init(params)
    assert "base" not in str(jax.tree_util.tree_flatten_with_path(state)[0])
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    after = jax.tree.map(jnp.add, params, updates)
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), after, params)
    assert same == {"base": {"kernel": True, "scale": True}, "new": False}


CONFIG = """
from train_setup import experiment

from effattn.models.parscale import ParScaleConfig
from effattn.models.transformer import TransformerConfig


def get_config(streams):
    base = TransformerConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, mlp_width=24)
    return experiment(
        model=ParScaleConfig(base=base, streams=int(streams), prefix_length=2),
        steps=2,
        checkpoint_every=None,
    )
"""


def test_the_recipe_on_the_command_line(stage_one, tmp_path, capsys):
    """A run of the base, then streams over it, which is frozen."""
    (tmp_path / "tiny.py").write_text(CONFIG)

    def run(streams: str, *more: str) -> int:
        spec, workdir = f"--config={tmp_path / 'tiny.py'}:{streams}", tmp_path / f"run{streams}"
        recycle = f"--config.train.init_from={stage_one}"
        frozen = "--config.model.freeze_base"
        return cli.main(["train", spec, f"--workdir={workdir}", recycle, frozen, *more])

    assert run("3") == 0
    assert changed(stage_one, tmp_path / "run3") == set()
    capsys.readouterr()
    assert run("0") == 2
    assert "model.streams: got 0, expected at least 1" in capsys.readouterr().err
    assert run("2", "--config.model.base.mlp_width=32") == 2
    assert "model.base.mlp_width is 32, was 24" in capsys.readouterr().err


# ---- the mesh


def test_streams_are_split_over_their_own_axis():
    run = experiment(
        model=ParScaleConfig(base=TINY, streams=2, prefix_length=3),
        mesh=MeshConfig(data=2, fsdp=2, streams=2),
    )
    mesh = run.mesh.build()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "streams": 2}
    model = abstract_model(run, VOCAB)
    specs, _ = parameter_specs(model.params, model.axes, mesh)
    assert specs["starts"][0]["key"] == PartitionSpec(None, "streams", None, None, None)

    module = model.make(nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    params, ids = nnx.to_pure_dict(state), tokens(4)

    def rows(params: Any, ids: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        x = fold(model.base.embedding(ids), 2)
        return model(ids, whole_rows(ids)).hidden, x

    alone, _ = jax.jit(rows)(params, ids)
    placed = jax.device_put(params, named(mesh, specs))
    with jax.set_mesh(mesh):
        together, x = jax.jit(rows)(placed, ids)
    np.testing.assert_allclose(together, alone, atol=1e-5)  # sums in another order
    # Eight devices, eight rows: each holds one row of one stream.
    assert {shard.data.shape[0] for shard in x.addressable_shards} == {1}
    with pytest.raises(ValueError, match=r"mesh\.fsdp x mesh\.streams: got 1 x 3"):
        MeshConfig(streams=3).build()


# ---- the scripts


def test_the_decoding_page_counts_weights_and_cache_apart(tmp_path):
    base = TransformerConfig(num_layers=2, width=WIDTH, num_heads=2, num_kv_heads=1, mlp_width=24)
    one, four = (parscale_decode.sizes(streams, base=base) for streams in (1, 4))
    assert one["added"] == 0 and four["shared"] == one["shared"]
    prefixes = 4 * parscale_decode.PREFIX * 2 * 8 * 2
    assert four["added"] == 4 * (prefixes + 4 * (WIDTH**2 + WIDTH + 1) + WIDTH)
    assert (one["cache"], four["cache"]) == (2 * 2 * 8 * 4, 4 * 2 * 2 * 8 * 4)
    found = [
        {"streams": 1, "seconds": [0.010, 0.012, 0.020], **one},
        {"streams": 4, "seconds": [0.015, 0.020, 0.018], **four},
    ]
    page = tmp_path / "decode.md"
    parscale_decode.write(found, page, "by hand", "1.0", base=base, context=5)
    assert "| 4 | 18.0 | 1.50 | 15.0 |" in page.read_text() and "by hand" in page.read_text()


def test_the_study_fits_what_the_law_makes(tmp_path, monkeypatch):
    law = [(p, 2.5 * (1 + 0.4 * np.log(p)) ** -parscale_study.ALPHA) for p in (1, 2, 4, 8)]
    found = parscale_study.fit(law)
    assert (found.k, found.first) == pytest.approx((0.4, 2.5), abs=2e-3)
    line = parscale_study.fit([(p, 2.5 - 0.1 * np.log(p)) for p in (1, 2, 4)])
    assert (line.intercept, line.slope, line.rms) == pytest.approx((2.5, -0.1, 0))
    assert parscale_study.fit([(2, 2.5), (2, 2.4)]) is None

    def trained(experiment, run):
        bits = dict(law)[experiment.model.streams]
        return {"status": "finished", "validation": {"bits_per_byte": bits}, "parameters": 1}

    page = tmp_path / "parscale.md"
    monkeypatch.setattr(parscale_study, "train", trained)
    monkeypatch.setattr("sys.argv", ["study", f"--page={page}", f"--workdir={tmp_path}"])
    parscale_study.main()
    text = page.read_text()
    assert "has k = 0.40" in text and "P = 4 is worth 1.55 times" in text
    assert 0 < page.with_suffix(".png").stat().st_size < 200 * 1024
