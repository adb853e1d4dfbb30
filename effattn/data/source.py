"""From files to documents: text, JSON lines, token arrays and ArrayRecord."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from effattn.checks import check_in
from effattn.data.config import IMAGES, TASKS, DataConfig
from effattn.data.files import File, list_files, stdlib_files

_JSON_LINES = (".jsonl", ".ndjson")
_ARRAYS = (".npy", ".bin")
_RECORDS = (".array_record", ".arrayrecord")


class Document(NamedTuple):
    """content: bytes of text, or an array of token ids. file: index into the source's files."""

    file: int
    content: bytes | np.ndarray


@dataclass(frozen=True)
class Source:
    """documents(): the same documents in the same order at every call; empty ones left out.

    pretokenized: the documents are token ids, not bytes.
    """

    name: str
    files: list[File]
    pretokenized: bool
    documents: Callable[[], Iterator[Document]]


def open_source(source: str, config: DataConfig) -> Source:
    """Finds the files of `source`; reads none of them yet. Raises ValueError in a sentence."""
    if source == "stdlib":
        files = stdlib_files()
    else:
        # A bare word is meant as a name, unless something of that name lies here.
        if not any(mark in source for mark in "./\\*?[~") and not _exists(source):
            check_in("data.source", source, ("stdlib", *TASKS, *IMAGES))
        files = list_files(source)
    readers = [_reader(file, config) for file in files]
    kinds = {reader in (_npy, _bin, _token_records) for reader in readers}
    if len(kinds) > 1:
        raise ValueError(f"data.source: {source!r} mixes text with token arrays; name one of them")
    pretokenized = kinds.pop()

    def documents() -> Iterator[Document]:
        for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
            for content in reader(file, config):
                if len(content):
                    yield Document(number, content)

    return Source(source, files, pretokenized, documents)


def _exists(source: str) -> bool:
    try:
        return bool(list_files(source))
    except ValueError:
        return False


def _reader(file: File, config: DataConfig) -> Callable[[File, DataConfig], Iterator]:
    ending = PurePosixPath(file.name).suffix.lower()
    if ending in _JSON_LINES:
        return _json_lines
    if ending in _ARRAYS:
        return _npy if ending == ".npy" else _bin
    # Sharded files are named name.array_record-00000-of-00008.
    if ending.split("-")[0] in _RECORDS:
        return _text_records if config.token_dtype is None else _token_records
    return _text


def _text(file: File, config: DataConfig) -> Iterator[bytes]:
    yield file.read()


def _json_lines(file: File, config: DataConfig) -> Iterator[bytes]:
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file.name}, line {number}: not JSON: {error}") from error
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            if config.field is None:
                raise ValueError(
                    f"data.field: {file.name} is JSON lines; name the field that holds the text "
                    f"(its line {number} has {found})"
                )
            if not isinstance(record, dict) or not isinstance(record.get(config.field), str):
                raise ValueError(
                    f"{file.name}, line {number}: no text in field data.field={config.field!r}; "
                    f"the line has {found}"
                )
            # A lone surrogate is legal JSON, though not legal UTF-8.
            yield record[config.field].encode("utf-8", "replace")


def _npy(file: File, config: DataConfig) -> Iterator[np.ndarray]:
    try:
        if file.path is not None:
            array = np.load(file.path, mmap_mode="r", allow_pickle=False)
        else:
            with file.open() as stream:
                array = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file.name}: cannot be read as .npy: {error}") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"{file.name}: token ids must be integers, got {array.dtype}")
    yield from _cut(array.reshape(-1), config)


def _bin(file: File, config: DataConfig) -> Iterator[np.ndarray]:
    if config.token_dtype is None:
        raise ValueError(
            f"data.token_dtype: {file.name} does not say the type of its numbers; "
            "state it, for example uint16"
        )
    dtype = np.dtype(config.token_dtype).newbyteorder("<")
    content: bytes | np.ndarray = b""
    if file.path is None:
        content = file.read()
    elif file.path.stat().st_size:  # an empty file cannot be mapped
        content = np.memmap(file.path, np.uint8, "r")
    if len(content) % dtype.itemsize:
        raise ValueError(
            f"{file.name}: {len(content)} bytes are no whole number of {config.token_dtype}"
        )
    yield from _cut(np.frombuffer(content, dtype), config)


def _cut(tokens: np.ndarray, config: DataConfig) -> Iterator[np.ndarray]:
    """The documents of a token array, without the ids that end them."""
    if config.end_of_document is None:
        yield tokens
        return
    ends = np.flatnonzero(tokens == config.end_of_document)
    starts = np.concatenate([[0], ends + 1])
    for start, end in zip(starts, np.append(ends, len(tokens)), strict=True):
        yield tokens[start:end]


def _text_records(file: File, config: DataConfig) -> Iterator[bytes]:
    from array_record.python import array_record_module

    with _local_path(file) as path:
        reader = array_record_module.ArrayRecordReader(path)
        try:
            for start in range(0, reader.num_records(), 1024):
                stop = min(start + 1024, reader.num_records())
                yield from reader.read(list(range(start, stop)))
        finally:
            reader.close()


def _token_records(file: File, config: DataConfig) -> Iterator[np.ndarray]:
    dtype = np.dtype(config.token_dtype).newbyteorder("<")
    for number, record in enumerate(_text_records(file, config)):
        if len(record) % dtype.itemsize:
            raise ValueError(
                f"{file.name}, record {number}: {len(record)} bytes are no whole number of "
                f"{config.token_dtype}"
            )
        yield from _cut(np.frombuffer(record, dtype), config)


@contextmanager
def _local_path(file: File) -> Iterator[str]:
    if file.path is not None:
        yield str(file.path)
        return
    with tempfile.NamedTemporaryFile(suffix=".array_record") as copy:
        copy.write(file.read())
        copy.flush()
        yield copy.name
