"""Timings of benchmarks that leave garbage behind: none of it is there when the next candidate takes its turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping

from secateur.runtime import timing
from secateur.runtime.timing import Timing, spread

__all__ = ["Timing", "spread", "take_turns"]


def take_turns(
    candidates: Mapping[str, Callable[[], object]], before: Callable[[], object], repeats: int
) -> dict[str, Timing]:
    """Times every candidate ``repeats`` times, in turns, ``before`` each run doing what is not timed."""

    def ready() -> None:
        before()
        gc.collect()

    return timing.take_turns(candidates, repeats, ready)
