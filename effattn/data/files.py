"""Where a corpus's files lie: a folder, a glob, the standard library (zipped or not), a bucket.

The one place that knows about paths, zip archives and remote stores.
"""

import glob
import io
import os
import re
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

_REMOTE = re.compile(r"^(gs|s3|file)://")
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """name: relative to the corpus, with "/"; part of the corpus's identity.

    stamp: changes when the content may have. path: None unless it is a plain local file.
    """

    name: str
    stamp: str
    open: Callable[[], BinaryIO]
    path: Path | None = None

    def read(self) -> bytes:
        with self.open() as stream:
            return stream.read()


def list_files(source: str) -> list[File]:
    """The files that `source` names, sorted by name: one file, a folder's, a glob's, a bucket's.

    Hidden files and folders are left out of folders. Raises ValueError when there is none.
    """
    if _REMOTE.match(source):
        files = _remote_files(source)
    else:
        files = _local_files(Path(source).expanduser())
    if not files:
        raise ValueError(f"data.source: {source!r} holds no file")
    return sorted(files, key=lambda file: file.name)


def _local(path: Path, root: Path) -> File:
    status = path.stat()
    return File(
        path.relative_to(root).as_posix(),
        f"{status.st_size} {status.st_mtime_ns}",
        lambda: path.open("rb"),
        path,
    )


def _local_files(path: Path) -> list[File]:
    if path.is_file():
        return [_local(path, path.parent)]
    if path.is_dir():
        return [_local(child, path) for child in _walk(path, lambda name: name.startswith("."))]
    if glob.has_magic(str(path)):
        # The names are relative to the part of the pattern before its first wildcard.
        plain = 0
        while not glob.has_magic(path.parts[plain]):
            plain += 1
        root = Path(*path.parts[:plain])
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        files = [_local(child, root) for child in found if child.is_file()]
        if not files:
            raise ValueError(f"data.source: the pattern {str(path)!r} matches no file")
        return files
    siblings = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(f"data.source: no file or folder {str(path)!r}{hint}")


def _walk(root: Path, skip: Callable[[str], bool]) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(folder, name) for name in names if not skip(name)]
    return [path for path in found if path.is_file()]


def _remote_files(source: str) -> list[File]:
    """Objects under a prefix, or, with wildcards, those that match (here `*` crosses "/")."""
    import tensorstore

    scheme, _, rest = source.partition("://")
    parts = rest.split("/")
    plain = 0
    while plain < len(parts) and not glob.has_magic(parts[plain]):
        plain += 1
    pattern = "/".join(parts[plain:])
    try:
        if pattern:
            return _objects(tensorstore, f"{scheme}://{'/'.join(parts[:plain])}/", pattern)
        base, _, name = source.rpartition("/")
        with suppress(ValueError):  # a folder, to stores that know folders
            if name and (files := _objects(tensorstore, f"{base}/", name)):
                return files
        return _objects(tensorstore, source.rstrip("/") + "/", None)
    except Exception as error:  # the stores raise types of their own, credentials included
        raise ValueError(f"data.source: cannot list {source!r}: {error}") from error


def _objects(tensorstore: Any, base: str, pattern: str | None) -> list[File]:
    def at(key: bytes) -> Callable[[], BinaryIO]:
        return lambda: io.BytesIO(store.read(key).result().value)

    store = tensorstore.KvStore.open(base).result()
    if pattern is None or glob.has_magic(pattern):
        keys = store.list().result()
    else:
        keys = [pattern.encode()]
    files = []
    for key in keys:
        name = key.decode()
        if name.endswith("/") or not (pattern is None or fnmatchcase(name, pattern)):
            continue
        head = store.read(key, byte_range=slice(0, 0)).result()
        if head.state == "missing":
            continue
        stamp = head.stamp.generation.hex()
        files.append(File(name, stamp, at(key)))
    return files


def _in_library(name: str) -> bool:
    """Sources only, without tests, installed packages and what the build wrote for one machine."""
    folders = name.split("/")[:-1]
    return (
        name.endswith(".py")
        and not _NOT_LIBRARY.intersection(folders)
        and not any(folder.startswith("config-") for folder in folders)
        and not name.startswith("_sysconfigdata")
    )


def _zipped_library(archive: Path) -> list[File]:
    with zipfile.ZipFile(archive) as members:
        infos = {info.filename: info for info in members.infolist() if not info.is_dir()}
    roots = [name for name in infos if name == "os.py" or name.endswith("/os.py")]
    if not roots:
        return []
    prefix = min(roots, key=len)[: -len("os.py")]

    def member(name: str) -> Callable[[], BinaryIO]:
        def read() -> BinaryIO:
            with zipfile.ZipFile(archive) as members:
                return io.BytesIO(members.read(name))

        return read

    return [
        File(
            name[len(prefix) :],
            f"{info.file_size} {info.CRC}",
            member(name),
        )
        for name, info in infos.items()
        if name.startswith(prefix) and _in_library(name[len(prefix) :])
    ]


def stdlib_files() -> list[File]:
    """The standard library's .py files, tests excluded, sorted by path.

    Found in the library's folder, or in the zip archive that the interpreter imports it from.
    Raises ValueError where the interpreter was shipped without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    places = [folder, *(Path(entry) for entry in sys.path if entry)]
    files: list[File] = []
    if (folder / "os.py").is_file():
        found = _walk(folder, lambda name: name in _NOT_LIBRARY)
        files = [_local(path, folder) for path in found if path.suffix == ".py"]
        files = [file for file in files if _in_library(file.name)]
    for place in places:
        # An entry may also point into an archive: python312.zip/lib.
        for archive in (place, *place.parents):
            if not files and archive.is_file() and zipfile.is_zipfile(archive):
                files = _zipped_library(archive)
    if not files:
        raise ValueError(
            f"data.source: this Python has no standard library sources in {str(folder)!r} nor in "
            "a zip archive on sys.path; name a file or folder of text as data.source"
        )
    return sorted(files, key=lambda file: file.name)
