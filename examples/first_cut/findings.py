"""Sentences about what was measured, made from the numbers, so that they cannot disagree with the charts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from examples.first_cut.settings import METHODS, REFERENCE
from examples.first_cut.summary import Network, Point
from examples.first_cut.words import NAMES, TESTS, percent, points
from secateur.report.words import join, share, signed

CLOSE = 0.01
"""A network within one point of its dense accuracy counts as close to it."""


def network_findings(network: Network) -> list[str]:
    """What the sweep of one network shows, a sentence a question."""
    said = [_ranking(network), _against_global(network), _expectation(network)]
    said += [_close(network), _emptied(network)]
    if network.batchnorm:
        said += [_recalibration(network), _flops(network)]
    return said


def _ranking(network: Network) -> str:
    last = {m: row[-1] for m, row in network.points.items()}
    order = sorted(METHODS, key=lambda m: -last[m].final.mean)
    scores = ", ".join(f"{NAMES[m]} {percent(last[m].final)}" for m in order)
    return f"At {share(last[order[0]].sparsity, 0)}, best first: {scores} (dense {percent(network.dense)})."


def _against_global(network: Network) -> str:
    last = {m: row[-1] for m, row in network.points.items() if m not in (REFERENCE, "random")}
    differences = ", ".join(f"{NAMES[m]} {points(p.minus_global)}" for m, p in last.items())
    sure = [NAMES[m] for m, p in last.items() if p.minus_global.excludes_zero]
    return (
        f"Against global there, on the same trained weights, in points: {differences}. "
        f"The interval leaves out zero for {join(sure) or 'none of them'}."
    )


def _expectation(network: Network) -> str:
    """Global against uniform, the comparison papers have an expectation for."""
    uniform = network.points["uniform"]
    ahead = [p for p in uniform if p.minus_global.mean < 0]
    sure = [p for p in uniform if p.minus_global.excludes_zero]
    far = uniform[-1]
    verdict = "as expected" if far.minus_global.mean < 0 else "against that expectation"
    if not far.minus_global.excludes_zero:
        verdict += ", but not beyond the noise of these seeds"
    surely = _list(sure) if sure else "no sparsity"
    return (
        f"Papers lead one to expect global above uniform at high sparsity. Measured: global is ahead on "
        f"average at {len(ahead)} of {len(uniform)} sparsities; at {share(far.sparsity, 0)} it goes "
        f"{verdict}. The paired interval leaves out zero at {surely}."
    )


def _close(network: Network) -> str:
    """The highest sparsity up to which each method stays close to dense."""
    floor = network.dense.mean - CLOSE
    reach = {}
    for method, row in network.points.items():
        held = list(takewhile(lambda p: p.final.mean >= floor, row))
        reach[method] = share(held[-1].sparsity, 0) if held else "none of them"
    listed = ", ".join(f"{NAMES[m]} {r}" for m, r in reach.items())
    return f"Highest sparsity tried up to which the mean stays within one point of dense: {listed}."


def _emptied(network: Network) -> str:
    """Layers that lost every weight, after which the network is blind or mute there."""
    found = []
    for method, row in network.points.items():
        where = [f"{join(p.emptied)} at {share(p.sparsity, 0)}" for p in row if p.emptied]
        if where:
            found.append(f"by {NAMES[method]} {', '.join(where)}")
    if not found:
        return "No layer was left with nothing by any method."
    return f"Layers left with nothing in at least one seed: {'; '.join(found)}."


def _recalibration(network: Network) -> str:
    gains = {
        (method, p.sparsity): p.after.mean - p.before.mean
        for method, row in network.points.items()
        if method != "random"
        for p in row
        if p.after is not None
    }
    (method, sparsity), gain = max(gains.items(), key=lambda item: item[1])
    dense = ""
    if network.dense_after is not None:
        change = f"{percent(network.dense)} to {percent(network.dense_after)}"
        dense = f" The dense network goes from {change} by the same step."
    worse = sum(g < 0 for g in gains.values())
    span = f"{signed(100 * min(gains.values()), 1)} to {signed(100 * gain, 1)}"
    return (
        f"Recalibrating BatchNorm on training images changes the mean accuracy of magnitude pruning by "
        f"{span} points, most for {NAMES[method]} at {share(sparsity, 0)}; "
        f"it lowers it at {worse} of {len(gains)} points.{dense}"
    )


def _flops(network: Network) -> str:
    last = {m: row[-1] for m, row in network.points.items() if m != "random"}
    order = sorted(last, key=lambda m: last[m].flops.mean)
    listed = ", ".join(f"{NAMES[m]} {share(last[m].flops.mean)}" for m in order)
    return (
        f"The same number of weights is not the same amount of work: at {share(last[order[0]].sparsity, 0)} "
        f"sparsity the multiplications left are {listed} of the dense network's."
    )


def encoder_findings(encoder: dict[str, Any]) -> list[str]:
    """What the encoder's two scores show."""
    said = []
    for test, title in TESTS.items():
        rows = [r for r in encoder["runs"] if r["method"] == "uniform"]
        parts = []
        for r in rows:
            change = r["scores"][test]["minus_global"]
            clear = "" if change["low"] > 0 or change["high"] < 0 else ", within noise"
            span = f"{signed(change['low'], 3)} to {signed(change['high'], 3)}"
            parts.append(f"{signed(change['score'], 3)} at {share(r['asked'], 0)} ({span}{clear})")
        said.append(f"{title}, uniform minus {REFERENCE}: {'; '.join(parts)}.")
    return said


def _list(row: Sequence[Point]) -> str:
    return ", ".join(f"{share(p.sparsity, 0)}" for p in row)
