"""The report: facts counted from what was written, never from what was meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class ReportRow:
    """What was counted in one tensor.

    Attributes:
        name: canonical name; ``aliases``: its other names.
        shape, dtype, role: as stored.
        numel: number of elements.
        zeros: elements that are zero now (``None`` where there is nothing to count: integers, no memory).
        threshold: the smallest ``|w|`` that is not zero, or ``None`` if nothing survives.
        asked: elements that were asked to be zero, where the allocation said so.
        nonfinite: NaN and infinite elements.
        skip: why the tensor was not chosen, or ``None`` if it was.
        goes_with: the tensor whose pruned channels took some of this one's elements along (a bias), or ``None``.
        units: the numbers of the heads that went, where heads were pruned.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    numel: int
    zeros: int | None = None
    threshold: float | None = None
    asked: int | None = None
    nonfinite: int = 0
    aliases: tuple[str, ...] = ()
    skip: str | None = None
    goes_with: str | None = None
    units: tuple[int, ...] | None = None

    @property
    def sparsity(self) -> float | None:
        """Fraction that is zero; ``None`` where nothing was counted or there is nothing."""
        return self.zeros / self.numel if self.zeros is not None and self.numel else None


@dataclass(frozen=True)
class Report:
    """What `secateur.prune`, `secateur.apply` and `secateur.inspect` counted.

    Attributes:
        rows: one `ReportRow` a tensor, sorted by name; those with ``skip is None`` are the chosen ones.
        asked: ``{"sparsity": …, "threshold": …, "criterion": …, "allocation": …, "pattern": …}``, or empty.
        warnings: what the user should know.
        out: path that was written, or ``None`` for pruning in place.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Linear(10, 10)
        >>> report = secateur.prune(model, 0.9)
        >>> report.zeros, report.total, report.sparsity
        (90, 100, 0.9)
        >>> round(report.model_sparsity, 3), round(report.compression_ratio, 2)   # the bias counts here
        (0.818, 5.5)
    """

    rows: tuple[ReportRow, ...]
    asked: dict[str, Any]
    warnings: tuple[str, ...] = ()
    out: str | None = None

    @property
    def chosen(self) -> tuple[ReportRow, ...]:
        """The rows of the chosen tensors."""
        return tuple(r for r in self.rows if r.skip is None)

    @property
    def shown(self) -> tuple[ReportRow, ...]:
        """The rows of the tensors that were written: the chosen ones, and what went with them."""
        return tuple(r for r in self.rows if r.skip is None or r.goes_with is not None)

    @property
    def total(self) -> int:
        """Number of chosen weights, by their original size."""
        return sum(r.numel for r in self.chosen)

    @property
    def zeros(self) -> int:
        """Number of chosen weights that are zero."""
        return sum(r.zeros or 0 for r in self.chosen)

    @property
    def sparsity(self) -> float:
        """Fraction of the chosen weights that is zero; 0 if there are none."""
        return self.zeros / self.total if self.total else 0.0

    @property
    def model_total(self) -> int:
        """Number of all parameters, tied ones counted once."""
        return sum(r.numel for r in self.rows if r.zeros is not None)

    @property
    def model_zeros(self) -> int:
        """Number of all parameters that are zero."""
        return sum(r.zeros or 0 for r in self.rows)

    @property
    def model_sparsity(self) -> float:
        """Fraction of all parameters that is zero, biases, norms and embeddings included."""
        return self.model_zeros / self.model_total if self.model_total else 0.0

    @property
    def compression_ratio(self) -> float:
        """All parameters divided by those that are not zero (ShrinkBench, arXiv:2003.03033); inf if all are.

        A count of weights, not of bytes: a dense file with zeros in it is as large as before.
        """
        live = self.model_total - self.model_zeros
        return self.model_total / live if live else float("inf")

    def __getitem__(self, name: str) -> ReportRow:
        for r in self.rows:
            if name == r.name or name in r.aliases:
                return r
        raise KeyError(name)

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def to_json(self) -> str:
        """The facts as JSON text."""
        facts = {
            "sparsity": self.sparsity, "zeros": self.zeros, "total": self.total,
            "model_sparsity": self.model_sparsity, "model_zeros": self.model_zeros,
            "model_total": self.model_total,
            "compression_ratio": self.compression_ratio if self.model_total != self.model_zeros else None,
            "asked": self.asked, "out": self.out, "warnings": list(self.warnings),
            "rows": [{**asdict(r), "sparsity": r.sparsity} for r in self.rows],
        }  # fmt: skip
        return json.dumps(facts, indent=1)

    def __repr__(self) -> str:
        noted = f", {len(self.warnings)} warning{'s' * (len(self.warnings) > 1)}" if self.warnings else ""
        written = f", out={self.out!r}" if self.out is not None else ""
        return (
            f"Report(sparsity={self.sparsity:.6g}, zeros={self.zeros}, total={self.total}, {len(self.chosen)} of "
            f"{len(self.rows)} tensors{noted}{written}; print(report) for the table)"
        )

    def __str__(self) -> str:
        from .tables import as_text

        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .tables import renderables

        yield from renderables(self)

    def _repr_html_(self) -> str:
        from .html import as_html

        return as_html(self)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(_IN_PLACE)

    def __getattr__(self, name: str) -> NoReturn:
        if name in _OF_A_MODULE:
            raise AttributeError(_IN_PLACE)
        raise AttributeError(f"a Report has no attribute {name!r}; see help(secateur.Report)")


_IN_PLACE = (
    "this is a Report, not a model: secateur.prune works in place and returns a report. "
    "Write `report = secateur.prune(model, 0.9)` and go on with `model`."
)
_OF_A_MODULE = frozenset(
    "forward parameters named_parameters modules named_modules state_dict load_state_dict train eval to cuda cpu half "
    "float bfloat16 generate save_pretrained config device dtype zero_grad requires_grad_ children apply".split()
)
