"""The cells of a sensitivity scan: one layer at one sparsity, pruned, measured, put back, and kept on disk."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.core.allocate import prune_count
from secateur.core.make import make
from secateur.core.patterns import Block, Channel
from secateur.core.plan import Plan
from secateur.core.request import Request
from secateur.core.types import Part, Spec
from secateur.core.write import write_rows
from secateur.errors import BadInput, SecateurError
from secateur.stores.base import matches
from secateur.stores.memory import MemoryStore
from secateur.stores.staging import staged
from secateur.train.engine import numbers_of
from secateur.train.randomness import get_random, seed_all, set_random

from .direction import higher_is_better
from .fingerprint import sums_of
from .mode import only_training
from .sensitivity_facts import Layer, Point, read, read_point, told

Evaluate = Callable[[nn.Module], Any]
T = TypeVar("T")
NAMELESS = "metric"
"""What the number is called of an ``evaluate`` that returns one without a name."""


class Cells:
    """Where finished cells are kept: a small file each, there whole or not at all; nowhere without a folder."""

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else root / "cells"
        if self._root is not None:
            self._root.mkdir(exist_ok=True)

    def kept(self, name: str, make: Callable[[], dict[str, Any]], parsed: Callable[[Any], T]) -> T:
        """A cell that is there; else what ``make`` gives, which is then there. ``parsed`` turns JSON into what it says.

        Raises:
            BadInput: the file of a cell is broken.
        """
        if self._root is None:
            return parsed(make())
        path = self._root / name
        if not path.exists():
            text = json.dumps(make(), allow_nan=False)
            with staged(path, False, len(text)) as stage:
                stage.write_text(text, "utf-8")
        try:
            return parsed(json.loads(path.read_text("utf-8")))
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{path} cannot be read: {e!r}. Remove it, and it is measured again.") from None


class Meter:
    """Calls ``evaluate``, always in the same circumstances, and holds what it returned for the dense network.

    Attributes:
        dense: every metric of the network as it came.
        metric, higher_is_better: which of them is looked at, and which way of it is better.
    """

    def __init__(self, model: nn.Module, evaluate: Evaluate, metric: Any, higher: Any, seed: int) -> None:
        if not callable(evaluate):
            raise BadInput(f"evaluate is a function of the model; got {evaluate!r}.")
        if metric is not None and not isinstance(metric, str):
            raise BadInput(f"metric is the name of one of the numbers that evaluate returns; got {metric!r}.")
        self._model, self._evaluate, self._asked, self._seed = model, evaluate, metric, seed
        self._higher = higher if metric is None and higher is None else higher_is_better(metric or "", higher)
        self._sums = sums_of(model)
        self.dense: dict[str, float] = {}
        self.metric, self.higher_is_better = "", True

    @property
    def sums(self) -> dict[str, int]:
        """What the model held at first; see `sums_of`."""
        return self._sums

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside it the model is in eval mode without gradients; in the end generators are put back."""
        before = get_random()
        try:
            with torch.no_grad(), only_training(self._model):
                yield
        finally:
            set_random(before)

    def measure_dense(self, cells: Cells) -> None:
        """Measures the network as it came, unless that was done before.

        Raises:
            BadInput: ``evaluate`` changed the model; the metric is not finite, is not there, or does not tell which way is
                better.
        """
        self.dense = cells.kept("dense.json", lambda: told(self._first()), read)
        self._choose(self.dense)

    def _first(self) -> dict[str, float]:
        metrics = self.measure()
        self._choose(metrics)
        self.check_unchanged()
        return metrics

    def _choose(self, metrics: Mapping[str, float]) -> None:
        """Settles which metric is looked at, and refuses one that nothing can be compared with."""
        if not metrics:
            raise BadInput("evaluate returned no metric at all.")
        self.metric = next(iter(metrics)) if self._asked is None else self._asked
        self.check(metrics)
        self.higher_is_better = higher_is_better(self.metric, self._higher)
        if not math.isfinite(metrics[self.metric]):
            raise BadInput(
                f"{self.metric} of the network as it came is {metrics[self.metric]}: there is nothing to compare with. "
                "Look for NaN in the weights and in the data."
            )

    def check_unchanged(self) -> None:
        """Refuses a model that is not what it was when nothing of it is pruned.

        Raises:
            BadInput: ``evaluate`` wrote into it.
        """
        changed = [n for n, s in sums_of(self._model).items() if s != self._sums.get(n)]
        if changed:
            raise BadInput(
                f"evaluate changed the model: {', '.join(changed[:6])} are not what they were. It should run it, no more."
            )

    def measure(self) -> dict[str, float]:
        """The metrics of the model as it is now."""
        seed_all(self._seed)
        found = self._evaluate(self._model)
        single = isinstance(found, int | float) or (not isinstance(found, Mapping) and getattr(found, "ndim", 1) == 0)
        return numbers_of({self._asked or NAMELESS: found} if single else found)

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuses metrics without the one that is looked at.

        Raises:
            BadInput: it is not there.
        """
        if self.metric not in metrics:
            raise BadInput(f"evaluate returned no metric {self.metric!r}; there are {', '.join(map(repr, metrics))}.")


def _file_of(layer: str, sparsity: float) -> str:
    """A name for a cell's file: readable, and no other layer's."""
    readable = re.sub(r"[^\w.-]", "_", layer, flags=re.ASCII)[:80]
    return f"{readable}-{zlib.crc32(layer.encode()):08x}-{sparsity!r}.json"


def measured(
    meter: Meter, store: MemoryStore, layer: Layer, specs: Sequence[Spec], request: Request, cells: Cells
) -> Point:
    """One layer at the sparsity of a request: measured now, or read where that was done before."""
    assert request.sparsity is not None
    name = _file_of(layer.name, request.sparsity)
    point = cells.kept(name, lambda: _told_of(layer, _measure(meter, store, layer, specs, request)), read_point)
    if point.why is None:
        meter.check(point.metrics)
    return point


def _told_of(layer: Layer, point: Point) -> dict[str, Any]:
    return {"layer": layer.name, **vars(point), "metrics": told(point.metrics)}


def _measure(meter: Meter, store: MemoryStore, layer: Layer, specs: Sequence[Spec], request: Request) -> Point:
    """One layer pruned, measured, and put back."""
    assert request.sparsity is not None
    made = make(specs, store.parts, request, matches, store.sum)
    if all((r.prune or 0) <= (r.zeros or 0) for r in made.chosen):
        return Point(request.sparsity, layer.zeros, why=_why_nothing(layer, made, request.sparsity))
    with pruned(made, store) as zeros:
        metrics = meter.measure()
    meter.check(metrics)
    return Point(request.sparsity, zeros, metrics)


def _why_nothing(layer: Layer, made: Plan, sparsity: float) -> str:
    """Why a plan prunes nothing in a layer."""
    asked = sum(prune_count(p.numel, sparsity) for p in layer.pieces)
    if layer.zeros == layer.numel:
        return "wholly zero before"
    if not asked:
        return f"{sparsity:g} of {layer.numel} weights rounds to none"
    if layer.zeros >= asked:
        return f"already sparser: {layer.zeros} of {layer.numel} weights are zero, and {asked} were asked for"
    unit = "channel" if isinstance(made.pattern, Channel) else "block" if isinstance(made.pattern, Block) else "group"
    return f"no further whole {unit} goes at {asked} of {layer.numel} weights"


@contextmanager
def pruned(made: Plan, store: MemoryStore) -> Iterator[int]:
    """Inside it a store's weights are as a plan says; afterwards as before, bit for bit, also after an error.

    Yields the zeros in the chosen tensors, counted while writing. What is put back is found anew, since a model may have
    been moved to another device in between.
    """
    specs = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
    touched = [specs[n] for r in made.chosen for n in (r.name, *(m.name for m in r.followers))]
    kept: list[tuple[Spec, Tensor]] = [(s, _whole(store, s).clone()) for s in touched]

    def part_of(name: str) -> list[Part]:
        return list(store.parts(specs[name], "whole"))

    try:
        measured = write_rows(made, store.parts, store.sum, part_of, store.write)
        for row in made.chosen:
            if measured[row.name].zeros != row.prune:
                raise SecateurError(
                    f"wrote {measured[row.name].zeros} zeros to {row.name!r}, planned {row.prune}: a bug."
                )
        yield sum(m.zeros for m in measured.values())
    finally:
        for spec, values in kept:
            _whole(store, spec).copy_(values)


def _whole(store: MemoryStore, spec: Spec) -> Tensor:
    return next(iter(store.parts(spec, "whole"))).tensor
