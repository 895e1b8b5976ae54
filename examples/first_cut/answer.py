"""Does global prune the early layers less? Worked out from measured sparsities, whichever way it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from examples.first_cut.settings import REFERENCE, Settings
from examples.first_cut.summary import select
from examples.first_cut.words import points
from secateur.evaluate.statistics import Interval, interval, spearman
from secateur.report.words import join, share

Verdict = Literal["yes", "no", "unclear"]

MARGIN = 0.02
"""Halves that differ by less than two points in some seed, or in sign between seeds, give no verdict."""


@dataclass(frozen=True)
class Early:
    """The answer for one network at one overall sparsity.

    Attributes:
        title, sparsity: which network, and the share of all its prunable weights that was pruned.
        verdict: "yes" if in every seed the early layers lost at least `MARGIN` less than the late ones, "no"
            if in every seed they lost at least `MARGIN` more, else "unclear".
        early_layers, late_layers: the first and the last half of the layers; a middle one belongs to neither.
        early, late: mean sparsity of the layers of a half, every layer counting once.
        late_minus_early: their difference, over seeds.
        first, last: name and mean sparsity of the first and of the last layer.
        depth: Spearman's correlation of a layer's position with its sparsity.
        fan_in: Spearman's correlation of a layer's inputs per output with its sparsity.
        same_verdict: at how many of the sparsities tried the verdict is this one, and how many there are.
    """

    title: str
    sparsity: float
    verdict: Verdict
    early_layers: list[str]
    late_layers: list[str]
    early: Interval
    late: Interval
    late_minus_early: Interval
    first: tuple[str, float]
    last: tuple[str, float]
    depth: float
    fan_in: float
    same_verdict: tuple[int, int]


def early(measured: dict[str, Any], at: float, sparsities: Sequence[float]) -> Early:
    """Answers for one network from its runs under the global allocation."""
    runs = select(measured["runs"], REFERENCE, at)
    rows = runs[0]["layers"]
    half = len(rows) // 2
    halves = [_halves(r) for r in runs]
    by_layer = np.array([[row["sparsity"] for row in r["layers"]] for r in runs]).mean(0)
    decided = verdict(halves)
    others = [verdict([_halves(r) for r in select(measured["runs"], REFERENCE, s)]) for s in sparsities]
    return Early(
        title=measured["title"],
        sparsity=at,
        verdict=decided,
        early_layers=[r["name"] for r in rows[:half]],
        late_layers=[r["name"] for r in rows[-half:]],
        early=interval([e for e, _ in halves]),
        late=interval([late for _, late in halves]),
        late_minus_early=interval([late - e for e, late in halves]),
        first=(rows[0]["name"], float(by_layer[0])),
        last=(rows[-1]["name"], float(by_layer[-1])),
        depth=spearman(np.arange(len(rows), dtype=float), by_layer),
        fan_in=spearman(np.array([float(r["fan_in"]) for r in rows]), by_layer),
        same_verdict=(others.count(decided), len(others)),
    )


def _halves(run: dict[str, Any]) -> tuple[float, float]:
    sparsity = [row["sparsity"] for row in run["layers"]]
    half = len(sparsity) // 2
    return float(np.mean(sparsity[:half])), float(np.mean(sparsity[-half:]))


def verdict(halves: Sequence[tuple[float, float]]) -> Verdict:
    """What the (early, late) sparsities of every seed say together."""
    differences = [late - early for early, late in halves]
    if min(differences) >= MARGIN:
        return "yes"
    if max(differences) <= -MARGIN:
        return "no"
    return "unclear"


def early_all(measured: dict[str, Any], settings: Settings) -> list[Early]:
    """The answer for every network: LeNet and the CNN at ``layer_sparsity``, the encoder at its highest."""
    at = settings.layer_sparsity
    small = [early(measured[key], at, settings.sparsities) for key in ("lenet", "cnn")]
    tried = settings.encoder_sparsities
    return [*small, early(measured["encoder"], max(tried), tried)]


def headline(answers: Sequence[Early]) -> str:
    """One sentence for all networks.

    >>> headline([])
    'No network was measured.'
    """
    if not answers:
        return "No network was measured."
    names = {v: join([a.title for a in answers if a.verdict == v]) for v in ("yes", "no", "unclear")}
    given = [v for v in ("yes", "no", "unclear") if names[v]]
    said = {
        "yes": "it prunes the early layers less",
        "no": "it prunes the early layers more",
        "unclear": "early and late layers do not differ clearly",
    }
    if len(given) == 1:
        opening = {"yes": "Yes", "no": "No", "unclear": "Not clearly"}[given[0]]
        return f"{opening}: in {names[given[0]]} {said[given[0]]}."
    return "It depends on the network: " + "; ".join(f"in {names[v]} {said[v]}" for v in given) + "."


def sentence(a: Early) -> str:
    """One network's answer with its numbers."""
    opening = {"yes": "yes", "no": "no, they lose more", "unclear": "no clear difference"}[a.verdict]
    agreed, tried = a.same_verdict
    seeds = f"over {a.early.n} seeds" if a.early.n > 1 else "(one model)"
    return (
        f"{a.title} at {share(a.sparsity, 0)}: {opening}. "
        f"{_group('early', a.early_layers)} {share(a.early.mean)} on average, "
        f"{_group('late', a.late_layers)} {share(a.late.mean)}: "
        f"late minus early {points(a.late_minus_early)} points {seeds}. "
        f"The same verdict at {agreed} of {tried} sparsities."
    )


def follows(answers: Sequence[Early]) -> str:
    """Whether depth or fan-in goes better with what global prunes, counted over the networks."""
    by_fan_in = [a.title for a in answers if abs(a.fan_in) > abs(a.depth)]
    by_depth = [a.title for a in answers if abs(a.depth) > abs(a.fan_in)]
    alike = [a.title for a in answers if abs(a.depth) == abs(a.fan_in)]
    parts = []
    if by_fan_in:
        parts.append(f"with the fan-in more than with the depth in {join(by_fan_in)}")
    if by_depth:
        parts.append(f"with the depth more than with the fan-in in {join(by_depth)}")
    if alike:
        parts.append(f"with both to the same degree in {join(alike)}")
    return "A layer's sparsity goes " + ", ".join(parts) + "."


def _group(word: str, names: list[str]) -> str:
    """Names the layers of a half where there are few, with the verb; the early half opens the sentence.

    >>> _group("early", ["conv1", "conv2"]), _group("late", ["fc3"]), _group("late", list("abcd"))
    ('The early layers (conv1, conv2) lose', 'the late layer (fc3) loses', 'the 4 late layers lose')
    """
    start = "The" if word == "early" else "the"
    if len(names) > 3:
        return f"{start} {len(names)} {word} layers lose"
    ending = ("", "loses") if len(names) == 1 else ("s", "lose")
    return f"{start} {word} layer{ending[0]} ({', '.join(names)}) {ending[1]}"
