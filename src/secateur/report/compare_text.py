"""A comparison in a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from . import compare_words as words
from .run_findings import percent, written, written_difference

if TYPE_CHECKING:
    from secateur.evaluate.compare import Comparison, Point

STYLES = {"better": "green", "worse": "red"}


def renderables(c: Comparison) -> Iterator[RenderableType]:
    """The parts of a comparison, in order: the answer, the table, what is on the front, the rules, warnings."""
    yield Text(words.headline(c), style="bold")
    for name, said in words.by_method(c):
        yield Text.assemble("  ", (name, "bold"), f": {said}")
    yield _table(c)
    for what, said in words.on_front(c):
        yield Text(f"not beaten for fewer {what}: {said}")
    if c.tested:
        yield Text(
            f"{c.tested} comparisons; a 95 % interval leaves zero out once in twenty times where there is nothing."
        )
    for rule in c.rules:
        mark, style = ("kept  ", "green") if rule.kept else ("BROKEN", "bold red")
        yield Text.assemble((mark, style), f" {rule.name}: {rule.said}")
    for warning in c.warnings:
        yield Text(f"warning: {warning}", style="yellow")


def _table(c: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    heads = ("sparsity", c.metric.name, "minus dense", "minus baseline", "verdict", "smaller", "less work", "epochs",
             "pruning", "training", "memory")  # fmt: skip
    table.add_column("method", no_wrap=True)
    for head in heads:
        table.add_column(Text(head), justify="left" if head == "verdict" else "right", no_wrap=True)
    verdicts = {(v.method, v.asked): v for v in c.verdicts}
    for p in c.points:
        v = verdicts.get((p.method, p.asked))
        against = "" if v is None else written_difference(v.difference, c.metric)
        word = Text("") if v is None else Text(v.word.removesuffix(" shown"), style=STYLES.get(v.word, "dim"))
        minus = written_difference(p.minus_dense, c.metric) if p.asked else ""
        table.add_row(
            Text(p.method), percent(p.asked) if p.asked else "", written(p.value, c.metric), minus, against, word,
            words.factor(p.compression), words.factor(p.speedup), f"{p.epochs:g}", *_took(p),
        )  # fmt: skip
    return table


def _took(p: Point) -> tuple[str, str, str]:
    return words.seconds(p.pruning), words.seconds(p.training), words.memory(p.peak)


def as_text(c: Comparison, width: int = 150) -> str:
    """The comparison as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, highlight=False)
    for part in renderables(c):
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
