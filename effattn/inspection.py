"""What an adaptive model did with a text: where its chunks begin, how deep its tokens went.

A model shows itself by one of two methods: `boundaries(tokens, info)`, one `Boundaries` per stage,
or `depths(tokens, info)`, an int per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from effattn.batch import whole_rows
from effattn.data.tokenizer import Tokenizer

# Two shades to tell neighbouring chunks apart; depths from light to dark.
CHUNK_COLOURS = ("#cfe3f5", "#f8d9b0")
DEPTH_COLOURS = ("#f1f5fb", "#c6d9f0", "#8fb4dd", "#5a8ac6", "#2f62a3", "#173c73")
COLUMNS = 88  # characters per line of a picture


class Picture(NamedTuple):
    """One colouring of a text. groups: an int per byte, which says its colour.

    title: what is shown. colours: of the groups, taken in turn. begins: where a group begins, for
    a terminal without colours; None where groups are no runs.
    """

    title: str
    groups: np.ndarray
    colours: tuple[str, ...]
    begins: np.ndarray | None


class Inspection(NamedTuple):
    """text: the bytes. pictures: one per stage, or one of depths. figures: (name, value)."""

    text: bytes
    pictures: list[Picture]
    figures: list[tuple[str, str]]


def inspect(model: Any, text: bytes, tokenizer: Tokenizer) -> Inspection:
    """What the model does with `text`, read as one document.

    Raises ValueError for a model that shows nothing, a text that is empty, and a tokenizer of
    anything but bytes.
    """
    if not (hasattr(model, "boundaries") or hasattr(model, "depths")):
        raise ValueError(
            f"--workdir: got a run of {type(model).__name__}, expected a model with learned chunks "
            "(hnet) or depths (mor)"
        )
    if tokenizer.identity not in ("bytes", "utf8"):
        raise ValueError("--workdir: the run reads other tokens than bytes; only bytes are drawn")
    if not text:
        raise ValueError("--text: got an empty text, expected at least one byte")
    row = np.asarray([tokenizer.encode(text)], np.int32)
    graphdef, state = nnx.split(model)
    method = "boundaries" if hasattr(model, "boundaries") else "depths"

    @jax.jit
    def run(state: nnx.State, row: jax.Array) -> Any:
        return getattr(nnx.merge(graphdef, state), method)(row, whole_rows(row))

    found = jax.device_get(run(state, row))
    if method == "depths":
        return _of_depths(text, np.asarray(found)[0])
    return _of_boundaries(text, [np.asarray(stage.begins)[0] for stage in found])


def _of_boundaries(text: bytes, stages: Sequence[np.ndarray]) -> Inspection:
    pictures, figures = [], []
    for stage, begins in enumerate(stages):
        count = int(begins.sum())
        title = f"stage {stage}: {count:,} chunks, {len(text) / max(count, 1):.2f} bytes each"
        pictures.append(Picture(title, np.cumsum(begins), CHUNK_COLOURS, begins))
        figures.append((f"stage {stage}: bytes per chunk", f"{len(text) / max(count, 1):.3f}"))
        for name, places in (("word starts", word_starts(text)), ("spaces", spaces(text))):
            hit, chance, found = on_places(begins, places)
            figures.append((f"stage {stage}: boundaries on {name}", f"{hit:.3f}"))
            figures.append((f"stage {stage}: bytes that are {name} (chance)", f"{chance:.3f}"))
            figures.append((f"stage {stage}: {name} that are boundaries", f"{found:.3f}"))
    return Inspection(text, pictures, figures)


def _of_depths(text: bytes, depths: np.ndarray) -> Inspection:
    deepest = int(depths.max())
    title = f"recursions per token: {depths.mean():.2f} on average, {deepest} at most"
    figures = [
        (f"tokens with {depth} recursions", f"{np.mean(depths == depth):.3f}")
        for depth in range(deepest + 1)
    ]
    return Inspection(text, [Picture(title, depths, DEPTH_COLOURS, None)], figures)


# ---- words


def word_starts(text: bytes) -> np.ndarray:
    """bool per byte: the first of a run of letters, digits, underscores and bytes beyond ASCII."""
    letters = _letters(text)
    return letters & ~np.concatenate([[False], letters[:-1]])


def spaces(text: bytes) -> np.ndarray:
    """bool per byte: white space before a word, where many tokenizers begin their tokens."""
    starts = np.concatenate([word_starts(text)[1:], [False]])
    return starts & np.isin(np.frombuffer(text, np.uint8), list(b" \t\n\r"))


def _letters(text: bytes) -> np.ndarray:
    codes = np.frombuffer(text, np.uint8)
    named = [c for c in range(128) if chr(c).isalnum() or c == ord("_")]
    return np.isin(codes, named) | (codes >= 128)


def on_places(begins: np.ndarray, places: np.ndarray) -> tuple[float, float, float]:
    """(share of boundaries on the places, share of bytes that are places: what chance would hit,
    share of the places that are boundaries); the first byte, always a boundary, is left out."""
    begins, places = begins[1:], places[1:]
    return (
        float(np.mean(places[begins])) if begins.any() else 0.0,
        float(np.mean(places)) if len(places) else 0.0,
        float(np.mean(begins[places])) if places.any() else 0.0,
    )


# ---- drawing


def in_terminal(text: bytes, picture: Picture, *, colour: bool) -> str:
    """The text with coloured grounds, or with a bar before every group that begins."""
    marks = [None] * len(text) if picture.begins is None else picture.begins.tolist()
    pieces, last = [f"{picture.title}\n"], None
    characters = _characters(text)
    for (place, character), mark in zip(characters, (marks[p] for p, _ in characters), strict=True):
        group = int(picture.groups[place])
        if not colour:
            digit = "" if mark is not None or group == last else f"<{group}>"
            pieces.append(("|" if mark else digit) + character)
        else:
            ground = picture.colours[min(group, len(picture.colours) - 1)]
            if picture.begins is not None:
                ground = picture.colours[group % len(picture.colours)]
            red, green, blue = (int(ground[i : i + 2], 16) for i in (1, 3, 5))
            ink = 30 if red + green + blue > 360 else 97
            shown = "\x1b[0m\n" if character == "\n" else character
            pieces.append(f"\x1b[{ink};48;2;{red};{green};{blue}m{shown}")
        last = group
    return "".join(pieces) + ("\x1b[0m" if colour else "")


def draw(inspection: Inspection) -> Any:
    """A matplotlib figure, one panel per picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _rows(inspection.text)
    height = 0.17 * len(rows) + 0.5
    count = len(inspection.pictures)
    figure = Figure(figsize=(0.085 * COLUMNS + 0.4, height * count), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes, picture in zip(panels, inspection.pictures, strict=True):
        axes.set_xlim(0, COLUMNS)
        axes.set_ylim(len(rows), 0)
        axes.axis("off")
        axes.set_title(picture.title, fontsize=9, loc="left")
        for y, row in enumerate(rows):
            for x, (place, character) in enumerate(row):
                group = int(picture.groups[place])
                if picture.begins is None:
                    group = min(group, len(picture.colours) - 1)
                ground = picture.colours[group % len(picture.colours)]
                axes.fill_between([x, x + 1], y, y + 1, color=ground, linewidth=0)
                dark = sum(int(ground[i : i + 2], 16) for i in (1, 3, 5)) <= 360
                style = {"family": "monospace", "fontsize": 7, "ha": "center", "va": "center"}
                ink = "white" if dark else "black"
                axes.text(x + 0.5, y + 0.55, character, color=ink, parse_math=False, **style)
    return figure


def _characters(text: bytes) -> list[tuple[int, str]]:
    """(place of the first byte, character); bytes that are no UTF-8 as replacement characters."""
    places, at = [], 0
    for character in text.decode("utf-8", "surrogateescape"):
        broken = "\udc80" <= character <= "\udcff"
        places.append((at, "\ufffd" if broken else character))
        at += 1 if broken else len(character.encode())
    return places


def _rows(text: bytes) -> list[list[tuple[int, str]]]:
    """Lines of a picture: broken at newlines, which show as a sign, and at the last column."""
    rows: list[list[tuple[int, str]]] = [[]]
    for place, character in _characters(text):
        if len(rows[-1]) == COLUMNS:
            rows.append([])
        shown = {"\n": "\u21b5", "\t": "\u2192"}.get(character, character)
        rows[-1].append((place, shown if shown.isprintable() else "\u00b7"))
        if character == "\n":
            rows.append([])
    return rows if rows[-1] else rows[:-1]
