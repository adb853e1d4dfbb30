"""A user's mistakes with data: one ValueError sentence each, naming the field or the file."""

import json
import sys

import numpy as np
import pytest

from effattn.data.config import DataConfig
from effattn.data.pipeline import open_dataset


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("some text " * 500)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text("")
    lines = [json.dumps({"text": "x" * 50}), json.dumps({"title": "y"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    np.arange(3, dtype=np.uint16).tofile(tmp_path / "x.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    np.save(tmp_path / "floats.npy", np.zeros(5))
    np.save(tmp_path / "negative.npy", np.arange(-5, 500))
    np.save(tmp_path / "large.npy", np.arange(5000))
    (tmp_path / "not.npy").write_text("nothing of the kind")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("text")
    np.save(tmp_path / "mixed" / "b.npy", np.arange(5))
    return tmp_path


CASES = {
    "missing file": ({"source": "{}/note.txt"}, r"data.source: no file .*did you mean notes.txt"),
    "missing folder": ({"source": "{}/x/y/z.txt"}, r"data.source: no file or folder"),
    "empty folder": ({"source": "{}/empty"}, r"data.source: .*holds no file"),
    "empty corpus": ({"source": "{}/blank"}, r"is empty: 1 files with 0 bytes"),
    "glob": ({"source": "{}/*.md"}, r"data.source: the pattern .*\*.md' matches no file"),
    "remote": ({"source": "file://{}/empty/"}, r"data.source: .*holds no file"),
    "unknown name": ({"source": "stdlb"}, r"data.source: got 'stdlb'.*did you mean stdlib"),
    "field not named": ({"source": "{}/x.jsonl"}, r"data.field: x.jsonl is JSON lines.*has text"),
    "line without the field": (
        {"source": "{}/x.jsonl", "field": "text"},
        r"x.jsonl, line 2: no text in field data.field='text'; the line has title",
    ),
    "line that is not JSON": (
        {"source": "{}/broken.jsonl", "field": "text"},
        r"broken.jsonl, line 2: not JSON",
    ),
    "line that is no object": (
        {"source": "{}/list.jsonl", "field": "text"},
        r"list.jsonl, line 1: .*the line has list",
    ),
    "bin without its type": ({"source": "{}/x.bin"}, r"data.token_dtype: x.bin does not say"),
    "bin of another type": (
        {"source": "{}/odd.bin", "token_dtype": "uint16"},
        r"odd.bin: 3 bytes are no whole number of uint16",
    ),
    "type unknown": (
        {"source": "{}/x.bin", "token_dtype": "unit16"},
        r"data.token_dtype: got 'unit16'.*did you mean uint16",
    ),
    "floats": ({"source": "{}/floats.npy"}, r"floats.npy: token ids must be integers, got float64"),
    "negative ids": ({"source": "{}/negative.npy"}, r"negative.npy: token ids must be 0 or more"),
    "ids too large": (
        {"source": "{}/large.npy", "vocab_size": 100},
        r"data.vocab_size: .*has token id 4999, expected ids below 100",
    ),
    "not an array": ({"source": "{}/not.npy"}, r"not.npy: cannot be read as .npy"),
    "text and arrays": ({"source": "{}/mixed"}, r"mixes text with token arrays"),
    "train too short": (
        {"source": "{}/notes.txt", "seq_len": 10000},
        r"data.seq_len: got 10000, but the train split .* has only 4\d\d\d tokens",
    ),
    "validation too short": (
        {"source": "{}/notes.txt", "seq_len": 256},
        r"data.seq_len: got 256, but the validation split .* has only 152 tokens",
    ),
    "weights": (
        {"source": "x", "mixture": ("a", "b"), "mixture_weights": (1.0,)},
        r"data.mixture_weights: got 1 entries, expected 2, one per data.mixture",
    ),
    "weight of 0": (
        {"mixture": ("a", "b"), "mixture_weights": (1.0, 0.0)},
        r"data.mixture_weights: got \(1.0, 0.0\), expected all above 0",
    ),
    "tasks with text": ({"mixture": ("stdlib", "mqar")}, r"data.mixture: 'mqar' is a synthetic"),
    "packing": ({"packing": "document"}, r"data.packing: got 'document'.*did you mean documents"),
    "fraction": ({"validation_fraction": 1.5}, r"data.validation_fraction: got 1.5"),
    "no fraction": ({"validation_fraction": 0.0}, r"data.validation_fraction: got 0.0"),
    "batch size": ({"batch_size": 0}, r"data.batch_size: got 0, expected at least 1"),
    "tokenizer file": ({"tokenizer": "{}/tok.json"}, r"data.tokenizer: no file .*tok.json"),
    "tokenizer": ({"tokenizer": "{}/notes.txt"}, r"data.tokenizer: cannot read .*notes.txt"),
    "cache": ({"source": "{}/notes.txt", "cache_dir": "{}/notes.txt/c"}, r"data.cache_dir: cannot"),
    "mqar too short": ({"source": "mqar", "seq_len": 60}, r"data.seq_len: got 60, but mqar .* 64"),
    "mqar vocabulary": (
        {"source": "mqar", "seq_len": 128, "vocab_size": 33},
        r"data.vocab_size: got 33, but mqar with num_pairs=16 needs at least 34",
    ),
    "copy too short": ({"source": "copy", "seq_len": 1}, r"data.seq_len: got 1, expected at least"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_one_sentence(case, folder):
    fields, sentence = CASES[case]
    if "tokenizer" in fields:
        pytest.importorskip("tokenizers")
    fields = {k: v.format(folder) if isinstance(v, str) else v for k, v in fields.items()}
    with pytest.raises(ValueError, match=sentence) as caught:
        open_dataset(DataConfig(**{"cache_dir": str(folder / "cache"), **fields}))
    assert "\n" not in str(caught.value)


def test_a_tokenizers_file_without_the_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'effattn\[tokenizers\]'"):
        open_dataset(DataConfig(tokenizer=str(folder / "notes.txt")))


def test_a_python_without_library_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("effattn.data.files.sys.path", [str(tmp_path)])
    with pytest.raises(ValueError, match="no standard library sources"):
        open_dataset(DataConfig(cache_dir=str(tmp_path)))


def test_a_full_disk_leaves_no_half_corpus(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effattn.data.corpus._write", full)
    config = DataConfig(source=str(folder / "notes.txt"), cache_dir=str(folder / "cache"))
    with pytest.raises(ValueError, match="data.source: .*notes.txt.*No space left on device"):
        open_dataset(config)
    assert not list((folder / "cache").iterdir())


def test_rows_must_be_of_the_batch(folder):
    config = DataConfig(source="copy", batch_size=6, seq_len=8, cache_dir=str(folder / "cache"))
    dataset = open_dataset(config)
    for rows in ([], [-1, 2], [4, 6]):
        with pytest.raises(ValueError, match="rows: got .*some of the 6 rows of a batch"):
            dataset.train_iterator(0, rows=np.array(rows, int))
    with pytest.raises(ValueError, match="rows: got"):
        dataset.evaluation_batches("validation", 5, rows=np.array([5]))
    with pytest.raises(ValueError, match="split: got 'test'"):
        dataset.evaluation_batches("test")
