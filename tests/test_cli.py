"""The command line: what it does with a run, and what it says to every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from effattn import cli
from effattn.commands.train import default_workdir

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.based import BasedModelConfig
from effattn.parallel.mesh import MeshConfig


def get_config(source):
    return Experiment(
        model=BasedModelConfig(num_layers=2, width=16, num_heads=2, feature_dim=4, window=8),
        data=DataConfig(
            source=source, batch_size=4, seq_len=48, validation_fraction=0.1, prefetch=0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=6, checkpoint_every=3, tensorboard=False),
        mesh=MeshConfig(data=1),
    )
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a config file, a text, and a run trained on it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "text").mkdir()
    for number in range(12):
        lines = [f"line {i} of file {number}: {i * number}\n" for i in range(40)]
        (folder / "text" / f"{number}.txt").write_text("".join(lines))
    assert cli.main(train_arguments(folder)) == 0
    return folder


def train_arguments(folder, *more):
    spec = f"--config={folder / 'tiny.py'}:{folder / 'text'}"
    return ["train", spec, f"--workdir={folder / 'run'}", *more]


def mistake(capsys, arguments, code=2):
    """The one sentence that a wrong command line gets on stderr."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("effattn")
    assert "Traceback" not in said.err
    return said.err


# ---- what it does


def test_help_is_there_for_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in said
        assert cli.main([name, "--help"]) == 0
        assert f"usage: effattn {name}" in capsys.readouterr().out


def test_no_command_shows_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: effattn" in capsys.readouterr().out


def test_versions_are_one_line(capsys):
    assert cli.main(["--version"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "jax " in line and "python " in line


def test_the_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "effattn", "train", "--config=quickstrat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("effattn train: --config: got 'quickstrat'")


def test_overrides_are_told_from_options():
    words = [
        "train",
        "--config=x",
        "--config.a.b",
        "3",
        "--config.c",
        "--workdir=w",
        "--noconfig.d",
    ]
    overrides, rest = cli.split_overrides(words)
    assert overrides == ["--config.a.b=3", "--config.c", "--noconfig.d"]
    assert rest == ["train", "--config=x", "--workdir=w"]


def test_the_workdir_is_named_after_the_config():
    assert default_workdir("quickstart") == "runs/quickstart"
    assert default_workdir("configs/mqar.py:based") == "runs/mqar_based"


def test_training_leaves_a_run_and_the_same_command_finds_it_finished(files, capsys):
    for name in ("config.json", "metrics.jsonl", "result.json", "summary.md", "checkpoints"):
        assert (files / "run" / name).exists(), name
    capsys.readouterr()
    assert cli.main(train_arguments(files)) == 0
    assert "nothing to do" in capsys.readouterr().out


def figures(text):
    """{name: value} of evaluate's lines that end in a number."""
    pairs = (line.rsplit(maxsplit=1) for line in text.splitlines() if line.split())
    return {k.strip(): float(v) for k, v in pairs if v.replace(".", "", 1).isdecimal()}


def test_evaluate_says_the_same_for_any_batch_size(files, capsys):
    capsys.readouterr()
    seen = []
    for size in (1, 3, 16):
        assert cli.main(["evaluate", f"--workdir={files / 'run'}", f"--batch_size={size}"]) == 0
        seen.append(figures(capsys.readouterr().out))
    assert {"bits per byte", "loss (nats per token)", "perplexity per token"} <= set(seen[0])
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-5)


def test_evaluate_puts_baselines_beside_the_model(files, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", f"--workdir={files / 'run'}", "--baselines", "--step=best"]) == 0
    said = figures(capsys.readouterr().out)
    assert {"n-gram, order 0", "n-gram, order 5", "zlib -9", "lzma -9e", "this model"} <= set(said)
    assert said["this model"] == said["bits per byte"]


def test_evaluate_reads_another_text(files, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("some other text, which no run has seen\n" * 40)
    capsys.readouterr()
    arguments = ["evaluate", f"--workdir={files / 'run'}"]
    source = f"--config.data.source={tmp_path / 'other.txt'}"
    assert cli.main([*arguments, source, "--config.data.validation_fraction=0.5"]) == 0
    assert "other.txt" in capsys.readouterr().out


def test_generate_continues_every_prompt_and_repeats_itself(files, capsys):
    arguments = ["generate", f"--workdir={files / 'run'}", "--max_new_tokens=10", "--seed=3"]
    capsys.readouterr()
    assert cli.main([*arguments, "--prompt=line ", "--prompt=of"]) == 0
    said = capsys.readouterr()
    assert "--- prompt 1\nline " in said.out and "--- prompt 2\nof" in said.out
    assert "bytes of state" in said.err
    assert cli.main([*arguments, "--prompt=line ", "--prompt=of"]) == 0
    assert capsys.readouterr().out == said.out


def test_generate_without_a_prompt_begins_a_document(files, capsys):
    assert cli.main(["generate", f"--workdir={files / 'run'}", "--max_new_tokens=3"]) == 0


# ---- what it says to mistakes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], ["unknown command trian", "did you mean train?"]),
        (["train"], ["--config"]),
        (["train", "--confg=quickstart"], ["--config"]),
        (["train", "--config=quickstart", "--wokdir=x"], ["--wokdir", "did you mean --workdir?"]),
        (["train", "--config=quickstart", "stray"], ["unknown argument stray"]),
        (["train", "--config=quickstrat"], ["did you mean quickstart?"]),
        (["train", "--config=no/such/file.py"], ["no file no/such/file.py"]),
        (
            ["train", "--config=quickstart", "--config.model.num_layer=3"],
            ["model.num_layer", "did you mean num_layers", "feature_dim"],
        ),
        (["train", "--config=quickstart", "--config.train.steps=many"], ["'many'", "expected int"]),
        (["train", "--config=quickstart", "--config.train.steps=0"], ["train.steps: got 0"]),
        (["train", "--config=quickstart", "--config.model.pattern=conf"], ["conf", "conv"]),
        (["selfcheck", "--config.x=1"], ["takes no config fields"]),
        (["evaluate"], ["--workdir"]),
        (["evaluate", "--workdir=no/such/run"], ["no/such/run holds no run"]),
        (["evaluate", "--workdir=x", "--batch_size=0"], ["--batch_size: got 0"]),
        (["evaluate", "--workdir=x", "--split=train", "--baselines"], ["--baselines"]),
        (["generate", "--workdir=no/such/run", "--prompt=x"], ["no/such/run holds no run"]),
        (["generate", "--workdir=x", "--temperature=-1"], ["temperature: got -1"]),
        (["generate", "--workdir=x", "--temperature=hot"], ["--temperature", "'hot'"]),
        (["generate", "--workdir=x", "--top_p=0"], ["top_p: got 0"]),
        (["generate", "--workdir=x", "--top_k=0"], ["top_k: got 0"]),
        (["generate", "--workdir=x", "--max_new_tokens=0"], ["max_new_tokens: got 0"]),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, arguments)
    for word in words:
        assert word in said


def test_an_unwritable_workdir_is_a_sentence(files, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = [*train_arguments(files)[:2], f"--workdir={tmp_path / 'file' / 'run'}"]
    assert str(tmp_path / "file") in mistake(capsys, arguments)


def test_text_that_does_not_do_is_a_sentence(files, capsys, tmp_path):
    arguments = [*train_arguments(files)[:2], f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "empty").mkdir()
    said = mistake(capsys, [*arguments, f"--config.data.source={tmp_path / 'empty'}"])
    assert "empty" in said
    said = mistake(capsys, [*arguments, f"--config.data.source={tmp_path / 'absent.txt'}"])
    assert "absent.txt" in said
    said = mistake(capsys, [*arguments, "--config.data.seq_len=1000000"])
    assert "data.seq_len: got 1000000" in said


def test_going_on_with_another_architecture_is_a_sentence(files, capsys):
    said = mistake(capsys, train_arguments(files, "--config.model.width=32"))
    assert "width" in said


def test_a_prompt_longer_than_the_context_is_a_sentence(files, capsys):
    arguments = ["generate", f"--workdir={files / 'run'}", f"--prompt={'x' * 48}"]
    assert "got 48 tokens, expected fewer than the context of 48" in mistake(capsys, arguments)
    assert cli.main([*arguments, "--context=64", "--max_new_tokens=2"]) == 0


def test_a_step_that_is_not_there_is_a_sentence(files, capsys):
    arguments = ["evaluate", f"--workdir={files / 'run'}"]
    assert "77" in mistake(capsys, [*arguments, "--step=77"])
    assert "expected a number, best or latest" in mistake(capsys, [*arguments, "--step=last"])


def test_only_the_data_of_a_trained_model_can_be_changed(files, capsys):
    arguments = ["evaluate", f"--workdir={files / 'run'}"]
    assert "config.data" in mistake(capsys, [*arguments, "--config.model.width=3"])
    assert "did you mean" in mistake(capsys, [*arguments, "--config.data.sourc=x"])


# ---- what is no mistake of the user's


def failing(error):
    def run(arguments):
        raise error

    return run


@pytest.mark.parametrize("error", [KeyError("a bug"), ValueError("from elsewhere")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    # `failing` stands in this file, outside of the package, as jax and numpy do.
    monkeypatch.setattr("effattn.commands.selfcheck.run", failing(error))
    with pytest.raises(type(error)):
        cli.main(["selfcheck"])


def test_ctrl_c_is_not_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("effattn.commands.selfcheck.run", failing(KeyboardInterrupt()))
    assert cli.main(["selfcheck"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_the_system_is_a_sentence(monkeypatch, capsys):
    error = PermissionError(13, "Permission denied", "/some/file")
    monkeypatch.setattr("effattn.commands.selfcheck.run", failing(error))
    assert "Permission denied: /some/file" in mistake(capsys, ["selfcheck"])


def test_a_failed_check_is_code_1(monkeypatch, capsys):
    from effattn import selfcheck

    checks = [
        selfcheck.Check("good", "", lambda: (0.0, 1.0)),
        selfcheck.Check("bad", "", lambda: (2.0, 1.0)),
        selfcheck.Check("nan", "", lambda: (float("nan"), 1.0)),
    ]
    monkeypatch.setattr(selfcheck, "CHECKS", checks)
    assert cli.main(["selfcheck"]) == 1
    said = capsys.readouterr().out
    assert "ok   good" in said and "FAIL bad" in said and "1 passed, 2 failed" in said
    monkeypatch.setattr(selfcheck, "CHECKS", checks[:1])
    assert cli.main(["selfcheck"]) == 0
