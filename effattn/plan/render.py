"""A plan as text and as a page; and two plans side by side."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from effattn.plan.picture import to_png
from effattn.plan.report import Plan

GIB = 2**30
NOTE = (
    "Static: read off the compiled program, or counted; seconds are arithmetic on published peaks. "
    "Nothing was measured on a device."
)
Table = tuple[str, list[str], list[list[str]]]


def tables(plan: Plan) -> list[Table]:
    """(title, head, rows) of everything that a plan holds, for every way to show it."""
    memory, line = plan.memory, plan.roofline
    kinds = [
        ("parameters", memory.parameters),
        ("optimizer state" if plan.kind == "train" else "decoding state", memory.optimizer),
        ("batch", memory.batch),
        ("other arguments", memory.other),
        ("outputs that replace no argument", memory.outputs - memory.aliased),
        ("temporaries", memory.temporaries),
        *((f"  {name}", size) for name, size in memory.parts.items()),
        ("code", memory.code),
        ("in all", memory.total),
        ("capacity", memory.capacity),
        ("in host memory", memory.host),
    ]
    found: list[Table] = [
        (
            "Memory of one device",
            ["what", "GiB"],
            [[name, f"{size / GIB:.3f}"] for name, size in kinds if size is not None],
        )
    ]
    if plan.collectives:
        rows = [
            [
                row.kind + (", over the network" if row.across_slices else ""),
                " x ".join(row.axes),
                f"{row.count:,}",
                f"{row.bytes / 2**20:,.1f}",
                f"{row.overlapped_bytes / max(row.bytes, 1):.0%}",
                f"{1e3 * row.seconds:,.2f}",
                f"{1e3 * row.exposed_seconds:,.2f}",
            ]
            for row in plan.collectives
        ]
        head = [
            "collective",
            "axes",
            "count",
            "MiB received",
            "overlapped",
            "ms",
            "exposed ms",
        ]
        found.append(("What one device receives in a step", head, rows))
    if plan.flops_by_part:
        whole = sum(plan.flops_by_part.values())
        rows = [[n, f"{v / 1e9:,.2f}", f"{v / whole:.1%}"] for n, v in plan.flops_by_part.items()]
        found.append(("Model FLOPs of a device and step", ["part", "GFLOP", "share"], rows))
    if plan.fits is not None and line.step:
        rows = [
            ["compute", f"{1e3 * line.compute:,.2f}"],
            ["memory", f"{1e3 * line.memory:,.2f}"],
            ["collectives", f"{1e3 * line.collectives:,.2f}"],
            ["collectives, exposed", f"{1e3 * line.exposed:,.2f}"],
            ["step", f"{1e3 * line.step:,.2f}"],
        ]
        found.append((f"Roofline; the largest term is {line.bound}", ["term", "ms"], rows))
    if plan.pallas:
        rows = [[n, "" if v is None else f"{v / 2**20:.2f}"] for n, v in plan.pallas]
        title = f"Pallas kernels, {plan.pallas_calls:,} calls"
        found.append((title, ["kernel", "VMEM MiB"], rows))
    return found


def headline(plan: Plan) -> str:
    axes = " x ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1)
    slices = f" x {plan.num_slices} slices" if plan.num_slices > 1 else ""
    verdict = {True: "fits", False: plan.message, None: plan.message}[plan.fits]
    step = "a training step" if plan.kind == "train" else "a decoding step"
    return (
        f"{plan.name}: {step} of {plan.parameters:,} parameters, {plan.batch_size} rows of "
        f"{plan.seq_len:,} tokens, on {plan.topology}{slices} ({plan.devices} devices, "
        f"{axes or 'one'}): {verdict}"
    )


def summary(plan: Plan) -> list[str]:
    lines = []
    if plan.tokens_per_second is not None:
        lines.append(f"at most {plan.tokens_per_second:,.0f} tokens/s")
    if plan.mfu_bound is not None:
        lines.append(f"MFU at most {plan.mfu_bound:.1%}")
    if plan.flops:
        lines.append(f"{plan.flops:.3g} model FLOPs a device and step")
    if plan.compiled_flops:
        lines.append(f"{plan.compiled_flops:.3g} in the program's products")
    if plan.compile_seconds:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s, {plan.compile_host_gib:.1f} GiB")
    return ["; ".join(lines)] if lines else []


def to_text(plan: Plan) -> str:
    out = [headline(plan), *summary(plan)]
    for title, head, rows in tables(plan):
        out += ["", title, *_aligned([head, *rows])]
    return "\n".join([*out, "", *plan.notes, NOTE])


def to_markdown(plan: Plan) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in plan.versions.items() if v is not None)
    out = [f"# Plan: {plan.name} on {plan.topology}", "", headline(plan) + "."]
    out += [f"{line}." for line in summary(plan)]
    out += ["", f"    {plan.command}", "", f"{plan.date}; {versions}."]
    for title, head, rows in tables(plan):
        out += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        out += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*out, "", *plan.notes, NOTE, ""])


def to_html(plan: Plan) -> str:
    """One page that needs nothing else."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    picture = base64.b64encode(to_png(plan)).decode()
    parts = []
    for title, head, rows in tables(plan):
        body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
        first = f"<h2>{html.escape(title)}</h2>\n<table>\n<tr>{cells(head, 'th')}</tr>"
        parts.append(f"{first}\n{body}\n</table>")
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;"
        "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}"
        "h2{font-size:1.1em;margin-top:1.6em}code{background:#f4f4f4;padding:.1em .3em}"
        ".fits,.short{border-left:.4em solid #009e73;padding-left:.8em}"
        ".short{border-color:#d55e00}td{font-variant-numeric:tabular-nums}"
    )
    notes = "".join(f"<p>{html.escape(text)}</p>" for text in [*summary(plan), *plan.notes, NOTE])
    versions = ", ".join(f"{n} {v}" for n, v in plan.versions.items() if v is not None)
    verdict = "fits" if plan.fits else "short"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(plan.name)}</title><style>{style}</style></head><body>"
        f"<h1>{html.escape(plan.name)}</h1><p class={verdict}>{html.escape(headline(plan))}</p>"
        f'<img alt="memory and roofline" src="data:image/png;base64,{picture}">'
        + "\n".join(parts)
        + f"{notes}<p><code>{html.escape(plan.command)}</code><br>{plan.date}; "
        f"{html.escape(versions)}</p></body></html>\n"
    )


def difference(old: Plan, new: Plan) -> str:
    """What changed from one plan to the other, as text."""
    rows = []

    def compare(name: str, both: Sequence[float | None], unit: float = 1.0) -> None:
        before, after = both
        if not before and not after or before == after:
            return
        texts = ["" if x is None else f"{x / unit:,.3f}" for x in (before, after)]
        change = f"{after / before - 1:+.1%}" if before and after is not None else "new"
        rows.append([name, *texts, "gone" if not after else change])

    for name in old.memory.__dataclass_fields__:
        values = [getattr(plan.memory, name) for plan in (old, new)]
        if name != "parts":
            compare(f"memory: {name}, GiB", values, GIB)
    keys = [(r.kind, r.axes, r.across_slices) for plan in (old, new) for r in plan.collectives]
    for key in dict.fromkeys(keys):
        sizes = [
            sum(r.bytes for r in plan.collectives if (r.kind, r.axes, r.across_slices) == key)
            for plan in (old, new)
        ]
        compare(f"{key[0]} over {' x '.join(key[1])}, MiB", sizes, 2**20)
    compare("model FLOPs, T", (old.flops, new.flops), 1e12)
    compare("compiled FLOPs, T", (old.compiled_flops, new.compiled_flops), 1e12)
    for name in ("compute", "memory", "collectives", "exposed", "step"):
        values = [getattr(plan.roofline, name) for plan in (old, new)]
        compare(f"roofline: {name}, ms", values, 1e-3)
    compare("tokens per second", (old.tokens_per_second, new.tokens_per_second))
    if old.fits != new.fits:
        words: dict[Any, str] = {True: "yes", False: "no", None: "unknown"}
        rows.append(["fits", words[old.fits], words[new.fits], ""])
    if not rows:
        return "no difference"
    return "\n".join(_aligned([["what", "before", "now", "change"], *rows]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([f"  {first}", *rest]).rstrip())
    return lines
