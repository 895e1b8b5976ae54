"""What the studies of one-shot pruning share: the methods, a pruned copy of a network and what it cost, rows of tables."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import nn

import secateur
from benchmarks import machine
from benchmarks.evidence.common import current
from secateur.evaluate.statistics import Interval, interval

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {"allocation": "uniform"}),
    "global": ("magnitude, global", {"allocation": "global"}),
    "uniform": ("magnitude, uniform", {"allocation": "uniform"}),
    "wanda": ("Wanda", {"criterion": "wanda"}),
    "sparsegpt": ("SparseGPT", {"solver": "sparsegpt"}),
}
"""The title of each, and what `secateur.prune` is asked beside how much."""
MAGNITUDES, CALIBRATED = ("global", "uniform"), ("wanda", "sparsegpt")

Results = Sequence[Mapping[str, Mapping[str, Any]]]
"""Of every seed, what its cells found; what no seed changes was made for one of them only."""


@dataclass(frozen=True)
class Point:
    """A method at an amount: a sparsity as text, or an N:M pattern."""

    method: str
    amount: str

    @property
    def name(self) -> str:
        """Of its cell."""
        return f"{self.method}-{self.amount.replace(':', 'of')}"

    @property
    def title(self) -> str:
        """In tables."""
        title = METHODS[self.method][0]
        if ":" in self.amount:  # leaves an allocation no choice
            return f"{self.amount}, {title.partition(',')[0]}"
        return f"{float(self.amount):.0%}, {title}"

    @property
    def drawn(self) -> bool:
        """Whether a seed changes it: it draws masks, or data."""
        return self.method not in MAGNITUDES

    def asked(self, seed: int) -> dict[str, Any]:
        """The arguments of `secateur.prune`, but for the data."""
        asked = dict(METHODS[self.method][1])
        if self.method == "random":
            asked["criterion"] = secateur.random(seed)
        if ":" in self.amount:
            asked.pop("allocation", None)
            return {**asked, "pattern": self.amount}
        return {**asked, "sparsity": float(self.amount)}


def points(amounts: Sequence[str]) -> list[Point]:
    """Every method at every amount; under N:M the two magnitudes are one."""
    return [Point(m, a) for a in amounts for m in METHODS if not (":" in a and m == "global")]


def pruned(
    model: nn.Module, point: Point, seed: int, batches: Callable[[], Sequence[Any]], **more: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A pruned copy of a network on the device, and what that took.

    Args:
        model: the dense network.
        point: how and how much.
        seed: of random masks.
        batches: makes the calibration data; called where the method looks at data, outside the time that is taken.
        more: further arguments of `secateur.prune`.

    Returns:
        The copy; and the zeros, the weights they are counted in, the seconds, and the bytes held at the most beyond what
        was held before (``None`` where the system does not tell).
    """
    model = copy.deepcopy(model).to(current().device)
    if point.method in CALIBRATED:
        more["calibration"] = batches()
    told = machine.forget_peak()
    held, start = machine.held_bytes(), perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", secateur.SecateurWarning)  # a layer left with nothing: the scores tell
        report = secateur.prune(model, **point.asked(seed), **more)
    seconds = perf_counter() - start
    peak = machine.peak_bytes() - held if told and current().device == "cpu" else None
    return model.eval(), {"zeros": report.zeros, "weights": report.total, "prune seconds": seconds, "peak": peak}


def on_device(batch: Any) -> Any:
    """A tensor, or a mapping of tensors, on the device."""
    if isinstance(batch, Mapping):
        return {k: on_device(v) for k, v in batch.items()}
    return batch.to(current().device)


def over(results: Results, name: str, value: Callable[[Any], float | None]) -> Interval | None:
    """Mean and interval over the seeds that have a cell; ``None`` where none has a value."""
    found = [value(r[name]) for r in results if name in r]
    return interval([v for v in found if v is not None]) if found and None not in found else None


def cost(results: Results, name: str) -> tuple[str, str]:
    """Seconds and MiB of a cell, as a table shows them."""
    seconds, peak = (over(results, name, lambda c, k=k: c.get(k)) for k in ("prune seconds", "peak"))
    return (f"{seconds.mean:.1f}" if seconds else "", f"{peak.mean / 2**20:,.0f}" if peak else "")
