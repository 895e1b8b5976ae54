"""A sensitivity scan in a terminal: the table, and the answer in sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .run_findings import percent
from .tables import MOST_ROWS, printed
from .words import join, printable, signed

if TYPE_CHECKING:
    from secateur.evaluate.budget import Allocation
    from secateur.evaluate.sensitivity_facts import Layer, Sensitivity

EARLY = 4
"""The early layers are the first one in this many."""
MOST_NAMED = 5
"""Layers that a sentence names."""
LONG = 1e5
"""Numbers from here on are written with a power of ten."""
NONE, WORST = "\u2013", "not finite"


def digits_of(scan: Sensitivity) -> int:
    """Decimals that tell the numbers of a metric apart."""
    largest = max([abs(scan.baseline), *(abs(d) for d in finite_drops(scan))])
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def finite_drops(scan: Sensitivity) -> list[float]:
    """Every drop that is a number."""
    return [d for layer in scan.layers for d in drops_of(scan, layer) if d is not None and math.isfinite(d)]


def drops_of(scan: Sensitivity, layer: Layer) -> list[float | None]:
    """The drop of a layer at each sparsity."""
    return [scan.drop(layer, s) for s in scan.sparsities]


def shown(drop: float | None, digits: int) -> str:
    """A drop in a table: what is lost, with a true minus where something is won.

    >>> shown(0.1234, 2), shown(None, 2), shown(math.inf, 2), shown(0.001, 2)
    ('0.12', '–', 'not finite', '0.00')
    """
    if drop is None:
        return NONE
    if math.isinf(drop):
        return WORST
    return signed(drop, digits).removeprefix("+") if abs(drop) < LONG else f"{drop:.2e}"


def title(scan: Sensitivity) -> str:
    """What the numbers of the table are."""
    way = "how far it falls" if scan.higher_is_better else "how far it rises"
    return (
        f"{printable(scan.metric)} (dense {scan.baseline:.{digits_of(scan)}f}): {way} when one layer alone is pruned, "
        f"{printable(scan.criterion)}, {scan.pattern}"
    )


def median(scan: Sensitivity, at: float) -> float | None:
    """The median drop of the layers that were measured at a sparsity."""
    found = [d for layer in scan.layers if (d := scan.drop(layer, at)) is not None]
    return statistics.median(found) if found else None


def sparsity_for(scan: Sensitivity, at: float | None = None) -> float | None:
    """The sparsity that sentences speak of: the one asked, or the one at which the worst layer and the median are farthest
    apart, the higher where several are; ``None`` where nothing was measured.

    Raises:
        BadInput: a sparsity that the scan does not have.
    """
    if at is not None:
        median(scan, at)  # which refuses another sparsity
        return at
    apart = {}
    for s in scan.sparsities:
        found = [d for layer in scan.layers if (d := scan.drop(layer, s)) is not None and math.isfinite(d)]
        if found:
            apart[s] = max(found) - statistics.median(found)
    known = [s for s in scan.sparsities if median(scan, s) is not None]
    return max(apart, key=lambda s: (apart[s], s)) if apart else known[-1] if known else None


def answers(scan: Sensitivity, at: float | None = None) -> list[str]:
    """See `Sensitivity.answers`."""
    at = sparsity_for(scan, at)
    said = []
    if at is not None:
        layers = [layer for layer in scan.layers if scan.drop(layer, at) is not None]
        said += _ends(scan, layers, at)
        if len(layers) > 1:
            said += _ranked(scan, layers, at)
    said += _notes(scan)
    return said


def _ends(scan: Sensitivity, layers: Sequence[Layer], at: float) -> list[str]:
    """First, last and early layers against the median. Only layers that were measured are spoken of."""
    middle = median(scan, at)
    order = [layer for layer in scan.layers if layer.why is None]
    said = []
    for what, layer in (("First", order[0]), ("Last", order[-1])):
        drop = scan.drop(layer, at)
        if drop is None:
            said.append(f"{what} layer {printable(layer.name)}: not measured at {percent(at)} ({_why(layer, at)}).")
        elif len(order) > 1 or what == "First":
            lost = _lost(scan, drop, at)
            said.append(f"{what} layer {printable(layer.name)}: {lost}{_against(scan, drop, middle, len(layers))}.")
    first = order[: len(order) // EARLY]
    early = [d for x in first if (d := scan.drop(x, at)) is not None]
    if len(early) > 1:
        drop = statistics.median(early)
        lost = f"{_lost(scan, drop, at)}{_against(scan, drop, middle, len(layers))}"
        said.append(f"Early layers, the first {len(first)} of {len(order)}: at their median {lost}.")
    return said


def _why(layer: Layer, at: float) -> str:
    point = next((p for p in layer.points if p.asked == at), None)
    return (layer.why if point is None else point.why) or ""


def _lost(scan: Sensitivity, drop: float, at: float) -> str:
    """What happens to the metric."""
    name, digits = printable(scan.metric), digits_of(scan)
    if math.isinf(drop):
        return f"{name} is not finite at {percent(at)}, the worst there is"
    if not float(f"{drop:.{digits}f}"):
        return f"{name} stays the same at {percent(at)}"
    way = "falls" if (drop > 0) == scan.higher_is_better else "rises"
    return f"{name} {way} by {shown(abs(drop), digits)} at {percent(at)}"


def _against(scan: Sensitivity, drop: float, middle: float | None, count: int) -> str:
    """A drop beside the median layer's."""
    if middle is None or count < 2 or math.isinf(drop):
        return ""
    digits = digits_of(scan)
    if math.isinf(middle):
        return ", where the median layer's is not finite"
    if float(f"{middle:.{digits}f}") > 0 and drop > 0:
        return f", {drop / middle:.1f} times the median layer's {shown(middle, digits)}"
    return f"; the median layer's drop is {shown(middle, digits)}"


def _ranked(scan: Sensitivity, layers: Sequence[Layer], at: float) -> list[str]:
    digits = digits_of(scan)
    order = sorted((x for x in layers if moves(scan, x)), key=lambda layer: -(scan.drop(layer, at) or 0.0))
    many = min(MOST_NAMED, len(order) // 2)
    if not many:
        return []

    def listed(some: Sequence[Layer]) -> str:
        return join([f"{printable(x.name)} ({shown(scan.drop(x, at), digits)})" for x in some])

    return [
        f"Most sensitive at {percent(at)}: {listed(order[:many])}.",
        f"Least sensitive at {percent(at)}: {listed(order[::-1][:many])}.",
    ]


def moves(scan: Sensitivity, layer: Layer) -> bool:
    """Whether pruning a layer changes the metric at any sparsity; one that never does may be one that is not used."""
    return any(drops_of(scan, layer))


def _notes(scan: Sensitivity) -> Iterator[str]:
    """What is not to be taken for robust."""
    missed = [f"{printable(x.name)} ({printable(x.reason or '')})" for x in scan.layers if not x.measured]
    if missed:
        yield f"Not measured, which says nothing of how robust they are: {_some(missed)}."
    if scan.still:
        yield f"{printable(scan.metric)} did not move at all: it may hide damage. Take a finer metric, or more data."
        return
    deaf = [x.name for x in scan.layers if x.measured and not moves(scan, x)]
    if deaf:
        yield f"Moved nothing at any sparsity: {_some([printable(n) for n in deaf])}. See that the network uses them."


def _some(names: Sequence[str]) -> str:
    if len(names) <= MOST_NAMED:
        return join(names)
    return ", ".join(names[:MOST_NAMED]) + f" and {len(names) - MOST_NAMED} more"


def note_of(layer: Layer) -> str:
    """What a row of the table says beside its numbers."""
    if not layer.measured:
        return f"not measured: {layer.reason}"
    names = [p.name for p in layer.pieces]
    said = [] if names == [layer.name] else [f"{len(names)} tensors"]
    said += [f"tied: {a}" for p in layer.pieces for a in p.aliases if not a.endswith(p.name)]
    return "; ".join(said)


def renderables(scan: Sensitivity) -> Iterator[RenderableType]:
    """The parts of a scan, in order: the table, the answers, what it was measured on."""
    digits = digits_of(scan)
    yield Text(title(scan), style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    for head in ("weights", *(percent(s) for s in scan.sparsities)):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for layer in scan.layers[:MOST_ROWS]:
        drops = [shown(d, digits) for d in drops_of(scan, layer)]
        table.add_row(Text(printable(layer.name)), f"{layer.numel:,}", *drops, Text(printable(note_of(layer)), "dim"))
    if len(scan.layers) > MOST_ROWS:
        table.add_row(f"… and {len(scan.layers) - MOST_ROWS} more (to_json() has all)")
    yield table
    for sentence in answers(scan):
        yield Text(sentence)
    for what, value in scan.facts.items():
        yield Text(f"{printable(what)}: {printable(value)}", style="dim")


def as_text(scan: Sensitivity) -> str:
    """The scan as plain text."""
    return printed(renderables(scan))


def allocation_text(found: Allocation) -> str:
    """An allocation as plain text: a row a layer, the totals, what was assumed."""
    return printed(_allocation(found))


def _allocation(found: Allocation) -> Iterator[RenderableType]:
    from secateur.evaluate.budget import ASSUMED

    scan, digits = found.scan, digits_of(found.scan)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head, justify in (
        ("layer", "left"),
        ("zero", "right"),
        ("of", "right"),
        ("sparsity", "right"),
        ("predicted", "right"),
    ):
        table.add_column(head, justify=justify, overflow="fold")  # type: ignore[arg-type]
    layers = [x for x in scan.layers if x.why is None]
    for layer in layers[:MOST_ROWS]:
        count = sum(found.counts[p.name] for p in layer.pieces)
        lost = scan.curve(layer).at(count)
        table.add_row(
            Text(printable(layer.name)), f"{count:,}", f"{layer.numel:,}", f"{count / max(layer.numel, 1):.2%}",
            shown(lost, digits),
        )  # fmt: skip
    if len(layers) > MOST_ROWS:
        table.add_row(f"… and {len(layers) - MOST_ROWS} more")
    yield table
    way = "fall" if scan.higher_is_better else "rise"
    yield Text(
        f"{sum(found.counts.values()):,} weights, sparsity {found.sparsity:.4%}; {printable(scan.metric)} is predicted to {way} "
        f"by {shown(found.loss, digits)}",
        style="bold",
    )
    yield Text(ASSUMED, style="dim")
