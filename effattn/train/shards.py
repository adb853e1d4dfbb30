"""Which array files of a checkpoint are missing, found out before any of them is read.

The arrays of a checkpoint are cut into shards, many to a file, and the files are listed in trees
(OCDBT, tensorstore's format). Orbax reads shards and trees at once, and would say of a missing file
which slice of which array it was about to fill. Here the trees alone are read.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    import tensorstore
    from etils import epath

MANIFEST = "manifest.ocdbt"


class _Extent(NamedTuple):
    """A part of a file, counted from the folder of the item, and what it holds."""

    file: str
    end: int  # bytes
    array: str  # empty for a node of the tree


class _Unlisted(Exception):
    """A file of the tree itself is not whole."""


def missing_shards(folder: "epath.Path") -> str | None:
    """A clause on the files that the arrays in `folder` lack; None where all are there and whole.

    folder: one item of a checkpoint, of the local disk or of gs:// or s3://. Sizes are looked at,
    contents are not: that a file holds the numbers that were saved is for a checksum to say.
    """
    import tensorstore

    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing, which lists its arrays"
    store = tensorstore.KvStore.open(_url(folder)).result()
    ends: dict[str, int] = {}
    arrays: dict[str, set[str]] = {}
    try:
        for extent in _extents(store, folder):
            ends[extent.file] = max(extent.end, ends.get(extent.file, 0))
            arrays.setdefault(extent.file, set()).add(extent.array)
    except _Unlisted as unlisted:
        return str(unlisted)
    files = sorted(ends)
    with ThreadPoolExecutor(32) as pool:  # a bucket answers slowly, but many questions at once
        states = list(pool.map(lambda file: _state(folder, file, ends[file]), files))
    bad = [(file, state) for file, state in zip(files, states, strict=True) if state is not None]
    if not bad:
        return None
    file, state = bad[0]
    rest = f" (and {len(bad) - 1} more of its files)" if len(bad) > 1 else ""
    return f"{file} {state}{rest}, which holds shards of {_listed(sorted(arrays[file]))}"


def _extents(store: "tensorstore.KvStore", folder: "epath.Path") -> Iterator[_Extent]:
    """Every part of a file that the newest version of the tree points to."""
    from tensorstore import ocdbt

    root = ocdbt.dump(store).result()["versions"][-1]["root"]
    # Each with the beginning that all keys below it have lost.
    nodes = [(root["location"], b"")] if "location" in root else []
    while nodes:
        location, prefix = nodes.pop()
        node = _extent(location, "")
        state = _state(folder, node.file, node.end)
        if state is not None:
            raise _Unlisted(f"{node.file} {state}, which lists its arrays")
        for entry in ocdbt.dump(store, location).result()["entries"]:
            if "location" in entry:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            elif "indirect_value" in entry:
                array = (prefix + entry["key"]).decode().rpartition("/")[0]
                yield _extent(entry["indirect_value"], array)


def _extent(location: str, array: str) -> _Extent:
    """`location` is kind:folder:name:offset:length, with the names escaped as in a URL."""
    _, base, name, offset, length = location.split(":")
    return _Extent(unquote(base) + unquote(name), int(offset) + int(length), array)


def _state(folder: "epath.Path", file: str, end: int) -> str | None:
    """What is wrong with a file that must have `end` bytes."""
    try:
        size = (folder / file).stat().length
    except FileNotFoundError:
        return "is missing"
    return f"is cut short ({size} of {end} bytes)" if size < end else None


def _listed(names: list[str]) -> str:
    shown = names[:2]
    if len(names) > 3:
        return f"{', '.join(shown)} and {len(names) - 2} other arrays"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _url(folder: "epath.Path") -> str:
    text = str(folder)
    return f"{text if '://' in text else f'file://{text}'}/"
