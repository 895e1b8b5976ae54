"""Reports as HTML, for notebooks. Names come from untrusted files and are escaped."""

from __future__ import annotations

from html import escape

from .report import Report
from .tables import MOST_ROWS, asked_line, left_line, summary
from .words import printable

_CELL = "padding:.15em .7em;text-align:right;white-space:nowrap"
_BAR = "display:inline-block;height:.65em;background:currentColor;opacity:.55;vertical-align:baseline"


def _safe(text: str) -> str:
    return escape(printable(text))


def as_html(report: Report) -> str:
    """The report as one self-contained element."""
    head = "".join(
        f'<th style="{_CELL}">{h}</th>'
        for h in ("tensor", "shape", "role", "zero", "of", "sparsity", "", "smallest |w| left")
    )
    rows = "".join(
        f'<tr><td style="{_CELL};text-align:left"><code>{_safe(r.name)}</code></td>'
        f'<td style="{_CELL}">{_safe(" × ".join(map(str, r.shape)))}</td>'
        f'<td style="{_CELL};text-align:left">{_safe(r.role)}</td>'
        f'<td style="{_CELL}">{r.zeros or 0:,}</td><td style="{_CELL}">{r.numel:,}</td>'
        f'<td style="{_CELL}">{r.sparsity or 0:.2%}</td>'
        f'<td style="{_CELL};text-align:left;width:6em"><span style="{_BAR};width:{5 * (r.sparsity or 0):.2f}em"></span></td>'
        f'<td style="{_CELL}">{"nothing" if r.threshold is None else f"{r.threshold:.4g}"}</td></tr>'
        for r in report.shown[:MOST_ROWS]
    )
    asked = f"<p><b>{_safe(asked_line(report.asked))}</b></p>" if report.asked else ""
    notes = "".join(f"<p>warning: {_safe(w)}</p>" for w in report.warnings)
    skipped = left_line(report)
    return (
        f'<div>{asked}<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f"<p>{_safe(summary(report))}</p><p style='opacity:.7'>{_safe(skipped)}</p>{notes}</div>"
    )
