"""A plan: what would be done, as data, one row a tensor. The dry run *is* the plan.

From a row's cut any process computes its part of the mask alone, so the plan of a checkpoint of any size is a small JSON
text. Only a plan whose criterion cannot be recomputed from the weights carries the masks themselves, bit-packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import BadInput, PlanMismatch

from .bits import unpack
from .choose import selector_of
from .criteria import Criterion, RandomCriterion, magnitude
from .elements import chunks_of
from .heads import Head, Slices
from .keys import FORMATS
from .patterns import Block, Channel, GroupPattern, Pattern
from .select import Cut, identity
from .source import Source
from .spelling import pattern_of
from .types import Align, Attention, Member, Part, Parts, Reduce, Spec
from .units import pieces_gone

VERSION = 1


@dataclass(frozen=True)
class Row:
    """What a plan says of one tensor.

    Attributes:
        name, aliases, shape, dtype, role, out_dim, in_dim, batch_dims, groups: as in its `Spec`.
        zeros: weights that are zero now.
        asked: weights the allocation asks to be zero (``None`` under a threshold, and for heads, whose layer is asked).
        prune: weights that will be zero: ``max(asked, zeros)``, or for blocks, channels and heads the units that fit.
        threshold: the smallest ``|w|`` that survives, or ``None`` if nothing does.
        cut: below what to prune, in the keys of the tensor's dtype.
        followers: tensors whose slices go with this one's units (a bias).
        skip: why the tensor is left alone, or ``None``.
        attention, units: for heads, its place in its layer, and the numbers of the heads that go: no tensor of the layer alone
            could tell them from a cut.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    out_dim: int | None = None
    in_dim: int | None = None
    batch_dims: tuple[int, ...] = ()
    groups: int = 1
    aliases: tuple[str, ...] = ()
    zeros: int | None = None
    asked: int | None = None
    prune: int | None = None
    threshold: float | None = None
    cut: Cut | None = None
    followers: tuple[Member, ...] = ()
    skip: str | None = None
    attention: Attention | None = None
    units: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.spec.numel

    @property
    def sparsity(self) -> float | None:
        """Fraction that will be zero; ``None`` for a tensor that is skipped or empty."""
        return self.prune / self.numel if self.prune is not None and self.numel else None

    @property
    def spec(self) -> Spec:
        """The tensor as a store would describe it."""
        dtype = getattr(torch, self.dtype)
        return Spec(
            self.name, self.shape, dtype, self.role, self.out_dim, self.in_dim, self.batch_dims, self.groups,
            aliases=self.aliases, skip=self.skip, attention=self.attention,
        )  # fmt: skip


def row_of(spec: Spec, **more: Any) -> Row:
    """A row that describes a tensor."""
    return Row(
        spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), spec.role, spec.out_dim, spec.in_dim,
        spec.batch_dims, spec.groups, spec.aliases, skip=spec.skip, **more,
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What would be done, as data; make one with `secateur.plan`, carry it out with `secateur.apply`.

    Attributes:
        rows: one `Row` a tensor, sorted by name, skipped ones included.
        sparsity, threshold: what was asked; one of them is ``None``.
        criterion, allocation: by name. pattern: the object.
        nonfinite: what happens to NaN and Inf.
        warnings: what the user should know before carrying it out.
        source: of a plan of files, ``{name: [bytes, sha256 of its header]}``, by which `apply` knows them again.
        masks: ``None``, or for each pruned tensor its keep-mask as packed bits (uint8, lowest bit first, row-major).

    Example:
        >>> import torch, secateur
        >>> plan = secateur.plan({"fc.weight": torch.tensor([[3.0, -1.0]])}, 0.5)
        >>> plan.rows[0].prune, plan.total, secateur.Plan.from_json(plan.to_json()) == plan
        (1, 2, True)
    """

    rows: tuple[Row, ...]
    sparsity: float | None
    threshold: float | None
    criterion: str
    allocation: str
    pattern: Pattern
    nonfinite: str = "error"
    warnings: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] | None = field(default=None, compare=False)
    source: Mapping[str, Sequence[int | str]] | None = None

    @property
    def chosen(self) -> tuple[Row, ...]:
        """The rows of the tensors that are pruned."""
        return tuple(r for r in self.rows if r.skip is None)

    @property
    def total(self) -> int:
        """Number of chosen weights, by their original size."""
        return sum(r.numel for r in self.chosen)

    @property
    def prune(self) -> int:
        """How many chosen weights will be zero."""
        return sum(r.prune or 0 for r in self.chosen)

    def asked(self) -> dict[str, Any]:
        """What was asked, as a report says it."""
        return {
            "sparsity": self.sparsity, "threshold": self.threshold, "criterion": self.criterion,
            "allocation": self.allocation, "pattern": str(self.pattern),
        }  # fmt: skip

    def digest(self) -> str:
        """A hash of the plan and of the masks it carries."""
        found = hashlib.sha256(self.to_json().encode())
        for name in sorted(self.masks or {}):
            assert self.masks is not None
            found.update(name.encode() + self.masks[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text, without masks; floats are written so that they read back bit for bit."""
        reduce = getattr(self.pattern, "reduce", None)
        source = {} if self.source is None else {"source": self.source}
        head = {
            "secateur_plan": VERSION, "sparsity": self.sparsity, "threshold": self.threshold,
            "criterion": self.criterion, "allocation": self.allocation, "pattern": str(self.pattern),
            "reduce": reduce, "nonfinite": self.nonfinite, "carries_masks": self.masks is not None,
            "warnings": list(self.warnings), **source, "rows": [_as_dict(r) for r in self.rows],
        }  # fmt: skip
        return json.dumps(head, indent=1)

    @staticmethod
    def from_json(text: str, masks: Mapping[str, Tensor] | None = None) -> Plan:
        """Reads `to_json` back.

        Raises:
            BadInput: not such a text, one that no plan writes, of a newer version, or made with masks that are not given or
                not those of its rows.
        """
        try:
            head = json.loads(text)
            if head["secateur_plan"] > VERSION:
                raise BadInput(f"this plan has version {head['secateur_plan']}, this secateur reads up to {VERSION}.")
            if head["carries_masks"] and masks is None:
                raise BadInput("this plan carries its masks in a safetensors file beside the JSON; give both.")
            pattern = pattern_of(head["pattern"])
            if head["reduce"]:
                pattern = replace(pattern, reduce=head["reduce"])  # type: ignore[type-var]
            plan = Plan(
                tuple(_row(r) for r in head["rows"]), head["sparsity"], head["threshold"], head["criterion"],
                head["allocation"], pattern, head["nonfinite"], tuple(head["warnings"]),
                masks if head["carries_masks"] else None, head.get("source"),
            )  # fmt: skip
            _check(plan)
            return plan
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
            if isinstance(e, BadInput):
                raise
            raise BadInput(f"not a plan of secateur: {e!r}") from e

    def __str__(self) -> str:
        asked = f"sparsity {self.sparsity:g}, " if self.sparsity is not None else ""
        asked = f"threshold {self.threshold:g}, " if self.threshold is not None else asked
        lines = [f"{asked}{self.criterion}, {self.allocation}, {self.pattern}: {self.prune} of {self.total} weights"]
        for r in self.chosen:
            lines.append(f"  {r.name} {list(r.shape)} {r.role}: {r.prune} of {r.numel} ({r.sparsity or 0:.2%})")
        return "\n".join(lines)


def _as_dict(row: Row) -> dict[str, Any]:
    """A row for JSON; what only heads have is left out elsewhere."""
    return {k: v for k, v in asdict(row).items() if v is not None or k not in ("attention", "units")}


def _row(d: dict[str, Any]) -> Row:
    if not isinstance(getattr(torch, d["dtype"], None), torch.dtype):
        raise ValueError(f"{d['dtype']!r} is not a dtype")
    d = _tuples(d)
    d["cut"] = Cut(**d["cut"]) if d["cut"] else None
    d["followers"] = tuple(Member(m["name"], tuple(m.get("sections", ()))) for m in d["followers"])
    d["attention"] = Attention(**_tuples(d["attention"])) if d.get("attention") else None
    return Row(**d)


def _tuples(d: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}


def _check(plan: Plan) -> None:
    """Refuses what no plan says: a text may have been changed, and is read before anything is touched.

    Raises:
        ValueError: what is odd.
    """
    if plan.nonfinite not in ("error", "keep", "prune"):
        raise ValueError(f"nonfinite is {plan.nonfinite!r}")
    for number in (plan.sparsity, plan.threshold):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise ValueError(f"{number!r} is no sparsity or threshold")
    if not all(isinstance(text, str) for text in (plan.criterion, plan.allocation, *plan.warnings)):
        raise ValueError("criterion, allocation and warnings are texts")
    if plan.masks is None and not isinstance(plan.pattern, Head):
        named_criterion(plan.criterion)
    if plan.source is not None and not all(
        isinstance(f, str) and len(told) == 2 and _is_count(told[0], 1 << 62) and isinstance(told[1], str)
        for f, told in plan.source.items()
    ):
        raise ValueError("its source is names of files, their sizes and hashes")
    names = [n for r in plan.rows for n in (r.name, *r.aliases)]
    if not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise ValueError("names of rows are texts, and each occurs once")
    for row in plan.rows:
        _check_shape(row)
    layers: dict[tuple[str, ...], tuple[int, ...] | None] = {}
    for row in plan.chosen:
        _check_chosen(plan, row)
        if row.attention is not None and layers.setdefault(row.attention.tensors, row.units) != row.units:
            raise ValueError(f"{row.name!r} loses other heads than the rest of its layer")


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _check_shape(row: Row) -> None:
    dims = len(row.shape) - 1
    named = [d for d in (row.out_dim, row.in_dim, *row.batch_dims) if d is not None]
    if not all(_is_count(s, 1 << 62) for s in row.shape) or not all(_is_count(d, dims) for d in named):
        raise ValueError(f"the shape or dims of {row.name!r} are {row.shape}, {named}")
    counts = [c for c in (row.zeros, row.asked, row.prune) if c is not None]
    if not all(_is_count(c, row.numel) for c in counts) or not _is_count(row.groups, 1 << 62):
        raise ValueError(f"the counts of {row.name!r} are {counts}")
    a = row.attention
    if a is None:
        return
    sizes = (*a.sections, a.queries, a.keys, a.values, a.outputs)
    whole = _is_count(a.dim, dims) and all(_is_count(s, 1 << 62) for s in sizes) and sum(a.sections) == row.shape[a.dim]
    named_well = all(isinstance(n, str) for n in (a.layer, *a.tensors)) and row.name in a.tensors
    if not whole or not named_well or a.followers:
        raise ValueError(f"{row.name!r} has no such place in a layer of attention: {a}")


def _check_chosen(plan: Plan, row: Row) -> None:
    by_units = isinstance(plan.pattern, Head)
    if row.prune is None or (row.units is None if by_units else row.cut is None and plan.masks is None):
        raise ValueError(f"{row.name!r} is to be pruned, and has no count or no cut")
    if row.spec.dtype not in FORMATS:
        raise ValueError(f"{row.dtype!r} cannot be pruned")
    if why := plan.pattern.why_not(row.spec):
        raise ValueError(f"{row.name!r} cannot carry the pattern {plan.pattern}: {why}")
    if isinstance(plan.pattern, Head):
        _check_heads(plan.pattern, row)
    elif plan.masks is not None:
        bits = plan.masks.get(row.name)
        if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != ((row.numel + 7) // 8,):
            raise ValueError(f"the masks do not hold that of {row.spec}, one bit a weight in uint8")
    cut = row.cut
    if cut is None or by_units:
        return
    most = plan.pattern.grouping(row.spec).most if isinstance(plan.pattern, GroupPattern) else None
    levelled = cut.level is None if most is None else _is_count(cut.level, most)
    low = isinstance(cut.key, int) and not isinstance(cut.key, bool) and -(1 << 63) <= cut.key < 1 << 63
    if not low or not levelled or not _is_count(cut.index, row.numel):
        raise ValueError(f"{cut} is no cut of {row.name!r} under the pattern {plan.pattern}")


def _check_heads(pattern: Head, row: Row) -> None:
    grid, went = pattern.grid(row.spec), row.units or ()
    numbered = all(_is_count(u, grid.units - 1) for u in went) and list(went) == sorted(set(went))
    if not numbered or any(size % grid.units for size in grid.sections):
        raise ValueError(f"{row.name!r} has {grid.units} heads, of which these go: {went}")


def named_criterion(name: str) -> Criterion:
    """The criterion that a plan's name stands for, for those that need no data."""
    if name == "magnitude":
        return magnitude
    if name.startswith("random(") and name.endswith(")"):
        return RandomCriterion(int(name[7:-1]))
    raise PlanMismatch(f"the plan's criterion {name!r} needs its masks, which are not here.")


def gone(plan: Plan, row: Row, parts: Parts, reduce: Reduce = identity) -> Iterator[tuple[Part, Tensor]]:
    """One tensor of a plan in flat pieces, each with the elements that the plan prunes (bool)."""
    spec = row.spec
    if isinstance(plan.pattern, Head):
        grid = plan.pattern.grid(spec)
        yield from pieces_gone(units_of(row, grid), grid, spec, parts, plan.nonfinite)
        return
    if plan.masks is not None:
        whole: Tensor | None = None  # made once, and only for what is no run of the tensor
        for part in chunks_of(spec, parts):
            if isinstance(part.start, int):
                keep = unpack(plan.masks[row.name], part.start, part.tensor.numel())
            else:
                whole = unpack(plan.masks[row.name], 0, spec.numel) if whole is None else whole
                keep = whole[part.start.cpu()]
            yield part, ~keep.to(part.tensor.device)
        return
    source = Source(parts, reduce, named_criterion(plan.criterion), plan.nonfinite)
    assert row.cut is not None
    yield from selector_of(plan.pattern, source).gone(spec, row.cut)


def units_of(row: Row, grid: Slices) -> Tensor:
    """Which of a row's heads go; bool."""
    which = torch.zeros(grid.units, dtype=torch.bool)
    which[list(row.units or ())] = True
    return which


def keep_mask(plan: Plan, part: Part) -> Tensor:
    """The keep-mask of one part, from the plan alone: bool, of the part's shape, ``True`` = keep.

    A part must hold whole groups (N:M) or the whole tensor (blocks, channels).

    Raises:
        PlanMismatch: the plan has no such tensor, or not of this shape and dtype.
    """
    row = next((r for r in plan.chosen if part.spec.name in (r.name, *r.aliases)), None)
    if row is None or row.shape != part.spec.shape or row.spec.dtype != part.spec.dtype:
        raise PlanMismatch(f"the plan does not prune {part.spec}.")
    if isinstance(plan.pattern, Block | Channel) and not part.whole:
        raise PlanMismatch(f"a mask of {plan.pattern} units needs the whole tensor, not a piece of {part.spec}.")

    def one(spec: Spec, align: Align) -> list[Part]:
        return [Part(row.spec, part.tensor, part.start)]

    pieces = [g for _, g in gone(plan, row, one)]
    return ~torch.cat(pieces).view(part.tensor.shape)
