"""Plans of large runs, compiled for TPUs that are not here, and kept in docs/plans.

  python scripts/plans.py                     all of them, one after another
  python scripts/plans.py based_1b3 mor_1b7   some

Each is one `effattn plan`, whose command stands in its page. A plan that does not fit, or takes
more than LIMIT_SECONDS or LIMIT_GIB to compile, makes the exit code 1.
"""

import sys
from pathlib import Path

from effattn.cli import main
from effattn.plan.report import read

PAGES = Path(__file__).resolve().parent.parent / "docs" / "plans"
LIMIT_SECONDS, LIMIT_GIB = 360, 8

# name: (config, topology, config values)
PLANS: dict[str, tuple[str, str, dict[str, object]]] = {
    "transformer_8b_1m": (
        "transformer_8b:1m",
        "v5p:4x4x8",  # v5p-256
        {"mesh.sequence": 16, "mesh.tensor": 8, "memory.residual_on_host": True},
    ),
    "transformer_8b_500k": (
        "transformer_8b:500k",
        "v5p:2x2x2",
        {
            "mesh.sequence": 8,
            "memory.residual_on_host": True,
            "memory.residual_dtype": "bfloat16",
            "memory.mlp_tile": 32_768,
        },
    ),
    "lightning_7b_1m": (
        "lightning_7b",
        "v5p:4x4x8",
        {
            "data.seq_len": 1_048_576,
            "data.batch_size": 8,
            "mesh.fsdp": 8,
            "mesh.sequence": 16,
            "sequence.kind": "ring",
            "model.remat": "full",
            "memory.mlp_tile": 131_072,
            "train.loss_tile": 65_536,
        },
    ),
    "based_1b3": ("based_1b3", "v5e:16x16", {"mesh.fsdp": 16}),
    "hnet_1stage_xl": ("hnet:1stage_XL", "v5e:16x16", {"mesh.fsdp": 16}),
    "mor_1b7": ("mor_1b7", "v5e:16x16", {"mesh.fsdp": 16}),
    "moe_mixtral": ("moe_mixtral", "v5p:4x4x4", {"mesh.fsdp": 16, "mesh.tensor": 4}),
    "parscale_1b8_p8": (
        "parscale_1b8:8",
        "v5e:16x16",
        {"mesh.fsdp": 16, "train.accumulation": 4, "model.base.remat": "full"},
    ),
}


def make(name: str) -> bool:
    """Whether it is as it should be."""
    config, topology, values = PLANS[name]
    path = PAGES / f"{name}.json"
    arguments = ["plan", f"--config={config}", f"--topology={topology}", "--search=0"]
    arguments += [f"--config.{field}={value}" for field, value in values.items()]
    sys.argv[1:] = arguments  # what the plan records as its command
    files = [f"--json={path}", f"--markdown={path.with_suffix('.md')}"]
    code = main([*arguments, *files, f"--png={path.with_suffix('.png')}"])
    if code != 0:
        return False
    plan = read(path)
    return plan.compile_seconds <= LIMIT_SECONDS and plan.compile_host_gib <= LIMIT_GIB


def index() -> str:
    """The page that lists the plans that are there."""
    lines = [
        "# Plans of large runs",
        "",
        "Compiled for TPUs that are not there: static figures, no device time. `python "
        "scripts/plans.py NAME` makes a plan, on two cores in at most "
        f"{LIMIT_SECONDS // 60} minutes and {LIMIT_GIB} GiB.",
        "",
        "| plan | chips | parameters | rows x tokens | fits | GiB a chip | on the host | step, "
        "roofline | MFU at most | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(PAGES.glob("*.json")):
        plan = read(path)
        gib = {name: getattr(plan.memory, name) / 2**30 for name in ("total", "capacity", "host")}
        cells = [
            f"[{path.stem}]({path.stem}.md)",
            f"{plan.topology}, {plan.devices}",
            f"{plan.parameters / 1e9:.2f} B",
            f"{plan.batch_size} x {plan.seq_len:,}",
            "yes" if plan.fits else "no",
            f"{gib['total']:.1f} of {gib['capacity']:.0f}",
            f"{gib['host']:.0f} GiB" if gib["host"] else "",
            f"{plan.roofline.step:.2f} s" if plan.roofline else "",
            f"{plan.mfu_bound:.0%}" if plan.mfu_bound else "",
            f"{plan.compile_seconds:.0f} s, {plan.compile_host_gib:.1f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    names = sys.argv[1:] or list(PLANS)
    unknown = [name for name in names if name not in PLANS]
    if unknown:
        sys.exit(f"plans: got {', '.join(unknown)}, expected some of {', '.join(PLANS)}")
    PAGES.mkdir(parents=True, exist_ok=True)
    wrong = [name for name in names if not make(name)]
    (PAGES / "README.md").write_text(index())
    sys.exit(f"plans: {', '.join(wrong)} did not come out right" if wrong else 0)
