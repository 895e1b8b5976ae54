"""How numbers and names are written, on the page and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.evaluate.statistics import Interval

NAMES = {"global": "global", "lamp": "LAMP", "erk": "ERK", "uniform": "uniform", "random": "random"}
"""What people call the methods."""

MINUS = "\u2212"
TESTS = {"wordsim": "WordSim-353 (Spearman)", "lee50": "Lee50 (Pearson)"}
"""What the encoder is scored by, and by which correlation."""

PLUS_MINUS = "\u00a0±\u00a0"


def share(value: float, digits: int = 1) -> str:
    """A share as per cent.

    >>> share(0.9712), share(0.93, 0)
    ('97.1%', '93%')
    """
    return f"{100 * value:.{digits}f}%"


def signed(value: float, digits: int) -> str:
    """A number with its sign, the minus a true one, and no sign on what is rounded to zero.

    >>> signed(-0.0123, 3).replace(MINUS, "-"), signed(1.26, 1), signed(-0.0001, 2)
    ('-0.012', '+1.3', '0.00')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


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


def join(words: Sequence[str]) -> str:
    """Words as English lists them.

    >>> join(["a"]), join(["a", "b", "c"]), join([])
    ('a', 'a, b and c', '')
    """
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]
