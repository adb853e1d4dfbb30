"""What `effattn inspect` counts and draws."""

import re

import numpy as np
import pytest

from effattn.cli import main
from effattn.data.tokenizer import ByteTokenizer
from effattn.inspection import (
    COLUMNS,
    Picture,
    draw,
    in_terminal,
    inspect,
    on_places,
    spaces,
    word_starts,
)
from effattn.nn.chunking import Boundaries

TEXT = b"def f(x_1):\n  return  x_1\n"


def test_words():
    starts = [TEXT[i:].split()[0][:2] for i in np.flatnonzero(word_starts(TEXT))]
    assert [s[:1] for s in starts] == [b"d", b"f", b"x", b"r", b"x"]
    before = np.flatnonzero(spaces(TEXT))
    assert [TEXT[i : i + 2] for i in before] == [b" f", b" r", b" x"]
    accents = "é à".encode()
    assert np.flatnonzero(word_starts(accents)).tolist() == [0, 3]


def test_shares_and_chance():
    places = np.array([1, 0, 1, 0, 0, 1, 0, 0, 0], bool)
    begins = np.array([1, 0, 1, 1, 0, 0, 0, 0, 0], bool)
    # Of the boundaries after the first byte one of two, of the bytes 2 of 8, of the places 1 of 2.
    assert on_places(begins, places) == (0.5, 0.25, 0.5)
    assert on_places(begins[:1], places[:1]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("colour", [False, True])
def test_a_terminal_shows_every_character(colour):
    begins = word_starts(TEXT)
    picture = Picture("title", np.cumsum(begins), ("#ffffff", "#000000"), begins)
    shown = in_terminal(TEXT, picture, colour=colour).removeprefix("title\n")
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    if colour:
        assert plain == TEXT.decode()
        assert "48;2;255;255;255m" in shown and "48;2;0;0;0m" in shown
    else:
        assert plain == "|def |f(|x_1):\n  |return  |x_1\n"


def test_depths_in_a_terminal_without_colours():
    depths = np.repeat([0, 2, 1], [3, 2, 4])
    picture = Picture("depths", depths, ("#ffffff",), None)
    assert in_terminal(b"abcdefghi", picture, colour=False) == "depths\n<0>abc<2>de<1>fghi"


def test_bytes_that_are_no_utf8_and_long_lines_are_drawn():
    text = b"\xff\xfe" + "é".encode() * COLUMNS
    begins = np.arange(len(text)) % 5 == 0
    picture = Picture("title", np.cumsum(begins), ("#ffffff", "#000000"), begins)

    class Inspected:
        pass

    inspection = Inspected()
    inspection.text, inspection.pictures = text, [picture, picture]
    figure = draw(inspection)
    assert len(figure.axes) == 2
    drawn = [t.get_text() for t in figure.axes[0].texts]
    assert drawn == ["\ufffd", "\ufffd"] + ["é"] * COLUMNS


def test_a_model_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="expected a model with learned chunks"):
        inspect(object(), TEXT, ByteTokenizer())


@pytest.mark.slow
def test_from_a_run_to_a_picture(tmp_path, capsys):
    """The commands: train H-Net for two steps, then look at it."""
    run = str(tmp_path / "run")
    source = tmp_path / "text.txt"
    source.write_bytes(TEXT * 200)
    sizes = {"width": 16, "inner_widths": "24,", "layout": '["t1", ["T1"], "t1"]'}
    small = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    small += ["--config.train.steps=2", "--config.mesh.data=1", f"--config.data.source={source}"]
    small += ["--config.data.seq_len=32", "--config.data.batch_size=2"]
    small += ["--config.optimizer.name=adamw", "--config.model.capacity.mode=exact"]
    assert main(["train", "--config=hnet_stdlib", f"--workdir={run}", *small]) == 0
    capsys.readouterr()
    picture = tmp_path / "chunks.png"
    look = ["inspect", f"--workdir={run}"]
    assert main([*look, f"--file={source}", "--length=50", f"--png={picture}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("stage 0: ") and "bytes that are word starts (chance)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (["--text="], "--text: got an empty text"),
        (["--text=a", "--length=0"], "--length: got 0"),
        (["--text=a", "--png=/no/such/a.png"], "--png: no directory"),
        ([f"--file={tmp_path / 'none'}"], "No such file"),
    ):
        assert main([*look, *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    # Capacity overflow in mode "error": a sentence, exit code 1, nothing saved.
    other = tmp_path / "other"
    mode = ["--config.model.capacity.mode=error", "--config.model.capacity.share=0.05"]
    command = ["train", "--config=hnet_stdlib", f"--workdir={other}", *small, *mode]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "step 1: chunks_0_overflow is" in error and "no parameter was changed" in error
    assert not list((other / "checkpoints").glob("[0-9]*"))


def test_boundaries_have_a_confidence():
    found = Boundaries(np.array([0.9, 0.2]), np.array([True, False]))
    np.testing.assert_allclose(found.confidence, [0.9, 0.8])
