"""What a comparison found, in sentences: where each method beats the baseline, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateur.evaluate.statistics import Interval

from .run_facts import DENSE
from .run_findings import percent, written_difference
from .words import counted, join

if TYPE_CHECKING:
    from secateur.evaluate.compare import Comparison, Verdict

VERBS = {"better": "beats", "worse": "loses to"}


def headline(c: Comparison) -> str:
    """The answer in a sentence or two: which methods beat the baseline, and where."""
    if not c.tested:
        most = max((v.difference.n for v in c.verdicts if v.difference is not None), default=0)
        return f"No verdict: {counted(most, 'seed')} in common, and a verdict needs 5. What was seen stands below."
    ahead = {m: [v for v in c.verdicts if v.method == m and v.word == "better"] for m in c.methods}
    told = [f"{m} at {_list([v.asked for v in some])}" for m, some in ahead.items() if some]
    if not told:
        return f"Nothing is shown to beat {c.baseline} at any sparsity."
    every = [v for some in ahead.values() for v in some]
    kept = sum(v.holm for v in every)
    which = (
        ("keeps it" if kept else "does not keep it")
        if len(every) == 1
        else f"keeps {kept or 'none'} of these {len(every)}"
    )
    holm = f"Holm's correction for {c.tested} comparisons {which}."
    return f"{c.baseline} is beaten by {'; by '.join(told)}. {holm}"


def by_method(c: Comparison) -> list[tuple[str, str]]:
    """Each method, and where it beats the baseline, by how much."""
    return [(m, _answer(c, [v for v in c.verdicts if v.method == m])) for m in c.methods if m != c.baseline]


def by_sparsity(c: Comparison) -> list[tuple[str, str]]:
    """Each sparsity, and who beats the baseline there, by how much."""
    return [(percent(a), _at(c, [v for v in c.verdicts if v.asked == a])) for a in c.asked]


def _answer(c: Comparison, verdicts: Sequence[Verdict]) -> str:
    parts = []
    for word, verb in VERBS.items():
        some = [v for v in verdicts if v.word == word]
        if some:
            first, *others = [f"at {percent(v.asked)} by {_amount(c, v)}" for v in some]
            parts.append(f"{verb} {c.baseline} {join([first, *others])}")
    parts += _open(c, verdicts, lambda v: f"at {percent(v.asked)}")
    return f"{'; '.join(parts)}."


def _at(c: Comparison, verdicts: Sequence[Verdict]) -> str:
    parts = []
    for word, verb in VERBS.items():
        some = [(v.method, _amount(c, v)) for v in verdicts if v.word == word]
        told = [f"{m} {verb} {c.baseline} by {d}" if not i else f"{m} by {d}" for i, (m, d) in enumerate(some)]
        parts += [join(told)] if told else []
    parts += _open(c, verdicts, lambda v: f"for {v.method}")
    return f"{'; '.join(parts)}." if parts else "nothing was compared."


def _open(c: Comparison, verdicts: Sequence[Verdict], where: Callable[[Verdict], str]) -> list[str]:
    """What is left open, with the numbers that were seen."""
    groups: dict[str, list[str]] = {}
    for v in verdicts:
        if v.word in VERBS:
            continue
        d = v.difference
        seen = "no seed in common" if d is None else f"{written_difference(d, c.metric)}{c.metric.points}"
        few = "" if d is None or v.word != "no verdict" else f" from {counted(d.n, 'seed')}"
        groups.setdefault(f"{v.word}{few}", []).append(f"{where(v)} ({seen})")
    return [f"{what} {join(some)}" for what, some in groups.items()]


def _amount(c: Comparison, v: Verdict) -> str:
    """A difference that is shown, without its sign."""
    assert v.difference is not None
    d = Interval(abs(v.difference.mean), v.difference.half, v.difference.n)
    doubt = "" if v.holm else " (not kept by Holm's correction)"
    return f"{written_difference(d, c.metric).lstrip('+')}{c.metric.points}{doubt}"


def _list(asked: Sequence[float]) -> str:
    return join([percent(a) for a in asked])


def on_front(c: Comparison) -> list[tuple[str, str]]:
    """The points that none beats for less: by parameters that are left, and by FLOPs that are left."""
    told = []
    for what, chosen, cost in (
        ("parameters", [p for p in c.points if p.by_density], "density"),
        ("FLOPs", [p for p in c.points if p.by_work], "work"),
    ):
        at: dict[str, list[float]] = {}
        for p in sorted(chosen, key=lambda p: getattr(p, cost), reverse=True):
            at.setdefault(p.method, []).append(p.asked)
        if at:
            told.append((what, "; ".join(m if m == DENSE else f"{m} at {_list(asked)}" for m, asked in at.items())))
    return told


def factor(value: float | None) -> str:
    """How many times less.

    >>> factor(9.774), factor(None), factor(123.4)
    ('9.77×', '', '123×')
    """
    return "" if value is None else f"{value:.3g}×"


def seconds(value: float | None) -> str:
    """A while, where it was one.

    >>> seconds(0.0123), seconds(4.2), seconds(75.0), seconds(0.0), seconds(None)
    ('0.01 s', '4.2 s', '75 s', '', '')
    """
    if not value:
        return ""
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s" if value < 10 else f"{value:,.0f} s"


def memory(value: int | None) -> str:
    """Bytes, for people.

    >>> memory(734003200), memory(None)
    ('734 MB', '')
    """
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
