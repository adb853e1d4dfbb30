"""A corpus: documents tokenized once into memory-mapped arrays, split into train and validation.

A split's array is `end d0 end d1 end ...`, an end of document before the first one too: every
token of every document is then somebody's target. The folder is written under another name and
moved into place: a killed build leaves a hidden folder that nobody reads, and two builds at once
do no harm.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effattn.data.config import DataConfig
from effattn.data.source import Source, open_source
from effattn.data.tokenizer import ByteTokenizer, Tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """What stands in a cache folder.

    tokens[split]: memory-mapped ids. documents[split]: int64 [n, 2], per document the index of
    its first input (the end of document before it, where ends are kept) and its file's number.
    """

    folder: Path
    manifest: dict[str, Any]
    identity: str
    tokens: dict[str, np.ndarray]
    documents: dict[str, np.ndarray]

    @property
    def separator(self) -> int | None:
        """The end of document between documents; None in token arrays that keep none."""
        return self.manifest["separator"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def num_bytes(self, split: str) -> int | None:
        return self.manifest["splits"][split]["bytes"]

    def describe(self) -> dict[str, Any]:
        """The manifest for people: counts instead of lists of files and of hashes."""
        about = {k: v for k, v in self.manifest.items() if k not in ("files", "splits")}
        about["files"] = len(self.manifest["files"])
        about["splits"] = {
            split: {k: v for k, v in values.items() if k != "sha256"}
            for split, values in self.manifest["splits"].items()
        }
        return about | {"cache": str(self.folder)}

    def where(self, split: str, start: int) -> dict[str, Any]:
        """The document, its file, and how far into the document `start` is."""
        starts = self.documents[split][:, 0]
        document = max(int(np.searchsorted(starts, start, "right")) - 1, 0)
        file = self.manifest["files"][int(self.documents[split][document, 1])]["name"]
        return {
            "split": split,
            "file": file,
            "document": document,
            "offset_in_document": int(start - starts[document]),
            "start": int(start),
        }


def open_corpus(source: str, config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Opens the cached corpus of `source`; builds it where it is absent, stale or damaged.

    Raises ValueError when the source has no text or its cache cannot be written.
    """
    found = open_source(source, config)
    folder = _cache_folder(found, config, tokenizer)
    corpus = _load(folder)
    if corpus is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = _new_folder(folder)
        except OSError as error:
            raise ValueError(
                f"data.cache_dir: cannot write to {str(folder.parent)!r} ({error.strerror}); "
                "set data.cache_dir or EFFATTN_CACHE to a folder that can be written"
            ) from error
        try:
            _build(found, config, tokenizer, building)
            _put_in_place(building, folder)
        except OSError as error:  # the disk is full, or a file of the source cannot be read
            raise ValueError(
                f"data.source: {source!r} could not be built into {str(folder)!r}: {error}"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        corpus = _load(folder)
        if corpus is None:
            raise ValueError(f"data.cache_dir: the corpus just written to {folder} cannot be read")
    return corpus


def _cache_folder(source: Source, config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Named by all that decides the content, file times included: changed files, a new folder."""
    key = json.dumps(
        [
            FORMAT,
            source.name,
            tokenizer.identity,
            config.validation_fraction,
            config.field,
            config.token_dtype,
            config.end_of_document,
            sys.version_info[:3] if source.name == "stdlib" else None,
            [(str(file.path), file.name, file.stamp) for file in source.files],
        ]
    )
    label = "".join(c if c.isalnum() else "-" for c in source.name.rstrip("/").split("/")[-1])[:40]
    return config.cache_path / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _new_folder(beside: Path) -> Path:
    """A new hidden folder; unlike those of tempfile, others may read it as the umask allows."""
    folder = beside.with_name(f".{beside.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir()
    return folder


def _put_in_place(building: Path, folder: Path) -> None:
    try:
        os.replace(building, folder)
    except OSError:
        # A folder is there: whole, if another process was faster; else damaged.
        if _load(folder) is not None:
            return
        aside = _new_folder(folder)
        try:
            os.replace(folder, aside / "damaged")
            os.replace(building, folder)
        except OSError as error:
            if _load(folder) is None:
                raise ValueError(
                    f"data.cache_dir: cannot replace the damaged {folder}: {error}"
                ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def fingerprint(path: Path) -> str:
    """sha256 of the file's size and content; of 64 evenly spread MiB where it is larger."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    blocks = range(0, size, _BLOCK)
    step = max(1, len(blocks) // 64)
    with path.open("rb") as stream:
        for start in (*blocks[::step], max(0, size - _BLOCK)):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _load(folder: Path) -> Corpus | None:
    """The corpus in `folder`; None where anything is missing or not what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokens, documents = {}, {}
        for split in SPLITS:
            for name, expected in manifest["splits"][split]["sha256"].items():
                if fingerprint(folder / name) != expected:
                    return None
            # The plain view: indexing the memmap subclass costs several times as much.
            tokens[split] = np.asarray(np.memmap(folder / f"{split}.bin", manifest["dtype"], "r"))
            documents[split] = np.load(folder / f"{split}.documents.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Corpus(folder, manifest, _identity(manifest), tokens, documents)


def _identity(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Split:
    """Which documents are validation, and where one document is cut in two."""

    validation: np.ndarray  # bool per document
    cut_document: int | None = None
    cut: int = 0
    how: str = "by content hash"

    def parts(self, number: int, content: Any) -> list[tuple[str, Any]]:
        if number == self.cut_document:
            cut = _character_start(content, self.cut)
            return [("train", content[:cut]), ("validation", content[cut:])]
        return [(SPLITS[int(self.validation[number])], content)]


def _split(digests: list[bytes], sizes: np.ndarray, fraction: float) -> _Split:
    """Documents in the order of their hash go to validation until it has its share of the bytes.

    Equal documents go together; one that would overshoot is left to train. Where documents are so
    few or large that under half the share is met, the corpus is cut by position instead, its end
    being validation. (A threshold on each hash alone gave the standard library of Python 3.12
    8.3 % instead of 3 %, one file being 7 % of it.)
    """
    share = fraction * sizes.sum()
    by_hash: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        by_hash.setdefault(digest, []).append(number)
    validation, taken = np.zeros(len(sizes), bool), 0
    for digest in sorted(by_hash):
        same = by_hash[digest]
        if taken + sizes[same].sum() <= share:
            validation[same] = True
            taken += sizes[same].sum()
        if taken >= 0.9 * share:
            break
    if taken >= share / 2:
        return _Split(validation)
    ends = np.cumsum(sizes)
    cut = int(ends[-1] - max(1, round(share)))
    number = int(np.searchsorted(ends, cut, "right"))
    inside = cut - int(ends[number] - sizes[number])
    return _Split(
        np.arange(len(sizes)) >= number,
        number if inside else None,
        inside,
        "by position: too few documents to split by hash, so the end of the corpus is validation",
    )


def _character_start(content: Any, cut: int) -> int:
    """The last index <= cut where a character of UTF-8 begins."""
    while isinstance(content, bytes) and cut and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _build(source: Source, config: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    digests, sizes, owners = [], [], []
    per_file = [hashlib.sha256() for _ in source.files]
    largest = 0
    for document in source.documents():
        content = document.content
        if not isinstance(content, bytes):
            if content.min() < 0:
                raise ValueError(
                    f"{source.files[document.file].name}: token ids must be 0 or more, "
                    f"got {content.min()}"
                )
            largest = max(largest, int(content.max()))
            content = np.ascontiguousarray(content)
        digests.append(hashlib.sha256(content).digest())
        sizes.append(len(content))
        owners.append(document.file)
        per_file[document.file].update(content)
    if not sizes or sum(sizes) < 2:
        raise ValueError(
            f"data.source: {source.name!r} is empty: {len(source.files)} files with "
            f"{sum(sizes)} {'tokens' if source.pretokenized else 'bytes'} of text in all"
        )

    separator = config.end_of_document if source.pretokenized else tokenizer.end_of_document
    vocab_size = tokenizer.vocab_size
    # Token arrays made elsewhere need not fit the default tokenizer, which is then unused.
    own_vocabulary = source.pretokenized and config.tokenizer == "bytes" and largest > 256
    if source.pretokenized:
        if own_vocabulary or config.vocab_size is not None:
            needed = max(largest, -1 if separator is None else separator) + 1
            vocab_size = needed if config.vocab_size is None else config.vocab_size
        if largest >= vocab_size:
            raise ValueError(
                f"data.vocab_size: {source.name!r} has token id {largest}, expected ids below "
                f"{vocab_size}"
            )
    split = _split(digests, np.asarray(sizes), config.validation_fraction)
    dtype = "<u2" if max(vocab_size, separator or 0) <= 1 << 16 else "<u4"
    is_bytes = isinstance(tokenizer, ByteTokenizer) and not own_vocabulary
    # A token array gives its bytes only where ids are bytes and each of them is a target.
    knows_bytes = not source.pretokenized or (is_bytes and separator == tokenizer.end_of_document)

    splits = _write(source, split, folder, np.dtype(dtype), separator, tokenizer)
    for name in SPLITS:
        if not knows_bytes:
            splits[name]["bytes"] = None
    counts = np.bincount(np.asarray(owners), minlength=len(source.files))
    lengths = np.bincount(np.asarray(owners), weights=sizes, minlength=len(source.files))
    manifest = {
        "format": FORMAT,
        "source": source.name if source.name == "stdlib" else "files",
        "python": ".".join(map(str, sys.version_info[:3])) if source.name == "stdlib" else None,
        "tokenizer": None if own_vocabulary else tokenizer.identity,
        "vocab_size": vocab_size,
        "separator": separator,
        "dtype": dtype,
        "validation_fraction": config.validation_fraction,
        "split": split.how,
        "splits": splits,
        "files": [
            {
                "name": file.name,
                "documents": int(count),
                "length": int(length),  # bytes of text; of token arrays, ids
                "sha256": digest.hexdigest(),  # of the documents' content, joined
            }
            for file, count, length, digest in zip(
                source.files, counts, lengths, per_file, strict=True
            )
        ],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _write(
    source: Source,
    split: _Split,
    folder: Path,
    dtype: np.dtype,
    separator: int | None,
    tokenizer: Tokenizer,
) -> dict[str, dict[str, Any]]:
    """Writes both splits' arrays; what the manifest says of each."""
    encode: Callable[[Any], np.ndarray] = tokenizer.encode_document
    end = np.asarray([] if separator is None else [separator], dtype)
    streams = {name: (folder / f"{name}.bin").open("wb") for name in SPLITS}
    lengths = dict.fromkeys(SPLITS, 0)
    num_bytes = dict.fromkeys(SPLITS, 0)
    starts: dict[str, list[tuple[int, int]]] = {name: [] for name in SPLITS}
    for number, (file, content) in enumerate(source.documents()):
        for name, part in split.parts(number, content):
            ids = part if source.pretokenized else encode(part)
            starts[name].append((lengths[name], file))
            for piece in (end, ids):
                for at in range(0, len(piece), _BLOCK):
                    piece[at : at + _BLOCK].astype(dtype).tofile(streams[name])
                lengths[name] += len(piece)
            num_bytes[name] += len(part)
    described = {}
    for name in SPLITS:
        end.tofile(streams[name])
        streams[name].close()
        rows = np.asarray(starts[name], np.int64).reshape(-1, 2)
        np.save(folder / f"{name}.documents.npy", rows)
        described[name] = {
            "tokens": lengths[name] + len(end),
            "documents": len(rows),
            "bytes": num_bytes[name],
            "sha256": {
                file: fingerprint(folder / file)
                for file in (f"{name}.bin", f"{name}.documents.npy")
            },
        }
    return described
