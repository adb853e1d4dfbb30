"""A plan as one picture: memory against capacity, the roofline's terms, what collectives cost."""

import io
from typing import Any

from effattn.plan.report import Plan

GIB = 2**30
# Colours that the colour-blind tell apart (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442", "#999999")


def memory_slices(plan: Plan) -> list[tuple[str, int]]:
    """(name, bytes) that add up to what a device needs, nothing empty among them."""
    memory = plan.memory
    state = "optimizer state" if plan.kind == "train" else "decoding state"
    rest = memory.temporaries + max(0, memory.outputs - memory.aliased)
    parts = [(f"temporaries: {name}", size) for name, size in memory.parts.items()]
    rest -= sum(size for _, size in parts)
    found = [
        ("parameters", memory.parameters),
        (state, memory.optimizer),
        ("batch and other", memory.batch + memory.other),
        *parts,
        ("other temporaries" if parts else "temporaries", rest),
        ("code", memory.code),
    ]
    return [(name, size) for name, size in found if size > 0]


def to_png(plan: Plan) -> bytes:
    """Everything in it is static, and says so."""
    from matplotlib.figure import Figure

    # Not pyplot: no window system is asked, and no figure stays open.
    if plan.roofline.step:
        figure = Figure(figsize=(10, 5.6), constrained_layout=True)
        halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.25), hspace=0.04)
        panels = [halves[0].subplots(), *halves[1].subplots(1, 2)]
    else:  # the compiler refused, and has said no more than how much it needed
        figure = Figure(figsize=(10, 2.5), constrained_layout=True)
        panels = [figure.subplots()]
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one"
    how = "compiled, not run" if plan.method == "compiled" else "counted, not compiled"
    figure.suptitle(f"{plan.name} on {plan.topology} ({axes}); {how}", fontsize=12)
    for draw, panel in zip((_draw_memory, _draw_roofline, _draw_moves), panels, strict=False):
        draw(panel, plan)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _draw_memory(panel: Any, plan: Plan) -> None:
    at, capacity = 0.0, plan.memory.capacity
    for i, (name, size) in enumerate(memory_slices(plan)):
        label = f"{name}  {size / GIB:.2f}"
        colour = _COLOURS[i % len(_COLOURS)]
        panel.barh([0], [size / GIB], left=at, label=label, color=colour, height=0.6)
        at += size / GIB
    if capacity:
        text = f"capacity  {capacity / GIB:.2f}"
        panel.axvline(capacity / GIB, color="black", linestyle="--", label=text)
    fits = {True: "fits", False: "does not fit", None: "no answer"}[plan.fits]
    panel.set_title(f"Memory of one device, GiB: {at:.2f}, {fits}", fontsize=10, loc="left")
    panel.set_xlim(0, 1.05 * max(at, (capacity or 0) / GIB) or 1)
    panel.set_ylim(-0.5, 0.5)
    panel.set_yticks([])
    panel.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3, frameon=False, fontsize=8)


def _draw_roofline(panel: Any, plan: Plan) -> None:
    line = plan.roofline
    terms = {
        "step": line.step,
        "collectives, exposed": line.exposed,
        "memory": line.memory,
        "compute": line.compute,
    }
    largest = {"collectives": "collectives, exposed"}.get(line.bound, line.bound)
    colours = [{"step": "#333333", largest: "#D55E00"}.get(term, "#999999") for term in terms]
    bars = panel.barh(list(terms), [1e3 * s for s in terms.values()], color=colours, height=0.6)
    panel.bar_label(bars, fmt="{:,.4g}", padding=3, fontsize=8)
    panel.margins(x=0.18)
    mfu = "" if plan.mfu_bound is None else f"; MFU at most {plan.mfu_bound:.0%}"
    panel.set_title(f"Roofline, ms{mfu}", fontsize=10, loc="left")


def _draw_moves(panel: Any, plan: Plan) -> None:
    rows = plan.collectives[:6][::-1]  # by bytes, the largest first
    names = [f"{row.kind}\n{' x '.join(row.axes)}" for row in rows]
    shown = [1e3 * row.exposed_seconds for row in rows]
    hidden = [1e3 * (row.seconds - row.exposed_seconds) for row in rows]
    panel.barh(names, shown, color="#D55E00", height=0.6, label="exposed")
    panel.barh(names, hidden, left=shown, color="#56B4E9", height=0.6, label="behind work")
    panel.set_title("Collectives, ms", fontsize=10, loc="left")
    panel.set_ylim(min(-0.5, len(rows) - 4.5), max(len(rows), 1) - 0.5)
    if rows:
        panel.legend(frameon=False, fontsize=8, loc="lower right")
    else:
        panel.set_yticks([])
        panel.text(0.5, 0.5, "none", transform=panel.transAxes, ha="center", fontsize=9)
