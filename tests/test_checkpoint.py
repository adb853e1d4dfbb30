"""Checkpoints by themselves: what stays, what a damaged one costs, what a full disk does."""

import json
import logging
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effattn.experiment import OPTIMIZERS, OptimizerConfig
from effattn.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    UnreadableCheckpoint,
    load_run,
    restore_newest,
)
from effattn.train.optimizer import make_optimizer
from effattn.train.state import TrainState

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step, size=1000):
    value = jnp.arange(size, dtype=jnp.float32) + step
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"blocks": {0: {"kernel": value}}, "scale": jnp.ones(3)},
        opt_state=(({"kernel": value * 2}, ()), jnp.asarray(step)),
        extra=None,
        key=jax.random.key(step),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), tree)


def assert_same(got, want):
    got, want = (x.replace(key=jax.random.key_data(x.key)) for x in (got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def write(folder, steps, losses=None, **options):
    checkpoints = Checkpoints(folder, **({"keep_last": 10} | options))
    for step in steps:
        loss = None if losses is None else losses.get(step)
        checkpoints.save(step, state(step), {"config": {}, "note": step}, loss)
    checkpoints.wait()
    checkpoints.close()


def newest(folder, like=None):
    checkpoints = Checkpoints(folder, keep_last=10)
    try:
        return restore_newest(
            checkpoints, abstract(state(0)) if like is None else like, lambda m: 0
        )
    finally:
        checkpoints.close()


def test_a_state_comes_back_bit_for_bit_with_its_record(tmp_path):
    write(tmp_path, [3])
    restored, meta = newest(tmp_path)
    assert_same(restored, state(3))
    assert meta["note"] == 3 and meta["step"] == 3 and meta["schema"] == 1
    assert jnp.issubdtype(restored.key.dtype, jax.dtypes.prng_key)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert newest(tmp_path) is None


def test_the_newest_and_the_best_stay_also_in_the_next_process(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: 2.5}
    write(tmp_path, [1, 2, 3, 4], losses, keep_last=2, keep_best=1)
    write(tmp_path, [5, 6], losses, keep_last=2, keep_best=1)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_saving_a_step_again_leaves_it_alone(tmp_path):
    write(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, keep_last=10)
    checkpoints.save(1, state(99), {"config": {}})
    checkpoints.wait()
    checkpoints.close()
    assert_same(newest(tmp_path)[0], state(1))


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate_array(step):
    file = largest_file(step / "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(step):
    """In the compressed numbers: without a checksum most of these read as other numbers."""
    file = largest_file(step / "params")
    data = bytearray(file.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    file.write_bytes(bytes(data))


def truncate_metadata(step):
    (step / "state" / "_METADATA").write_text('{"tree')


def empty_folder(step):
    for path in sorted(step.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def garbled_record(step):
    (step / "meta" / "metadata").write_text("{")


def another_programs(step):
    (step / "meta" / "metadata").write_text(json.dumps({"epoch": 4}))


def garbled_loss(step):
    (step / "metrics" / "metrics").write_text("{")


DAMAGES = [
    truncate_array,
    flip_a_bit,
    truncate_metadata,
    empty_folder,
    garbled_record,
    another_programs,
    garbled_loss,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_costs_one_warning_that_names_it(tmp_path, caplog, damage):
    write(tmp_path, [1, 2], {1: 1.0, 2: 0.5}, keep_best=1)
    bad = tmp_path / "checkpoints" / "2"
    damage(bad)
    with caplog.at_level(logging.WARNING, logger="effattn"):
        restored, _ = newest(tmp_path)
    if damage is garbled_loss:  # the loss ranks checkpoints; the state is whole without it
        assert_same(restored, state(2))
        assert str(bad / "metrics") in caplog.text
        return
    assert_same(restored, state(1))
    (record,) = [r for r in caplog.records if r.name == "effattn"]
    assert str(bad) in record.message and "going on from step 1" in record.message
    assert "\n" not in record.message
    # The step can be saved again, and the damaged one is still there to be looked at.
    write(tmp_path, [2])
    assert_same(newest(tmp_path)[0], state(2))
    assert (tmp_path / "checkpoints" / "2.unreadable").is_dir()


def test_where_no_checkpoint_can_be_read_the_error_names_the_file(tmp_path):
    write(tmp_path, [1, 2])
    for step in ("1", "2"):
        truncate_array(tmp_path / "checkpoints" / step)
    with pytest.raises(UnreadableCheckpoint) as caught:
        newest(tmp_path)
    assert str(tmp_path / "checkpoints" / "2") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints" / "2").is_dir()  # nothing was moved


def test_another_shape_or_dtype_is_refused_and_never_cast(tmp_path):
    write(tmp_path, [1])
    for change, match in (
        (lambda x: x.astype(jnp.bfloat16), r"scale is float32\[3\], expected bfloat16\[3\]"),
        (lambda x: x[:2], r"scale is float32\[3\], expected float32\[2\]"),
    ):
        other = state(1)
        other.params["scale"] = change(other.params["scale"])
        with pytest.raises(UnreadableCheckpoint, match=match):
            newest(tmp_path, abstract(other))
    other = state(1)
    other.params["bias"] = jnp.ones(3)
    with pytest.raises(UnreadableCheckpoint, match="bias is missing"):
        newest(tmp_path, abstract(other))


def test_a_newer_schema_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1), {"config": {}, "schema": 99})
    checkpoints.wait()
    with pytest.raises(UnreadableCheckpoint, match="newer effattn.*schema 99"):
        checkpoints.meta(1)
    checkpoints.close()


def test_a_full_disk_leaves_the_earlier_checkpoint_intact_and_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=10)
    checkpoints.save(1, state(1), {"config": {}})
    checkpoints.wait()
    noise = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    large = state(2).replace(params={"blocks": {0: {"kernel": jnp.asarray(noise)}}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may grow to 64 KiB: the kernel refuses the rest of the write, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, large, {"config": {}})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "2") in message and "could not be saved" in message
    assert f"{tmp_path / 'checkpoints' / '1'} is intact" in message and "\n" not in message
    checkpoints.close()
    assert_same(newest(tmp_path)[0], state(1))


@pytest.mark.parametrize(
    ("steps", "ask", "match"),
    [
        (None, None, "holds no run"),
        ([], None, "holds no complete checkpoint"),
        ([1, 2], 7, r"step: got 7, .* has 1, 2"),
        ([1], "best", "no checkpoint of .* was saved with an evaluation"),
    ],
)
def test_load_run_says_what_is_not_there(tmp_path, steps, ask, match):
    if steps is not None:
        write(tmp_path, steps)
    with pytest.raises(ValueError, match=match):
        load_run(tmp_path, ask)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_comes_back_in_its_own_types(tmp_path, name):
    params = {"up": np.ones((2, 4, 6), np.float32), "norm": np.ones((2, 4), np.float32)}
    axes = {"up": ("layers", "embed", "mlp"), "norm": ("layers", "embed")}
    config = OptimizerConfig(name=name, adafactor_min_dim=4)
    optimizer = make_optimizer(config, axes, lambda step: 0.1)
    opt_state = jax.jit(optimizer.init)(params)
    whole = state(1).replace(params=jax.tree.map(jnp.asarray, params), opt_state=opt_state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, whole, {"config": {}})
    checkpoints.wait()
    checkpoints.close()
    assert_same(newest(tmp_path, abstract(whole))[0], whole)
