"""Timings that can be compared: candidates take turns, so that a busy moment of the machine hits them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def milliseconds(self) -> str:
        """``median (min–max)`` in milliseconds."""
        return spread([1e3 * s for s in self.seconds])

    def per(self, other: Timing) -> list[float]:
        """This time as a multiple of another's, turn by turn."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


def spread(values: list[float]) -> str:
    """``median (min–max)``."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


def take_turns(
    candidates: Mapping[str, Callable[[], object]], before: Callable[[], object], repeats: int
) -> dict[str, Timing]:
    """Times every candidate ``repeats`` times, in turns, ``before`` each run doing what is not timed.

    A first turn that is not counted warms up threads, caches and lazily imported code.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            before()
            gc.collect()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if turn:
                found[name].append(seconds)
    return {name: Timing(tuple(s)) for name, s in found.items()}
