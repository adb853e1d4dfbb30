"""Corpora: what is read, how it is split, and that the cache can be trusted."""

import hashlib
import json
import sysconfig
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from effattn.data import files
from effattn.data.config import DataConfig
from effattn.data.corpus import SPLITS, open_corpus
from effattn.data.pipeline import open_dataset
from effattn.data.tokenizer import ByteTokenizer, load_tokenizer


def write_texts(folder: Path, count: int = 40, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    texts = {}
    for number in range(count):
        name = f"part{number % 3}/text{number:02d}.txt"
        texts[name] = rng.integers(32, 127, rng.integers(200, 600)).astype(np.uint8).tobytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(texts[name])
    return texts


def config(tmp_path: Path, source: object, **more: object) -> DataConfig:
    cache = str(tmp_path / "cache")
    return DataConfig(**{"source": str(source), "cache_dir": cache, "seq_len": 16, **more})


def corpus_of(settings: DataConfig):
    return open_corpus(settings.source, settings, load_tokenizer(settings.tokenizer))


def documents_in(corpus, split: str) -> list[bytes]:
    """The documents of a split, read back from the array with no help but the separator."""
    tokens = np.asarray(corpus.tokens[split])
    assert tokens[0] == tokens[-1] == 256
    inner = np.split(tokens, np.flatnonzero(tokens == 256))[1:-1]
    return [part[1:].astype(np.uint8).tobytes() for part in inner]


def test_every_document_is_in_exactly_one_split(tmp_path):
    texts = write_texts(tmp_path / "text", 100)
    corpus = corpus_of(config(tmp_path, tmp_path / "text", validation_fraction=0.1))
    train, validation = (documents_in(corpus, split) for split in SPLITS)
    assert sorted(train + validation) == sorted(texts.values())
    assert not set(train) & set(validation)
    share = sum(map(len, validation)) / sum(map(len, texts.values()))
    assert 0.05 < share <= 0.1
    assert corpus.num_bytes("validation") == sum(map(len, validation))


def test_equal_documents_are_on_the_same_side(tmp_path):
    texts = write_texts(tmp_path / "text", 30)
    for name, text in texts.items():
        (tmp_path / "text" / f"{name}.copy").write_bytes(text)
    corpus = corpus_of(config(tmp_path, tmp_path / "text", validation_fraction=0.3))
    train, validation = (documents_in(corpus, split) for split in SPLITS)
    assert validation and not set(train) & set(validation)
    assert len(train) + len(validation) == 60


def test_where_finds_the_file_and_the_offset(tmp_path):
    texts = write_texts(tmp_path / "text")
    corpus = corpus_of(config(tmp_path, tmp_path / "text"))
    for start in (0, 1, 777, 5000, len(corpus.tokens["train"]) - 20):
        place = corpus.where("train", start)
        text = np.frombuffer(texts[place["file"]], np.uint8)
        whole = np.concatenate([[256], text, [256]])
        got = corpus.tokens["train"][start : start + 5]
        at = place["offset_in_document"]
        expected = whole[at : at + 5]
        np.testing.assert_array_equal(got[: len(expected)], expected)


def test_one_text_is_split_by_position_at_a_character(tmp_path):
    text = "äöü€" * 500
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    settings = config(tmp_path, tmp_path / "one.txt")
    corpus = corpus_of(settings)
    (train,), (validation,) = (documents_in(corpus, split) for split in SPLITS)
    assert (train + validation).decode() == text
    assert train.decode() and validation.decode()
    assert abs(len(validation) / len(text.encode()) - 0.03) < 0.002
    assert "by position" in open_dataset(settings).describe()["sources"][0]["split"]


def test_a_position_split_may_fall_between_documents(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * 500)
    corpus = corpus_of(config(tmp_path, tmp_path / "*.txt", validation_fraction=0.4))
    assert sum(len(d) for split in SPLITS for d in documents_in(corpus, split)) == 1000
    assert documents_in(corpus, "validation") == [b"b" * 400]


def test_a_glob_names_what_a_folder_holds(tmp_path):
    write_texts(tmp_path / "text")
    (tmp_path / "text" / ".hidden").write_text("not text")
    by_folder = corpus_of(config(tmp_path, tmp_path / "text"))
    by_glob = corpus_of(config(tmp_path, tmp_path / "text" / "**" / "*.txt"))
    assert by_glob.identity == by_folder.identity
    assert by_glob.folder != by_folder.folder


def test_a_remote_listing_gives_the_same_corpus(tmp_path):
    """file:// takes the road of gs:// and s3://."""
    write_texts(tmp_path / "text")
    local = corpus_of(config(tmp_path, tmp_path / "text"))
    for end in ("", "/"):
        remote = corpus_of(config(tmp_path, f"file://{tmp_path}/text{end}"))
        assert remote.identity == local.identity
    some = corpus_of(config(tmp_path, f"file://{tmp_path}/text/part0/*.txt"))
    assert len(some.manifest["files"]) == 14
    one = corpus_of(config(tmp_path, f"file://{tmp_path}/text/part0/text00.txt"))
    assert [f["name"] for f in one.manifest["files"]] == ["text00.txt"]


def test_json_lines_give_the_field(tmp_path):
    texts = [f"document {i} \u00e9 " * (10 + i) for i in range(50)]
    lines = "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)) + "\n\n"
    (tmp_path / "x.jsonl").write_text(lines)
    settings = config(tmp_path, tmp_path / "x.jsonl", field="text", validation_fraction=0.1)
    corpus = corpus_of(settings)
    got = [d.decode() for split in SPLITS for d in documents_in(corpus, split)]
    assert sorted(got) == sorted(texts)
    assert corpus.manifest["split"] == "by content hash"


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_token_arrays_are_split_by_position(tmp_path, kind):
    tokens = np.random.default_rng(0).integers(0, 70000, 4000).astype(np.uint32)
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, tokens)
    else:
        tokens.tofile(path)
    settings = config(tmp_path, path, token_dtype="uint32" if kind == "bin" else None)
    dataset = open_dataset(settings)
    joined = np.concatenate([dataset.parts[0].tokens[split] for split in SPLITS])
    np.testing.assert_array_equal(joined, tokens)
    assert dataset.vocab_size == tokens.max() + 1
    assert dataset.tokenizer is None and dataset.num_bytes("validation") is None
    assert dataset.bytes_per_token("train") is None


def test_token_arrays_are_cut_at_their_end_of_document(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, rng.integers(50, 90)) for _ in range(60)]
    tokens = np.concatenate([np.append(d, 256) for d in documents]).astype(np.uint16)
    tokens.tofile(tmp_path / "x.bin")
    settings = config(
        tmp_path, tmp_path / "x.bin", token_dtype="uint16", end_of_document=256,
        validation_fraction=0.1,
    )  # fmt: skip
    dataset = open_dataset(settings)
    corpus = dataset.parts[0]
    got = [d for split in SPLITS for d in documents_in(corpus, split)]
    assert sorted(got) == sorted(d.astype(np.uint8).tobytes() for d in documents)
    assert isinstance(dataset.tokenizer, ByteTokenizer) and dataset.vocab_size == 257
    assert sum(dataset.num_bytes(split) for split in SPLITS) == sum(map(len, documents))


def write_records(path: Path, records: list[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records_of_text_and_of_tokens(tmp_path):
    texts = [b"record %d " % i * (10 + i) for i in range(40)]
    write_records(tmp_path / "x.array_record-00000-of-00001", texts)
    settings = config(tmp_path, tmp_path / "x.array_record*", validation_fraction=0.1)
    corpus = corpus_of(settings)
    assert sorted(d for s in SPLITS for d in documents_in(corpus, s)) == sorted(texts)

    as_tokens = [np.frombuffer(t, np.uint8).astype("<u2").tobytes() for t in texts]
    write_records(tmp_path / "y.array_record", as_tokens)
    settings = config(
        tmp_path, tmp_path / "y.array_record", token_dtype="uint16", end_of_document=256,
        validation_fraction=0.1,
    )  # fmt: skip
    corpus = corpus_of(settings)
    assert sorted(d for s in SPLITS for d in documents_in(corpus, s)) == sorted(texts)


def test_a_tokenizers_file_gives_its_tokens_and_the_texts_bytes(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    texts = write_texts(tmp_path / "text")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    bpe.train_from_iterator([t.decode() for t in texts.values()], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    settings = config(tmp_path, tmp_path / "text", tokenizer=str(tmp_path / "tokenizer.json"))
    dataset = open_dataset(settings)
    tokenizer = dataset.tokenizer
    assert tokenizer.end_of_document == 0 and dataset.vocab_size == bpe.get_vocab_size()
    tokens = dataset.parts[0].tokens["train"]
    ends = np.flatnonzero(tokens == 0)
    decoded = [tokenizer.decode(tokens[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)]
    assert set(decoded) <= set(texts.values())
    assert sum(dataset.num_bytes(s) for s in SPLITS) == sum(map(len, texts.values()))
    assert dataset.bytes_per_token("train") > 1
    assert tokenizer.decode(tokenizer.encode("naïve €")) == "naïve €".encode()


def test_the_byte_tokenizer_gives_back_what_it_got():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9] == tokenizer.encode("é".encode())
    assert tokenizer.decode([*tokenizer.encode(b"\x00\xff"), 256]) == b"\x00\xff"


def test_the_utf8_tokenizer_has_256_ids(tmp_path):
    tokenizer = load_tokenizer("utf8")
    assert tokenizer.decode([254, *tokenizer.encode("naïve €"), 255]) == "naïve €".encode()
    assert max(tokenizer.encode(bytes(range(256)))) < 254 == tokenizer.end_of_document
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_bytes(b"\xfe\xff" + bytes(range(65, 90)) * 9)
    dataset = open_dataset(config(tmp_path, tmp_path / "text", tokenizer="utf8", seq_len=16))
    tokens = np.asarray(dataset.parts[0].tokens["train"])
    assert dataset.vocab_size == 256 and tokens.max() == tokens[0] == 254
    row = tokenizer.decode(tokens[1:20])
    assert row.decode() == "\ufffd\ufffdABCDEFGHIJKLM"


def write_library(folder: Path) -> list[str]:
    """A library of its own, with everything that must be left out."""
    rng = np.random.default_rng(1)
    kept = ["os.py", "json/__init__.py", "json/decoder.py", "zoneinfo/_tzpath.py", "abc.py"]
    left_out = [
        "test/test_os.py", "json/tests/test_x.py", "idlelib/idle_test/x.py", "README.txt",
        "site-packages/numpy/a.py", "_sysconfigdata__linux.py", "config-3.12/x.py",
        "__pycache__/os.py", "lib2to3/tests/data/x.py",
    ]  # fmt: skip
    for name in kept + left_out:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.integers(32, 127, 400).astype(np.uint8).tobytes())
    return sorted(kept)


@pytest.mark.parametrize("prefix", ["", "lib/python3.12/"])
def test_a_zipped_library_is_the_same_corpus(tmp_path, monkeypatch, prefix):
    kept = write_library(tmp_path / "lib")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    assert [file.name for file in files.stdlib_files()] == kept
    unzipped = corpus_of(config(tmp_path, "stdlib"))

    archive = tmp_path / "python312.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in (tmp_path / "lib").rglob("*"):
            out.write(path, prefix + path.relative_to(tmp_path / "lib").as_posix())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setattr(files.sys, "path", ["", str(archive / "inside")])
    zipped = corpus_of(config(tmp_path, "stdlib"))
    assert zipped.folder != unzipped.folder
    assert zipped.identity == unzipped.identity


def test_the_running_library_is_a_corpus(tmp_path):
    dataset = open_dataset(config(tmp_path, "stdlib", seq_len=256))
    about = dataset.describe()["sources"][0]
    names = [f["name"] for f in dataset.parts[0].manifest["files"]]
    assert names == sorted(names) and {"os.py", "json/decoder.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    sizes = {split: about["splits"][split]["bytes"] for split in SPLITS}
    assert sum(sizes.values()) > 5e6
    assert 0.02 < sizes["validation"] / sum(sizes.values()) <= 0.03
    assert about["python"].startswith("3.") and len(about["sha256"]) == 64
    json.dumps(dataset.describe())


def test_identity_follows_the_content_not_the_clock_or_the_place(tmp_path):
    write_texts(tmp_path / "text")
    write_texts(tmp_path / "elsewhere")
    first = corpus_of(config(tmp_path, tmp_path / "text"))
    other = corpus_of(config(tmp_path, tmp_path / "elsewhere", cache_dir=str(tmp_path / "c2")))
    assert other.identity == first.identity
    (tmp_path / "text/part0/text00.txt").write_text("changed")
    assert corpus_of(config(tmp_path, tmp_path / "text")).identity != first.identity


def files_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_second_opening_reads_the_cache(tmp_path, monkeypatch):
    write_texts(tmp_path / "text")
    settings = config(tmp_path, tmp_path / "text")
    first = corpus_of(settings)

    def must_not_build(*args):
        raise AssertionError("built again")

    monkeypatch.setattr("effattn.data.corpus._build", must_not_build)
    assert corpus_of(settings).identity == first.identity


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "garbage"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    write_texts(tmp_path / "text")
    settings = config(tmp_path, tmp_path / "text")
    folder = corpus_of(settings).folder
    before = files_of(folder)
    victim = folder / ("train.bin" if damage in ("truncate", "flip") else "manifest.json")
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "delete":
        (folder / "validation.documents.npy").unlink()
    else:
        victim.write_text("{}" if damage == "manifest" else "not json")
    corpus_of(settings)
    assert files_of(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_two_builds_at_once_do_no_harm(tmp_path):
    write_texts(tmp_path / "text")
    settings = config(tmp_path, tmp_path / "text")
    start, found = threading.Barrier(4), []

    def build():
        start.wait()
        found.append(corpus_of(settings).identity)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError):
        corpus_of(config(tmp_path, tmp_path / "x.jsonl", field="text"))
    assert not list((tmp_path / "cache").iterdir())
