"""What a benchmark found: tables and bars, as a page in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.machine import Machine


@dataclass(frozen=True)
class Table:
    """A title, column heads (a leading ``<`` aligns left) and rows of text."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """The table as Markdown, its title above."""
        names = [h.removeprefix("<") for h in self.heads]
        rule = ["---" if h.startswith("<") else "---:" for h in self.heads]
        lines = [names, rule, *self.rows]
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def terminal(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(box=None, pad_edge=False, header_style="bold")
        for h in self.heads:
            table.add_column(h.removeprefix("<"), justify="left" if h.startswith("<") else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


@dataclass(frozen=True)
class Bar:
    """A bar that was set beforehand, and what was found: reached if ``found`` is on the right side of ``limit``."""

    what: str
    found: float
    limit: float
    at_least: bool = False
    unit: str = ""

    @property
    def reached(self) -> bool:
        """Whether the bar was reached."""
        return self.found >= self.limit if self.at_least else self.found < self.limit

    def row(self) -> tuple[str, str, str, str]:
        """The bar as a row of a table."""
        sign = "≥" if self.at_least else "<"
        return (
            self.what, f"{self.found:.3g}{self.unit}", f"{sign} {self.limit:.3g}{self.unit}",
            "reached" if self.reached else "MISSED",
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Everything one benchmark found, and on what machine under what load."""

    name: str
    command: str
    machine: Machine | str
    tables: list[Table]
    bars: list[Bar] = field(default_factory=list)

    def all_tables(self) -> list[Table]:
        """The tables, that of the bars last."""
        bars = [Table("Bars", ("<bar", "found", "asked", "<"), [b.row() for b in self.bars])] if self.bars else []
        return [*self.tables, *bars]

    def markdown(self) -> str:
        """What `docs/` quotes: command, machine and tables."""
        head = f"`{self.command}`, on {self.machine}."
        return "\n\n".join([head, *(t.markdown() for t in self.all_tables())])

    def show(self, console: Console) -> None:
        """Prints the tables."""
        console.print(Text(f"{self.command}, on {self.machine}", style="dim"))
        for table in self.all_tables():
            console.print(Text(table.title, style="bold"))
            console.print(table.terminal())
            console.print()

    def write(self, folder: Path) -> None:
        """Writes ``<name>.json`` and ``<name>.md``."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {**asdict(self), "reached": {b.what: b.reached for b in self.bars}}
        (folder / f"{self.name}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        (folder / f"{self.name}.md").write_text(self.markdown() + "\n", encoding="utf-8")
