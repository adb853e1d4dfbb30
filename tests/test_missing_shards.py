"""A checkpoint that has lost a file: one sentence that names it, on any mesh, and nothing else."""

import re
import shutil
from pathlib import Path

import pytest
import tensorstore
from etils import epath
from train_setup import experiment

from effattn.cli import main
from effattn.parallel.mesh import MeshConfig
from effattn.train.loop import train
from effattn.train.shards import missing_shards

CONFIG = """
from train_setup import experiment

from effattn.parallel.mesh import MeshConfig


def get_config(arg=None):
    return experiment(mesh=MeshConfig(data=4, fsdp=2), steps=4)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run on 8 devices with checkpoints of steps 2 and 4, of which 4 is the last."""
    root = tmp_path_factory.mktemp("saved") / "run"
    train(
        experiment(mesh=MeshConfig(data=2, fsdp=4), steps=4, checkpoint_every=2, keep_last=2), root
    )
    (root / "result.json").unlink()  # or the run would be over
    return root


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def shard_file(item: Path) -> Path:
    """A file of array data: the tree lists some of its bytes."""
    sentences = {}
    for file in sorted(item.glob("ocdbt.process_*/d/*")):
        moved = file.rename(file.with_suffix(".away"))
        sentences[file] = missing_shards(epath.Path(item))
        moved.rename(file)
    return next(file for file, sentence in sentences.items() if sentence is not None)


def goes_on(folder: Path, run: Path) -> int:
    """Of a training command for the same run on another mesh."""
    config = folder / "config.py"
    config.write_text(CONFIG)
    return main(["train", f"--config={config}", f"--workdir={run}"])


@pytest.mark.parametrize("item", ["params", "state"])
def test_another_mesh_goes_on_from_an_older_whole_checkpoint(run, tmp_path, capfd, caplog, item):
    shard = shard_file(run / "checkpoints" / "4" / item)
    shard.unlink()
    assert goes_on(tmp_path, run) == 0
    assert "going on from step 2" in capfd.readouterr().out
    (record,) = [r for r in caplog.records if r.name == "effattn"]
    assert f"checkpoints/4/{item}: ocdbt.process_0/d/{shard.name} is missing" in record.message
    assert "which holds shards of " in record.message and "\n" not in record.message
    assert (run / "checkpoints" / "4.unreadable").is_dir()


def test_no_whole_checkpoint_is_one_sentence_and_exit_code_2(run, tmp_path, capfd):
    shutil.rmtree(run / "checkpoints" / "2")
    shard = shard_file(run / "checkpoints" / "4" / "params")
    shard.unlink()
    before = sorted(run.rglob("*"))
    commands = [
        lambda: goes_on(tmp_path, run),
        lambda: main(["evaluate", f"--workdir={run}"]),
        lambda: main(["generate", f"--workdir={run}", "--prompt=sun"]),
    ]
    for command in commands:
        capfd.readouterr()
        assert command() == 2
        output = capfd.readouterr()
        assert output.err.count("\n") == 1, output.err
        assert f"checkpoints/4/params: ocdbt.process_0/d/{shard.name} is missing" in output.err
    assert sorted(run.rglob("*")) == before  # nothing is moved or deleted


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_a_missing_list_of_arrays_is_one_sentence(run, capfd, name):
    item = run / "checkpoints" / "4" / "params"
    (file,) = [item / name] if name == "manifest.ocdbt" else (item / name).iterdir()
    file.unlink()
    assert main(["evaluate", f"--workdir={run}"]) == 2
    output = capfd.readouterr()
    assert output.err.count("\n") == 1, output.err
    assert f"{file.relative_to(item)} is missing, which lists its arrays" in output.err


def test_a_tree_of_many_nodes_is_walked_to_its_end(tmp_path):
    folder = epath.Path(tmp_path / "tree")
    spec = {
        "driver": "ocdbt",
        "base": f"file://{folder}/",
        # Small nodes make the tree as deep as those of thousands of arrays.
        "config": {"max_decoded_node_bytes": 300, "max_inline_value_bytes": 1},
    }
    store = tensorstore.KvStore.open(spec).result()
    for first in (0, 1):  # the second tree points into the file of the first one
        with tensorstore.Transaction() as transaction:
            for number in range(first, 50, 2):
                store.with_transaction(transaction)[f"array{number:02}/0"] = bytes(100)
    assert missing_shards(folder) is None
    # How the two commits spread over files is a matter of timing: some may be of no use any more.
    found = set()
    for file in sorted((folder / "d").iterdir()):
        whole = file.read_bytes()
        file.unlink()
        if (sentence := missing_shards(folder)) is not None:
            found.add(sentence.removeprefix(f"d/{file.name} is missing, which "))
        file.write_bytes(whole)
    assert "lists its arrays" in found
    shards = found - {"lists its arrays"}
    # Whole names, though a node drops the beginning that its keys share.
    name = r"array\d\d"
    listed = rf"{name}(, {name})*( and (\d+ other arrays|{name}))?"
    assert shards and all(re.fullmatch(rf"holds shards of {listed}", text) for text in shards)


def test_a_file_that_ends_early_is_told_with_its_bytes(run):
    item = run / "checkpoints" / "4" / "params"
    shard = shard_file(item)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    sentence = missing_shards(epath.Path(item))
    assert f"{shard.name} is cut short ({len(whole) // 2} of " in sentence
