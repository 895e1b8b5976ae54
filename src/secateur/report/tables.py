"""Reports and plans as tables in a terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from secateur.core.plan import Plan

from .report import Report
from .words import printable

MOST_ROWS = 200


def renderables(report: Report) -> Iterator[RenderableType]:
    """The parts of a report, in order: what was asked, the table, the totals, what was skipped, warnings."""
    if report.asked:
        yield Text(asked_line(report.asked), style="bold")
    if report.shown:
        yield _table(
            [(r.name, r.shape, r.role, r.zeros, r.numel, r.threshold, r.nonfinite) for r in report.shown], "zero"
        )
    yield Text(summary(report), style="bold")
    if skipped := left_line(report):
        yield Text(skipped, style="dim")
    for text in report.warnings:
        yield Text(f"warning: {printable(text)}", style="yellow")
    if report.out:
        yield Text(f"written to {report.out}")


def plan_renderables(plan: Plan) -> Iterator[RenderableType]:
    """The parts of a plan, in order."""
    asked = {
        "sparsity": plan.sparsity, "threshold": plan.threshold, "criterion": plan.criterion,
        "allocation": plan.allocation, "pattern": str(plan.pattern),
    }  # fmt: skip
    yield Text(f"plan: {asked_line(asked)}", style="bold")
    yield _table([(r.name, r.shape, r.role, r.prune, r.numel, r.threshold, 0) for r in plan.chosen], "to be zero")
    share = plan.prune / plan.total if plan.total else 0.0
    yield Text(
        f"{plan.prune:,} of {plan.total:,} chosen weights will be zero ({share:.4%}); nothing written", style="bold"
    )
    if skipped := skipped_line([r.skip for r in plan.rows if r.skip]):
        yield Text(skipped, style="dim")
    for text in plan.warnings:
        yield Text(f"warning: {printable(text)}", style="yellow")


def asked_line(asked: dict[str, Any]) -> str:
    """What was asked, in one line.

    >>> asked_line({"sparsity": 0.9, "threshold": None, "criterion": "magnitude", "allocation": "global", "pattern": "2:4"})
    'sparsity 0.9, magnitude, global, 2:4'
    """
    amount = f"threshold {asked['threshold']:g}" if asked["threshold"] is not None else None
    if asked["sparsity"] is not None:
        amount = f"sparsity {asked['sparsity']:g}"
    return ", ".join(str(x) for x in (amount, asked["criterion"], asked["allocation"], asked["pattern"]) if x)


def summary(report: Report) -> str:
    """The totals of a report, in one line."""
    return (
        f"{report.zeros:,} of {report.total:,} chosen weights are zero ({report.sparsity:.4%}); "
        f"{report.model_zeros:,} of all {report.model_total:,} parameters ({report.model_sparsity:.4%}), "
        f"{report.compression_ratio:.3g}x fewer non-zero parameters"
    )


def left_line(report: Report) -> str:
    """Why tensors of a report were left alone; those that went with a layer's channels were not."""
    followers = sum(r.goes_with is not None for r in report.rows)
    left = skipped_line([r.skip for r in report.rows if r.skip and r.goes_with is None])
    gone = f"went with their layers' channels, beside the chosen weights: a bias ({followers})" if followers else ""
    return "; ".join(text for text in (gone, left) if text)


def skipped_line(reasons: Sequence[str]) -> str:
    """Why tensors were left alone, counted.

    >>> skipped_line(["a bias", "a norm", "a bias"])
    'left alone: a bias (2), a norm (1)'
    """
    counts = Counter(reasons)
    return "left alone: " + ", ".join(f"{reason} ({n})" for reason, n in counts.most_common()) if counts else ""


def _table(rows: Sequence[tuple[str, tuple[int, ...], str, int | None, int, float | None, int]], verb: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("tensor", "left"), ("shape", "right"), ("role", "left"), (verb, "right"), ("of", "right"),
                          ("sparsity", "right"), ("smallest |w| left", "right")):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "tensor", overflow="fold")  # type: ignore[arg-type]
    for name, shape, role, zeros, numel, threshold, bad in rows[:MOST_ROWS]:
        share = "n/a" if zeros is None or not numel else f"{zeros / numel:.2%}"
        left = "nothing" if threshold is None else f"{threshold:.4g}"
        note = f" ({bad} NaN or Inf)" if bad else ""
        table.add_row(
            Text(printable(name) + note), "x".join(map(str, shape)) or "scalar", role, "n/a" if zeros is None else f"{zeros:,}",
            f"{numel:,}", share, left,
        )  # fmt: skip
    if len(rows) > MOST_ROWS:
        table.add_row(f"… and {len(rows) - MOST_ROWS} more (to_json() has all)", "", "", "", "", "", "")
    return table


def as_text(report: Report, width: int = 120) -> str:
    """The report as plain text."""
    return printed(renderables(report), width)


def printed(parts: Iterable[RenderableType], width: int = 120) -> str:
    """Parts as plain text, one below the other."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    for part in parts:
        console.print(part)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
