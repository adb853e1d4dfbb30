"""Tables and figures of the pages in docs/results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BY_HAND = "\n## What it shows\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(page: Path, text: str) -> None:
    """Keeps what stands on the page from `BY_HAND` on: what a reader makes of the numbers."""
    old = page.read_text() if page.exists() else ""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text + old[old.index(BY_HAND) :] if BY_HAND in old else text)


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """(figure, axes), without pyplot's global state; `save_figure` writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The date of making is on the page; without it in the file, equal figures are equal files.
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
