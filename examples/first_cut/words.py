"""How numbers and names are written, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.evaluate.statistics import Interval
from secateur.report.words import signed

NAMES = {"global": "global", "lamp": "LAMP", "erk": "ERK", "uniform": "uniform", "random": "random"}
"""What people call the methods."""

STYLES = {"global": 0, "lamp": 1, "erk": 2, "uniform": 3, "random": 7}
"""Colour, shape and dash of each method in the charts; the last style is the grey one."""

TESTS = {"wordsim": "WordSim-353 (Spearman)", "lee50": "Lee50 (Pearson)"}
"""What the encoder is scored by, and by which correlation."""

PLUS_MINUS = "\u00a0±\u00a0"


def percent(value: Interval) -> str:
    """A share with its interval.

    >>> percent(Interval(0.971, 0.0044, 3)).replace("\\u00a0", " "), percent(Interval(0.5, None, 1))
    ('97.1 ± 0.4%', '50.0%')
    """
    half = "" if value.half is None else f"{PLUS_MINUS}{100 * value.half:.1f}"
    return f"{100 * value.mean:.1f}{half}%"


def points(value: Interval) -> str:
    """A difference of shares with its interval, in points.

    >>> points(Interval(0.012, 0.003, 3)).replace("\\u00a0", " ")
    '+1.2 ± 0.3'
    """
    half = "" if value.half is None else f"{PLUS_MINUS}{100 * value.half:.1f}"
    return f"{signed(100 * value.mean, 1)}{half}"


def span(score: Mapping[str, float]) -> str:
    """A correlation with its interval.

    >>> span({"score": 0.7289, "low": 0.6721, "high": 0.7768})
    '0.729 (0.672 to 0.777)'
    """
    return f"{score['score']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
