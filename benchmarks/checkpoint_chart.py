"""The picture of `docs/scale.md`, made of the tables of `benchmarks.checkpoint`: time and memory against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.result import Result, Table
from secateur.report.svg import Axis, Mark, Series, line_chart, log_axis, nice_axis

STYLE = (
    "svg{font:12px system-ui,sans-serif;fill:#59626d}.s0{--c:#0072b2}.s1{--c:#b84a00}.s2{--c:#00785a}.s3{--c:#a0357f}"
    ".line{fill:none;stroke:var(--c);stroke-width:2}.bar{stroke:var(--c)}.mark{fill:var(--c)}"
    ".label{fill:var(--c);font-weight:600}.grid{stroke:#d9dde2}.axis,.leader,.reference{stroke:#59626d}"
    "text.reference{stroke:none}.middle{text-anchor:middle}.end{text-anchor:end}.reference{stroke-dasharray:5 4}"
)
HIGH, WIDE = 350, 560


def picture(result: Result) -> str:
    """Two charts, one above the other, as one SVG that needs nothing else."""
    seconds, _, memory = result.tables[:3]
    charts = (_times(seconds), _memory(memory))
    titles = ("Seconds, cold cache", "Memory beyond an idle process, MiB")
    placed = "".join(
        f'<text x="8" y="{at * HIGH + 16}" font-weight="600">{title}</text>'
        + chart.replace("<svg ", f'<svg x="0" y="{at * HIGH + 22}" width="{WIDE}" height="{HIGH - 30}" ', 1)
        for at, (title, chart) in enumerate(zip(titles, charts, strict=True))
    )
    size = f'viewBox="0 0 {WIDE} {2 * HIGH}" width="{WIDE}" height="{2 * HIGH}"'
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{back}{placed}</svg>\n'


def write(result: Result, path: Path) -> None:
    """Writes the picture."""
    path.write_text(picture(result), encoding="utf-8")


def _times(table: Table) -> str:
    rows = [r for r in table.rows if r[1] == "cold"]
    names = {h: i for i, h in enumerate(table.heads)}
    shown = "prune", "cp, sync", "cat"
    lines = [Series(name, i, [_mark(r[0], r[names[name]]) for r in rows]) for i, name in enumerate(shown)]
    marks = [m for s in lines for m in s.marks]
    y = log_axis("s", min(m.low for m in marks), max(m.high for m in marks))
    return line_chart("time against size", _sizes(marks), y, lines)


def _memory(table: Table) -> str:
    marks = [_mark(r[0], r[1]) for r in table.rows]
    top = nice_axis("MiB", 0, max(300.0, *(m.high for m in marks)), lambda v: f"{v:g}")
    return line_chart("memory against size", _sizes(marks), top, [Series("prune", 0, marks)], (300.0, "the bar"))


def _sizes(marks: Sequence[Mark]) -> Axis:
    return log_axis("GB of bf16 weights", min(m.x for m in marks), max(m.x for m in marks))


def _mark(size: str, cell: str) -> Mark:
    """A point from a cell ``median (min–max)``."""
    median, _, rest = cell.partition(" (")
    low, high = (float(v) for v in rest.rstrip(")").split("–"))
    return Mark(float(size.split()[0]), float(median), low, high, f"{size}: {cell}")
