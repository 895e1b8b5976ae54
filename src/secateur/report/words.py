"""How numbers are written on a page and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

MINUS = "\u2212"


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


def join(words: Sequence[str]) -> str:
    """Words as English lists them.

    >>> join(["a"]), join(["a", "b", "c"]), join([])
    ('a', 'a, b and c', '')
    """
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]


def counted(n: int, what: str) -> str:
    """So many of something.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {what}{'s' * (n != 1)}"


def printable(text: str) -> str:
    r"""Text with control characters escaped: names come from untrusted files and end up in a terminal.

    >>> printable("a\x1b]0;b")
    'a\\x1b]0;b'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
