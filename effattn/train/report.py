"""What a run writes when it ends: result.json, the plots and summary.md."""

import json
from typing import TYPE_CHECKING, Any

import jax

from effattn import versions as installed
from effattn.plots import plot_run

if TYPE_CHECKING:
    from etils import epath


def versions() -> dict[str, str | None]:
    """Versions of everything that a run's numbers hang on, and the device they were made on."""
    device = jax.devices()[0]
    return {
        **installed.versions(),
        "device": f"{device.platform} {device.device_kind} x {jax.device_count()}",
    }


def write_report(workdir: "epath.Path", result: dict[str, Any]) -> None:
    """result.json, the plots and summary.md of a finished run."""
    temporary = workdir / "result.json.tmp"
    temporary.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    temporary.replace(workdir / "result.json")
    plots = plot_run(workdir)
    (workdir / "summary.md").write_text(summary(result, [f"plots/{path.name}" for path in plots]))


def summary(result: dict[str, Any], plots: list[str]) -> str:
    """A run's result as a page of Markdown."""
    lines = [
        f"# {result['name']}",
        "",
        f"{result['step']} steps, {result['parameters']:,} parameters, "
        f"{result['tokens']:,} training tokens.",
        "",
        "| | |",
        "|---|---|",
        f"| training loss (last step, nats per token) | {_number(result['loss'])} |",
    ]
    for name, value in result["validation"].items():
        lines.append(f"| validation {name.replace('_', ' ')} | {_number(value)} |")
    lines += [
        f"| tokens per second | {_number(result['tokens_per_second'])} |",
        f"| model FLOPs per token, forward and backward | {_number(result['flops_per_token'])} |",
        f"| data identity | `{result['data']['identity']}` |",
        "",
        *[f"![{plot}]({plot})\n" for plot in plots],
        "## Versions",
        "",
        *[f"- {name} {version}" for name, version in result["versions"].items()],
        "",
        "`config.json` holds the whole config, `metrics.jsonl` every step.",
        "",
    ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
