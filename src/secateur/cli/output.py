"""What a command prints: text as it is, or the parts of a page."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console


def show(what: str | list[Any]) -> None:
    """Prints to stdout; as wide as it needs where that is no terminal."""
    if isinstance(what, str):
        typer.echo(what)
        return
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, width=None if sys.stdout.isatty() else 140)
    for part in what:
        console.print(part)
