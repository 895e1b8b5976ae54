"""What a command prints: a sign of life on a terminal and silence everywhere else; then what it found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def watched(what: str) -> Iterator[None]:
    """A spinner with the text while the block runs, on stderr and only if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def counted() -> Iterator[Callable[[int, int, str], None]]:
    """A bar that is told what is done, of how much, and what comes next; on stderr and only if that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=escape(what))


def show(what: str | Sequence[RenderableType]) -> None:
    """Prints text as it is, and tables and the like as wide as the terminal, or wide where there is none."""
    if isinstance(what, str):
        typer.echo(what)
        return
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 140)
    for part in what:
        console.print(part)
