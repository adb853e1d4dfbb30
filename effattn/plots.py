"""Curves as PNG files: those of a run, and a figure for others to draw on."""

from typing import TYPE_CHECKING, Any

from effattn.train.metrics import read_lines

if TYPE_CHECKING:
    from etils import epath


def plot_run(workdir: "epath.Path") -> list["epath.Path"]:
    """Draws plots/loss.png and plots/throughput.png from a run's metrics; returns their paths."""
    steps = read_lines(workdir / "metrics.jsonl")
    evaluations = read_lines(workdir / "evaluations.jsonl")
    if not steps:
        return []
    folder = workdir / "plots"
    folder.mkdir(parents=True, exist_ok=True)

    loss, axes = new_figure("step", "loss, nats per token")
    axes.plot(*_column(steps, "loss"), linewidth=0.8, label="training")
    if evaluations:
        axes.plot(*_column(evaluations, "loss"), marker="o", label="validation")
    axes.legend()

    throughput, axes = new_figure("step", "tokens per second")
    axes.plot(*_column(steps, "tokens_per_second"), linewidth=0.8)
    axes.set_ylim(bottom=0)
    return [
        save_figure(loss, folder / "loss.png"),
        save_figure(throughput, folder / "throughput.png"),
    ]


def _column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def new_figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    """(figure, axes)."""
    # Figure instead of pyplot: no global state, no display, whatever backend is configured.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Any) -> Any:
    """Writes a PNG to a path with `open` and returns the path."""
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return path
