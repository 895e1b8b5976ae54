"""What of a model is packed, what it takes, and why the rest is dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.core.layouts import PAD, Layout
from secateur.core.types import Spec
from secateur.stores.memory import MemoryStore

from .modules import count_stored, judged, require_module
from .sites import Site, survey
from .table import Given
from .weight import PackedWeight


@dataclass(frozen=True)
class ModelRow:
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
class ModelReport:
    """The parameters of a model, packed or not; ``print`` shows a table.

    Attributes:
        rows: one a parameter, sorted by name.
    """

    rows: tuple[ModelRow, ...]

    @property
    def packed(self) -> tuple[ModelRow, ...]:
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

    def __iter__(self) -> Iterator[ModelRow]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> ModelRow:
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


def _cells(row: ModelRow) -> tuple[str, ...]:
    return (
        row.name, "x".join(map(str, row.shape)), f"{row.sparsity or 0:.2%}", str(row.layout), f"{row.nbytes:,}",
        f"{row.dense_nbytes:,}", f"{row.bits:.3g}",
    )  # fmt: skip


def packed_report(model: nn.Module, *, table: Given = None) -> ModelReport:
    """What of a model is packed, what it takes in memory, and why the rest is dense.

    Args:
        model: packed or not.
        table: what was measured, for what is not packed; see `secateur.runtime.table`.

    Returns:
        A row for each parameter. Zeros are counted where a weight could be packed.

    Raises:
        BadInput: not a module.
        NothingChosen: a model without parameters.

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
    specs, sites = survey(model)
    store = MemoryStore(model)
    return ModelReport(tuple(_row(s, store.entry(s).tensor, sites.get(s.name), table) for s in specs))


def _row(spec: Spec, t: Tensor, site: Site | None, table: Given) -> ModelRow:
    dtype = str(spec.dtype).removeprefix("torch.")
    if isinstance(t, PackedWeight):
        parts, layout = t.layer.parts, t.layer.packed_layout
        nbytes = sum(p.nbytes for p in parts)
        return ModelRow(spec.name, spec.shape, dtype, len(parts[1]) - PAD, layout, nbytes, t.nbytes)
    size = 0 if is_lazy(t) else t.nbytes
    if site is None or t.device.type != "cpu":
        return ModelRow(spec.name, spec.shape, dtype, None, None, size, size, spec.skip or f"it is on {t.device}")
    stored = count_stored(t)
    choice = judged(site, t, None, table)
    why = choice.why if choice.layout is None else f"it is not packed; as {choice.layout} it would be"
    return ModelRow(spec.name, spec.shape, dtype, stored, None, size, size, why)
