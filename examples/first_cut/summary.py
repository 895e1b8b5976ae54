"""From single runs to means, intervals and paired differences over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.first_cut.settings import METHODS, REFERENCE, Settings
from secateur.evaluate.statistics import Interval, interval


@dataclass(frozen=True)
class Point:
    """One method at one sparsity, over seeds.

    Attributes:
        sparsity: asked, and found exactly.
        before: test accuracy right after pruning.
        after: after BatchNorm recalibration; ``None`` where the network has none.
        final: the last of the two, what a user would get.
        minus_global: ``final`` minus that of global on the *same* trained weights, seed by seed.
        flops: effective FLOPs as a share of the dense network's.
        emptied: layers that were left with nothing, in any seed.
    """

    sparsity: float
    before: Interval
    after: Interval | None
    final: Interval
    minus_global: Interval
    flops: Interval
    emptied: list[str]


@dataclass(frozen=True)
class Layer:
    """One layer under one method: its size and the share of it that was pruned."""

    name: str
    numel: int
    sparsity: Interval


@dataclass(frozen=True)
class Network:
    """Everything the page says of one kind of network, over seeds."""

    key: str
    title: str
    about: str
    batchnorm: bool
    parameters: int
    prunable: int
    dense: Interval
    dense_after: Interval | None
    points: dict[str, list[Point]]
    layers: dict[str, list[Layer]]


def network(key: str, measured: dict[str, Any], settings: Settings) -> Network:
    """Summarises what `sweep.sweep_kind` measured."""
    runs = measured["runs"]
    return Network(
        key=key,
        title=measured["title"],
        about=measured["about"],
        batchnorm=measured["batchnorm"],
        parameters=measured["parameters"],
        prunable=measured["prunable"],
        dense=interval([d["test"] for d in measured["dense"]]),
        dense_after=optional_interval([d["after"] for d in measured["dense"]]),
        points={m: [point(runs, m, s) for s in settings.sparsities] for m in METHODS},
        layers={m: layers(select(runs, m, settings.layer_sparsity)) for m in METHODS},
    )


def select(runs: Iterable[dict[str, Any]], method: str, sparsity: float) -> list[dict[str, Any]]:
    """The runs of one method at one sparsity, one a seed, in the order of the seeds."""
    return [r for r in runs if r["method"] == method and r["asked"] == sparsity]


def final(run: dict[str, Any]) -> float:
    """The accuracy a user would get: after recalibration where there is any."""
    return run["before"] if run["after"] is None else run["after"]


def optional_interval(values: Sequence[float | None]) -> Interval | None:
    """The interval of the numbers that are there, ``None`` where none is."""
    there = [v for v in values if v is not None]
    return interval(there) if there else None


def point(runs: Sequence[dict[str, Any]], method: str, sparsity: float) -> Point:
    """One method at one sparsity, over seeds and against the reference on the same seeds."""
    by_layer = zip(*(r["layers"] for r in select(runs, method, sparsity)), strict=True)
    chosen, reference = select(runs, method, sparsity), select(runs, REFERENCE, sparsity)
    pairs = zip(chosen, reference, strict=True)
    return Point(
        sparsity=sparsity,
        before=interval([r["before"] for r in chosen]),
        after=optional_interval([r["after"] for r in chosen]),
        final=interval([final(r) for r in chosen]),
        minus_global=interval([final(c) - final(r) for c, r in pairs]),
        flops=interval([r["flops"] / r["flops_dense"] for r in chosen]),
        emptied=[rows[0]["name"] for rows in by_layer if any(r["zeros"] == r["numel"] for r in rows)],
    )


def layers(runs: Sequence[dict[str, Any]]) -> list[Layer]:
    """Every layer's sparsity over seeds, in the order data meets the layers."""
    return [
        Layer(rows[0]["name"], rows[0]["numel"], interval([r["sparsity"] for r in rows]))
        for rows in zip(*(run["layers"] for run in runs), strict=True)
    ]
