"""What of a model is packed, what it takes, and why the rest is dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from secateur.core.layouts import DTYPES, PAD, Layout
from secateur.stores import checks, names
from secateur.stores.memory import MemoryStore

from .layers import PackedLayer
from .modules import density, judged, require_module
from .sites import survey
from .table import Table


@dataclass(frozen=True)
class PackedRow:
    """One weight of a model, or another of its parameters.

    Attributes:
        name: canonical name; of a weight that several layers share, that of the first.
        shape, dtype: of the whole tensor.
        stored: elements whose bits are not those of +0.0; ``None`` where they were not counted.
        layout: how it lies; ``None`` for dense.
        nbytes: that it takes in memory.
        dense_nbytes: that it takes dense.
        why: the reason why it is dense; empty for a packed one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: int | None
    layout: Layout | None
    nbytes: int
    dense_nbytes: int
    why: str = ""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def sparsity(self) -> float | None:
        """The share that is not stored; ``None`` where nothing was counted."""
        return None if self.stored is None or not self.numel else 1 - self.stored / self.numel

    @property
    def bits(self) -> float:
        """Bits in memory for each element."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class PackedReport:
    """The parameters of a model, packed or not; ``print`` shows a table.

    Attributes:
        rows: one a parameter, sorted by name.
    """

    rows: tuple[PackedRow, ...]

    @property
    def packed(self) -> tuple[PackedRow, ...]:
        """The rows of packed weights."""
        return tuple(r for r in self.rows if r.layout is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they lie."""
        return sum(r.nbytes for r in self.rows)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that they take dense."""
        return sum(r.dense_nbytes for r in self.rows)

    def __iter__(self) -> Iterator[PackedRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> PackedRow:
        for r in self.rows:
            if r.name == name:
                return r
        raise KeyError(name)

    def __str__(self) -> str:
        head = ("weight", "shape", "sparsity", "layout", "bytes", "dense", "bits a weight")
        lines = [head, *(_cells(r) for r in self.packed)] if self.packed else []
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))] if lines else []
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        left = Counter(r.why for r in self.rows if r.layout is None)
        total = (
            f"{len(self.packed)} of {len(self.rows)} parameters packed: {self.nbytes:,} bytes, "
            f"{self.dense_nbytes:,} dense ({self.nbytes / max(1, self.dense_nbytes):.1%})"
        )
        return "\n".join([*table, total, *(f"dense: {why} ({n})" for why, n in left.most_common())])


def _cells(row: PackedRow) -> tuple[str, ...]:
    return (
        row.name, "x".join(map(str, row.shape)), f"{row.sparsity or 0:.2%}", str(row.layout), f"{row.nbytes:,}",
        f"{row.dense_nbytes:,}", f"{row.bits:.3g}",
    )  # fmt: skip


def packed_report(model: nn.Module, *, table: Table | None = None) -> PackedReport:
    """What of a model is packed, what it takes in memory, and why the rest is dense.

    Args:
        model: packed or not.
        table: what was measured, for what is not packed; see `secateur.runtime.table`.

    Returns:
        A row for each parameter. Zeros are counted where a weight could be packed.

    Raises:
        BadInput: not a module.

    Example:
        >>> from secateur.runtime.modules import pack
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256))
        >>> _ = model[0].weight.data[:, 8:].zero_()
        >>> print(packed_report(pack(model, layout="csr")))
        weight    shape    sparsity  layout  bytes   dense    bits a weight
        0.weight  256x256  96.88%    csr     14,728  262,144  1.8
        1 of 4 parameters packed: 17,800 bytes, 265,216 dense (6.7%)
        dense: a bias (2)
        dense: a norm or another per-channel scale (1)
    """
    require_module(model, "packed_report")
    rows = {r.name: r for r in _packed(model)}
    if any(True for _ in model.parameters()):
        rows |= {r.name: r for r in _dense(model, table)}
    return PackedReport(tuple(rows[name] for name in sorted(rows)))


def _packed(model: nn.Module) -> Iterator[PackedRow]:
    seen = set()
    for path, layer in names.walk(model).modules.items():
        if not isinstance(layer, PackedLayer) or id(layer.parts[1]) in seen:
            continue
        parts = layer.parts
        seen.add(id(parts[1]))
        yield PackedRow(
            f"{path}.weight" if path else "weight", tuple(layer.weight_shape), str(parts[1].dtype).removeprefix("torch."),
            len(parts[1]) - PAD, layer.packed_layout, sum(p.nbytes for p in parts), layer.weight.nbytes,
        )  # fmt: skip


def _dense(model: nn.Module, table: Table | None) -> Iterator[PackedRow]:
    specs, sites = survey(model)
    store = MemoryStore(model)
    for spec in specs:
        t = store.entry(spec).tensor
        size = 0 if spec.skip is not None and spec.skip.startswith("it is lazy") else t.numel() * t.element_size()
        stored, why = None, spec.skip or ""
        if spec.name in sites and t.dtype in DTYPES and checks.is_plain(t) and t.device.type == "cpu":
            stored = round(density(t) * t.numel())
            choice = judged(sites[spec.name], None, table)
            why = choice.why if choice.layout is None else f"not packed; it would be {choice.layout}"
        yield PackedRow(spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), stored, None, size, size, why)
