"""Commands that work on files: their options, a bar for what is done, and an orderly stop between two files."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, cast

import typer

from secateur.files import Files

from .progress import counted

STOPPED = 75
"""The exit code of a command that was asked to stop, and stopped between two files."""

Memory = Annotated[str | None, typer.Option(help='What a worker takes beside the interpreter, such as "512MiB".')]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run of the same command left.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Replace the source; the result is made beside it first.")]
Engine = Annotated[
    str | None, typer.Option(help="serial, processes, ray, or torch under torchrun; the result is the same.")
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="How many workers; more than one are processes by default.")]


@dataclass
class _Run:
    """A run that may be asked to stop."""

    writing: bool = False
    asked: bool = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Stops it: between two files where files are written, at once before, or if it is asked again."""
        if self.asked or not self.writing:
            sys.exit(128 + number)
        self.asked = True


@contextmanager
def worked_on(engine: str | None, jobs: int, **more: Any) -> Iterator[Files]:
    """How files are worked on, with a bar, and with SIGTERM ending the run after the file it is at."""
    run, name = _Run(), engine or ("processes" if jobs > 1 else "serial")
    group: Any = nullcontext()
    if name == "torch":
        from secateur.engines.torchrun import joined

        group = joined()
    before = signal.signal(signal.SIGTERM, run.stop)
    try:
        with counted() as bar, group:

            def progress(done: int, total: int, file: str) -> None:
                bar(done, total, file)
                run.writing = True
                if run.asked and done < total:
                    typer.echo(
                        f"stopped after {done} of {total} files, which are kept: --resume goes on with them.", err=True
                    )
                    raise SystemExit(STOPPED)

            given = {k: v for k, v in more.items() if v is not None}
            yield Files(engine=cast(Any, name), workers=jobs, progress=progress, **given)
    finally:
        signal.signal(signal.SIGTERM, before)


def speaks() -> bool:
    """Whether this process is the one whose words are shown: of the ranks of torchrun, the first."""
    return os.environ.get("RANK", "0") == "0"
