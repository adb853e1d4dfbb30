"""Curves of a run as PNG files."""

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

    loss, axes = _figure("loss, nats per token")
    axes.plot(*_column(steps, "loss"), linewidth=0.8, label="training")
    if evaluations:
        axes.plot(*_column(evaluations, "loss"), marker="o", label="validation")
    axes.legend()

    throughput, axes = _figure("tokens per second")
    axes.plot(*_column(steps, "tokens_per_second"), linewidth=0.8)
    axes.set_ylim(bottom=0)
    return [
        _save(loss, folder / "loss.png"),
        _save(throughput, folder / "throughput.png"),
    ]


def _column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _figure(label: str) -> tuple[Any, Any]:
    # Figure instead of pyplot: no global state, no display, whatever backend is configured.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: "epath.Path") -> "epath.Path":
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return path
