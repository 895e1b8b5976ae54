"""What packing does for a model on this machine: bytes, memory and time, against torch's dense float32, bfloat16 and int8.

Everything is measured in the call that reports it, and the report names the machine. Time is that of the linear layers one
after another, by layer and summed; and that of a whole model, where there are inputs to call it with.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.errors import BadInput

from .grid import named
from .machine import Machine, cache_bytes, machine
from .table import Given, given, using
from .timing import Ratio

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from .bench_layers import Laid
    from .bench_memory import Memory
    from .bench_model import Whole
    from .bench_sources import Target

ROWS = (1, 16, 128)
OURS, INT8 = "packed", "int8"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Layer:
    """A matrix, and what was measured of it.

    Attributes:
        name, shape, dtype: of the weight; the shape is ``(out, in)``.
        density: share of it that is stored.
        layout: how it lies packed, or ``None`` where it stays dense, and ``why``.
        dense_bytes, held_bytes: in memory, dense in its own dtype and as packing leaves it.
        packed_bytes, file_bytes: on disk, as `secateur.runtime.files.save_packed` writes it, and as it lies in the target.
        seconds: rows to candidate to the median; candidates are ``"packed"`` (dense where it stays so), ``"float32"``,
            ``"bfloat16"`` and ``"int8"``.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    density: float
    layout: str | None
    why: str
    dense_bytes: int
    held_bytes: int
    packed_bytes: int
    file_bytes: int | None
    seconds: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Total:
    """The sum over all layers, at one number of rows; it is no end-to-end time.

    Attributes:
        rows: of the activations.
        seconds: candidate to the median.
        ratios: candidate to how many times its time the packed layers' is contained in it.
        faster: ``"float32"`` or ``"bfloat16"``, whichever dense product is the faster.
    """

    rows: int
    seconds: Mapping[str, float]
    ratios: Mapping[str, Ratio]
    faster: str

    @property
    def throughput(self) -> dict[str, float]:
        """Rows a second."""
        return {name: self.rows / s for name, s in self.seconds.items()}


@dataclass(frozen=True)
class Bench:
    """What was measured of a target.

    Attributes:
        target: the path, or the class of the model.
        machine: where, with how many threads.
        cache_bytes: of the last-level cache; weights that fit into it are not read from memory.
        file_bytes: on disk, or ``None``.
        layers: one for each matrix.
        totals: one for each number of rows.
        whole: a forward pass of the model; ``None`` without inputs.
        memory: of a process that holds the tensors, measured in a process of its own; ``None`` where it was not.
    """

    target: str
    machine: Machine
    cache_bytes: int
    file_bytes: int | None
    layers: tuple[Layer, ...]
    totals: tuple[Total, ...]
    memory: Memory | None
    whole: Whole | None = None

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights of all layers, dense in their own dtype."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of all layers as packing leaves them in memory."""
        return sum(layer.held_bytes for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all layers in a packed file."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def bits(self) -> float:
        """Bits a weight in memory, packed."""
        return 8 * self.held_bytes / self.weights

    @property
    def dense(self) -> dict[str, int]:
        """Why layers stay dense, and how many do for that reason."""
        return dict(Counter(layer.why for layer in self.layers if layer.layout is None).most_common())

    def to_json(self) -> str:
        """The facts as JSON text."""
        from secateur.report.bench_words import sentences

        more = {
            "totals": [{**asdict(t), "throughput": t.throughput} for t in self.totals],
            "said": list(sentences(self)),
            "weights": self.weights,
            "bits_a_weight": self.bits,
            "packed_bytes": self.packed_bytes,
            "stay_dense": self.dense,
        }
        return json.dumps({**asdict(self), **more}, indent=1)

    def __str__(self) -> str:
        from secateur.report.bench_text import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from secateur.report.bench_text import renderables

        yield from renderables(self)


def bench(
    target: Target,
    inputs: Any = None,
    *,
    rows: Sequence[int] = ROWS,
    turns: int = 9,
    table: Given = None,
    memory: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Measures what packing does for the linear layers of a target, on this machine and with torch's threads as they are set.

    Args:
        target: a ``.safetensors`` file or a folder of them, a model, or a dict of tensors. Nothing of it is changed.
        inputs: what the model is called with, to time the whole of it: a tensor, a tuple or a mapping.
        rows: numbers of rows of the activations.
        turns: how often each product is timed, 3 at least.
        table: what says which layers are packed, or the path of it; by default that which `secateur.runtime.table.active` gives.
        memory: whether to measure, in a process of its own, the memory that a checkpoint takes.
        progress: called with the layers that are done, of how many, and the next one's name.

    Returns:
        What was measured; it prints as a table, and ``to_json`` gives all of it.

    Raises:
        BadInput: rows or turns that are not to be had, or a path that holds no checkpoint.
        NothingChosen: no linear layer.

    Example:
        >>> import torch
        >>> found = bench(torch.nn.Linear(64, 32), rows=(1,), turns=3)
        >>> found.weights, found.dense_bytes, found.totals[0].seconds["packed"] > 0
        (2048, 8192, True)
    """
    if not rows or any(not isinstance(n, int) or n < 1 for n in rows) or turns < 3:
        raise BadInput(f"rows are whole numbers above 0, and turns 3 or more; got {tuple(rows)!r} and {turns!r}.")
    if inputs is not None and not isinstance(target, nn.Module):
        raise BadInput(f"inputs go with a model, which can be called; the target is a {type(target).__name__}.")
    from .bench_layers import measure  # for those who measure
    from .bench_memory import resident
    from .bench_model import whole
    from .bench_sources import opened

    found = opened(target)
    matrices = found.matrices
    with using(given(table)):
        laid = list(measure(matrices, rows, turns, lambda done, name: _tell(progress, done, len(matrices), name)))
        called = whole(target, inputs, turns) if isinstance(target, nn.Module) and inputs is not None else None
    path = isinstance(target, str | os.PathLike)
    return Bench(
        str(target) if path else type(target).__name__, machine(), cache_bytes(), found.nbytes,
        tuple(_layer(m) for m in laid), tuple(_total(laid, n) for n in rows),
        resident(str(target), {m.matrix.name: m.layout for m in laid}) if path and memory else None, called,
    )  # fmt: skip


def _tell(progress: Progress | None, done: int, total: int, name: str) -> None:
    if progress is not None:
        progress(done, total, name)


def _layer(m: Laid) -> Layer:
    seconds = {n: {c: statistics.median(s) for c, s in found.items()} for n, found in m.seconds.items()}
    name, shape, dtype = m.matrix.name, m.matrix.shape, named(m.matrix.dtype)
    sizes = m.dense_bytes, m.held_bytes, m.packed_bytes, m.matrix.file_bytes
    return Layer(name, shape, dtype, m.density, m.layout, m.why, *sizes, seconds)


def _total(laid: Sequence[Laid], rows: int) -> Total:
    """Sums of each turn; chunks may have had another number of turns, of which the fewest count."""
    turns = min(len(s) for m in laid for s in m.seconds[rows].values())
    names = laid[0].seconds[rows]
    sums = {c: [sum(m.seconds[rows][c][t] for m in laid) for t in range(turns)] for c in names}
    ratios = {c: Ratio.of([a / b for a, b in zip(s, sums[OURS], strict=True)]) for c, s in sums.items() if c != OURS}
    medians = {c: statistics.median(s) for c, s in sums.items()}
    faster = min((c for c in medians if c not in (OURS, INT8)), key=lambda c: medians[c])
    return Total(rows, medians, ratios, faster)
