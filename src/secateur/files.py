"""How files are read and written: with how much memory, by whom, and from where on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from secateur.errors import BadInput

Progress = Callable[[int, int, str], None]
"""Told how many files are done, of how many, and which comes next or was the last; what it raises stops the run there."""
ENGINES = ("serial", "processes", "torch", "ray")
LEAST_MEMORY = 32 << 20


def unwatched(done: int, total: int, file: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Files:
    """How `secateur.prune`, `secateur.plan` and `secateur.apply` work on files. The result is the same, whatever is said here.

    Args:
        memory: what each worker may take beside the interpreter, in bytes or as ``"512MiB"``.
        resume: go on with what an interrupted run of the same request left beside ``out``.
        in_place: ``out`` is the source itself: the result is made beside it, and takes its place when it is whole.
        engine: ``"serial"``; ``"processes"`` on this machine; ``"torch"``, the ranks of a program that runs under ``torchrun``,
            which all call this; ``"ray"``.
        workers: how many processes, or workers of Ray.
        first, last: names of the first and the last layer's weights, for allocation ``"uniform_plus"``: files do not tell.
        progress: called with how many files are done, of how many, and which; what it raises stops the run between two files.

    Raises:
        BadInput: too little memory, an unknown engine.

    Example:
        >>> Files(memory="512MiB", resume=True).nbytes
        536870912
    """

    memory: int | str = 256 << 20
    resume: bool = False
    in_place: bool = False
    engine: Literal["serial", "processes", "torch", "ray"] = "serial"
    workers: int = 1
    first: str | None = None
    last: str | None = None
    progress: Progress = unwatched

    def __post_init__(self) -> None:
        if self.nbytes < LEAST_MEMORY:
            raise BadInput(
                f"a worker takes at least {LEAST_MEMORY >> 20}MiB beside the interpreter; memory is {self.memory!r}."
            )
        if self.engine not in ENGINES:
            raise BadInput(f"engine is one of {', '.join(ENGINES)}; got {self.engine!r}.")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise BadInput(f"workers is how many work beside each other, 1 or more; got {self.workers!r}.")
        if self.workers > 1 and self.engine in ("serial", "torch"):
            raise BadInput(f"workers goes with 'processes' and 'ray'; {self.engine!r} has its own number.")

    @property
    def nbytes(self) -> int:
        """`memory` in bytes."""
        found = re.fullmatch(r"\s*(\d+)\s*(?:([kmgt]?)(i?)b)?\s*", str(self.memory), re.IGNORECASE)
        if isinstance(self.memory, bool) or not isinstance(self.memory, int | str) or found is None:
            raise BadInput(
                f'memory is a number of bytes, or one with a unit such as "512MiB" or "2GB"; got {self.memory!r}.'
            )
        power = " kmgt".index(found[2].lower()) if found[2] else 0
        return int(found[1]) * (1024 if found[3] else 1000) ** power
