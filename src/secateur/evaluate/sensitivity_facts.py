"""What a sensitivity scan found, as plain data: a layer at a time, a value of the metric at each sparsity."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import BadInput
from secateur.stores.staging import staged

from .budget import Allocation, Budget, allocate
from .spend import Curve

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from .flops import Flops

VERSION = 1


@dataclass(frozen=True)
class Piece:
    """One tensor of a layer, as it was before anything was pruned.

    Attributes:
        name, aliases, shape, dtype, role: as its store describes it; a tied tensor is one, its other names are aliases.
        numel, zeros: its weights, and how many were zero already.
        bytes: that a weight takes.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    role: str
    numel: int
    zeros: int
    bytes: int


@dataclass(frozen=True)
class Point:
    """One layer at one sparsity, everything else as it was.

    Attributes:
        asked: the sparsity.
        zeros: weights of the layer that were zero then, counted after writing.
        metrics: what ``evaluate`` returned; empty where nothing was measured.
        why: why nothing was measured, or ``None``.
    """

    asked: float
    zeros: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None


@dataclass(frozen=True)
class Layer:
    """A tensor, or a group of tensors that are pruned together, each to the same sparsity.

    Attributes:
        name: the tensor's name, or the group's.
        pieces: its tensors.
        points: one for each sparsity, rising.
        why: why the layer as a whole was left out, or ``None``; it then has no points.
    """

    name: str
    pieces: tuple[Piece, ...]
    points: tuple[Point, ...] = ()
    why: str | None = None

    @property
    def numel(self) -> int:
        """Weights in all its tensors."""
        return sum(p.numel for p in self.pieces)

    @property
    def zeros(self) -> int:
        """Weights that were zero before."""
        return sum(p.zeros for p in self.pieces)

    @property
    def measured(self) -> bool:
        """Whether anything was pruned in it at any sparsity. A layer in which nothing was is never called robust."""
        return any(p.why is None for p in self.points)

    def at(self, sparsity: float) -> Point | None:
        """The point of a sparsity, if something was measured there."""
        return next((p for p in self.points if p.asked == sparsity and p.why is None), None)

    @property
    def reason(self) -> str | None:
        """Why nothing was measured at any sparsity; ``None`` for a layer that was."""
        if self.measured:
            return None
        return self.why or "; ".join(dict.fromkeys(p.why for p in self.points if p.why))


@dataclass(frozen=True)
class Sensitivity:
    """How much a network loses when one layer at a time is pruned; made by `sensitivity`.

    Attributes:
        metric: the metric that is looked at. higher_is_better: which way of it is better.
        dense: every metric of the network as it came.
        criterion, pattern: what was pruned by, as plans name them.
        sparsities: that were asked for, rising.
        layers: one `Layer` each, in the order of the model.
        facts: what the caller said of the scan, such as the data it was measured on.

    Example:
        >>> layer = Layer("fc", (Piece("fc", (), (10, 10), "float32", "linear", 100, 0, 4),), (Point(0.5, 50, {"loss": 1.25}),))
        >>> scan = Sensitivity("loss", False, {"loss": 1.0}, "magnitude", "unstructured", (0.5,), (layer,))
        >>> scan.drop("fc", 0.5), Sensitivity.from_json(scan.to_json()) == scan
        (0.25, True)
    """

    metric: str
    higher_is_better: bool
    dense: Mapping[str, float]
    criterion: str
    pattern: str
    sparsities: tuple[float, ...]
    layers: tuple[Layer, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> float:
        """The metric of the network as it came."""
        return self.dense[self.metric]

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if name == layer.name or any(name in (p.name, *p.aliases) for p in layer.pieces):
                return layer
        raise KeyError(name)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def drop(self, layer: str | Layer, sparsity: float) -> float | None:
        """How much worse the metric is with a layer at a sparsity, in its own unit; below 0 where it is better.

        ``inf`` where the metric was not finite, which is the worst; ``None`` where nothing was measured.

        Raises:
            BadInput: a sparsity that was not asked for.
        """
        if sparsity not in self.sparsities:
            raise BadInput(f"this scan has the sparsities {', '.join(map(str, self.sparsities))}; got {sparsity!r}.")
        found = layer if isinstance(layer, Layer) else self[layer]
        point = found.at(sparsity)
        return None if point is None else self.worse(point)

    def worse(self, point: Point) -> float:
        """How much worse the metric of a measured point is than that of the network as it came."""
        value = point.metrics[self.metric]
        if not math.isfinite(value):
            return math.inf
        return self.baseline - value if self.higher_is_better else value - self.baseline

    @property
    def still(self) -> bool:
        """Whether the metric did not move at all, in no layer and at no sparsity: it may hide damage."""
        points = [p for layer in self.layers for p in layer.points if p.why is None]
        return bool(points) and all(p.metrics[self.metric] == self.baseline for p in points)

    def table(self) -> list[dict[str, Any]]:
        """A row a layer: name, tensors, weights, zeros before, the drop at each sparsity, why nothing was measured."""
        return [
            {
                "layer": layer.name, "tensors": [p.name for p in layer.pieces], "numel": layer.numel, "zeros": layer.zeros,
                "drops": {s: self.drop(layer, s) for s in self.sparsities}, "not measured": layer.reason,
            }
            for layer in self.layers
        ]  # fmt: skip

    def answers(self, at: float | None = None) -> list[str]:
        """Sentences: the first, the last and the early layers against the median; the most and the least sensitive.

        Args:
            at: one of the sparsities; by default the highest at which the median layer's metric is finite.

        Raises:
            BadInput: another sparsity.
        """
        from secateur.report.sensitivity_words import answers

        return answers(self, at)

    def curve(self, layer: Layer) -> Curve:
        """What a layer is predicted to lose against its zeros: the measured drops, never falling, up to the last finite one."""
        zeros, loss = [layer.zeros], [0.0]
        for point in sorted((p for p in layer.points if p.why is None), key=lambda p: p.zeros):
            worse = self.worse(point)
            if not math.isfinite(worse):
                break
            highest = max(loss[-1], worse)
            if point.zeros == zeros[-1]:
                loss[-1] = highest
            else:
                zeros.append(point.zeros)
                loss.append(highest)
        return Curve(tuple(zeros), tuple(loss))

    def allocation(self, sparsity: float, *, budget: Budget = "weights", flops: Flops | None = None) -> Allocation:
        """How many weights each tensor loses, so that a budget is met at the least predicted loss.

        Minimises ``Σ f(z)`` over all layers, where ``f`` is the drop of a layer's metric against its zeros ``z``: between
        the measured sparsities a straight line, made never to fall, 0 where nothing was pruned. This assumes that drops
        of several layers add up; they do not quite, so measure the network that comes out. No layer goes beyond the
        highest sparsity at which it was measured and the metric was finite.

        Args:
            sparsity: the share that is to go, ``0 <= s < 1``: of the layers' weights, of all FLOPs as ``flops`` counted
                them, or of the bytes of the layers' values.
            budget: ``"weights"`` meets the count of `secateur.prune` exactly; ``"flops"`` and ``"bytes"`` remove the
                share at least, and no more than a weight can tell.
            flops: for ``budget="flops"``, what `secateur.count_flops` counted for this model.

        Returns:
            An `Allocation`, to be handed on: ``secateur.prune(model, found.sparsity, allocation=found)``.

        Raises:
            Infeasible: the layers were not measured as far as that; the message says how far they were.
            NotDefined: the pattern is N:M, which fixes every count itself.
            BadInput: an unknown budget; FLOPs that are missing, or do not tell weights apart.
        """
        return allocate(self, sparsity, budget, flops)

    def to_json(self) -> str:
        """Everything as JSON; numbers that are not finite are texts."""
        facts = {
            "secateur_sensitivity": VERSION, "metric": self.metric, "higher_is_better": self.higher_is_better,
            "dense": told(self.dense), "criterion": self.criterion, "pattern": self.pattern,
            "sparsities": list(self.sparsities), "facts": dict(self.facts), "layers": [_layer(x) for x in self.layers],
        }  # fmt: skip
        return json.dumps(facts, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Sensitivity:
        """Reads `to_json` back.

        Raises:
            BadInput: not such a text, or of a newer version.
        """
        try:
            head = json.loads(text)
            if head["secateur_sensitivity"] > VERSION:
                raise BadInput(
                    f"this scan has version {head['secateur_sensitivity']}, this secateur reads up to {VERSION}."
                )
            return Sensitivity(
                head["metric"], head["higher_is_better"], read(head["dense"]), head["criterion"], head["pattern"],
                tuple(head["sparsities"]), tuple(_read_layer(x) for x in head["layers"]), head["facts"],
            )  # fmt: skip
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
            if isinstance(e, BadInput):
                raise
            raise BadInput(f"not a sensitivity scan of secateur: {e!r}") from e

    def to_html(self) -> str:
        """The scan as one self-contained page: the answer, a heat map, curves, every number."""
        from secateur.report.sensitivity_page import render

        return render(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_html` to a path that ends in ``.html``, `to_json` to one that ends in ``.json``; replaces a file there.

        Raises:
            BadInput: another ending, or a folder that does not exist.
        """
        out = Path(path)
        if out.suffix not in (".html", ".json"):
            raise BadInput(f"a scan is saved as .html or .json; got {str(path)!r}.")
        text = self.to_html() if out.suffix == ".html" else self.to_json()
        with staged(out, True, len(text.encode())) as stage:
            stage.write_text(text, "utf-8")

    def __repr__(self) -> str:
        measured = sum(layer.measured for layer in self.layers)
        return (
            f"Sensitivity({self.metric}={self.baseline:.6g} dense, {measured} of {len(self.layers)} layers measured at "
            f"{len(self.sparsities)} sparsities; print(scan) for the table)"
        )

    def __str__(self) -> str:
        from secateur.report.sensitivity_words import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from secateur.report.sensitivity_words import renderables

        yield from renderables(self)


def told(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics as strict JSON holds them: those that are not finite as ``"nan"``, ``"inf"``, ``"-inf"``."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def read(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What `told` made of metrics."""
    return {str(name): float(value) for name, value in metrics.items()}


def _layer(layer: Layer) -> dict[str, Any]:
    points = [{**asdict(p), "metrics": told(p.metrics)} for p in layer.points]
    return {"name": layer.name, "why": layer.why, "pieces": [asdict(p) for p in layer.pieces], "points": points}


def _read_layer(d: dict[str, Any]) -> Layer:
    return Layer(d["name"], tuple(map(_read_piece, d["pieces"])), tuple(map(read_point, d["points"])), d["why"])


def _read_piece(d: dict[str, Any]) -> Piece:
    return Piece(**{**d, "aliases": tuple(d["aliases"]), "shape": tuple(d["shape"])})


def read_point(d: dict[str, Any]) -> Point:
    """A point as JSON holds it."""
    return Point(float(d["asked"]), int(d["zeros"]), read(d["metrics"]), d["why"])
