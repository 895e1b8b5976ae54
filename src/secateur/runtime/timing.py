"""Timings that can be compared: candidates take turns, and what is told is the median of the ratios within turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn, in order."""

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


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and an interval that holds the true median at least 19 times in 20 where there are 6 or more."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Ratio:
        """The median with the order statistics around it that make the interval; of few values, the least and the largest.

        >>> Ratio.of([1.0, 3.0, 2.0])
        Ratio(median=2.0, low=1.0, high=3.0)
        >>> Ratio.of([float(i) for i in range(1, 10)])
        Ratio(median=5.0, low=2.0, high=8.0)
        """
        n, outside = len(values), 0
        while (outside + 1) * 2 <= n and sum(math.comb(n, i) for i in range(outside + 1)) / 2**n <= 0.025:
            outside += 1
        inside = sorted(values)[max(outside - 1, 0) : n - max(outside - 1, 0)]
        return Ratio(statistics.median(values), inside[0], inside[-1])

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def take_turns(
    candidates: Mapping[Name, Callable[[], object]], turns: int, before: Callable[[], object] | None = None
) -> dict[Name, Timing]:
    """Times every candidate once in each turn, ``before`` each run doing what is not timed.

    A first turn that is not counted warms up threads, caches and lazily imported code.
    """
    found: dict[Name, list[float]] = {name: [] for name in candidates}
    for turn in range(turns + 1):
        for name, run in candidates.items():
            if before is not None:
                before()
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if turn:
                found[name].append(seconds)
    return {name: Timing(tuple(s)) for name, s in found.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside, so that none is timed; and no gradients."""
    on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if on:
            gc.enable()


@contextmanager
def threads(n: int) -> Iterator[None]:
    """So many of torch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
