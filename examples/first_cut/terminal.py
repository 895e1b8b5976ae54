"""What the run says while it works: bars in a terminal, plain lines elsewhere, the seconds of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """Times stages and shows their progress on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        """One plain line, above a bar if one is drawn."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Runs the block as one stage of ``steps`` steps; yields the function to call after each."""
        start = time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        with bar:
            task = bar.add_task(title, total=steps)
            yield lambda: bar.advance(task)
        self.seconds[title] = time.perf_counter() - start
        self.say(f"{title}: {self.seconds[title]:.1f} s")
