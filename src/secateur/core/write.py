"""Carrying a plan out on one tensor: zeros written in place, counted while writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from secateur.errors import PlanMismatch

from . import fast
from .bits import zero_
from .choose import Taken, Units, selector_of, settled
from .criteria import magnitude
from .elements import Measured, Meter
from .heads import Head, UnitPattern
from .keys import FORMATS
from .patterns import NM, Channel, Row, Unstructured
from .plan import Plan, gone, named_criterion, units_of
from .plan import Row as PlanRow
from .select import Cut, identity
from .source import Source
from .tiles import Tiles
from .types import Align, Member, Part, Parts, Reduce, Spec
from .units import units_gone

PartsOf = Callable[[str], list[Part]]
"""All parts, whole, of the tensor of a given name."""

Write = Callable[[Part], None]
"""Takes a part back that has been written."""


def count_row(plan: Plan, row: PlanRow, parts: Parts, reduce: Reduce) -> Taken:
    """What a plan's row would do to the tensor as it is now; nothing is written.

    Raises:
        BadTensor: NaN or infinite weights where the plan was made without them.
    """
    spec = row.spec
    if plan.masks is None and row.cut is not None:
        source = Source(parts, reduce, named_criterion(plan.criterion), plan.nonfinite)
        selector = selector_of(plan.pattern, source)
        if isinstance(plan.pattern, Unstructured):
            return settled(selector, source, spec, row.cut)
    if isinstance(plan.pattern, Head):
        Source(parts, reduce, magnitude, plan.nonfinite).facts(spec)  # refuses NaN and Inf
    meter, before = Meter(spec.dtype), Meter(spec.dtype)
    for part, which in gone(plan, row, parts, reduce):
        meter.add(part.tensor, which)
        before.add(part.tensor, torch.zeros_like(which))
    m = meter.total(reduce)
    return Taken(row.cut, m.zeros, before.total(reduce).zeros, m.threshold)  # type: ignore[arg-type]


def write_rows(plan: Plan, parts: Parts, reduce: Reduce, part_of: PartsOf, write: Write) -> dict[str, Measured]:
    """Zeros in place what a plan prunes, and what follows it; counts while writing. Measures by name."""
    done = _together(plan, parts, reduce)
    for row in plan.chosen:
        if row.name not in done:
            done[row.name] = _write_row(plan, row, parts, reduce, part_of, write)
    return done


def _together(plan: Plan, parts: Parts, reduce: Reduce) -> dict[str, Measured]:
    """Single weights by magnitude of tensors that are in memory anyway, in one go."""
    if reduce is not identity or not _simple(plan) or isinstance(plan.pattern, NM | Row):
        return {}
    whole = []
    for row in plan.chosen:
        whole += [(row, p) for p in parts(row.spec, "resident") if p.whole and fast.memory(p) is not None]
    if not whole:
        return {}
    counted = fast.fill_each([p for _, p in whole], [row.cut for row, _ in whole if row.cut is not None])
    if counted is None:
        return {}
    for _, p in whole:
        torch.autograd.graph.increment_version(p.tensor)
    return {row.name: Measured(*c) for (row, _), c in zip(whole, counted, strict=True)}


def _simple(plan: Plan) -> bool:
    """Whether the native routines know the plan's keys."""
    by_magnitude = plan.masks is None and plan.criterion == "magnitude" and plan.nonfinite != "prune"
    return by_magnitude and not isinstance(plan.pattern, UnitPattern)


def _write_row(plan: Plan, row: PlanRow, parts: Parts, reduce: Reduce, part_of: PartsOf, write: Write) -> Measured:
    held = list(parts(row.spec, "resident"))
    measured = _fast(plan, row, held) if reduce is identity else None
    if measured is None:
        for member in row.followers:
            _follow(plan, row, member, parts, reduce, part_of(member.name), write)
    if not held and reduce is identity:  # a store that reads its tensors
        meter = Meter(row.spec.dtype)
        for part in streamed(plan, row, parts, meter):
            write(part)
        return meter.total(reduce)
    measured = measured or _piecewise(plan, row, held, reduce)
    for part in held:
        write(part)
    return measured


def streamed(plan: Plan, row: PlanRow, parts: Parts, meter: Meter) -> Iterator[Part]:
    """A tensor that this worker holds alone, in pieces and in order, with zeros written in; counted while writing."""
    if _simple(plan) and not isinstance(plan.pattern, Row) and row.cut is not None:
        run = plan.pattern.grouping(row.spec).run if isinstance(plan.pattern, NM) else 1
        for part in parts(row.spec, run if run > 1 else "chunk"):
            found = _filled(plan, row.cut, replace(part, spec=row.spec))
            if found is None:  # of the first part, since it depends on the tensor alone
                break
            meter.count(*found)
            yield part
        else:
            return
    for part, which in gone(plan, row, parts):
        meter.add(part.tensor, which)
        zero_(part.tensor, which)
        yield part


def _filled(plan: Plan, cut: Cut, part: Part) -> tuple[int, int | None] | None:
    """Elements and full N:M by magnitude, in contiguous memory: (zeros, smallest key that survives)."""
    if not isinstance(plan.pattern, NM):
        return fast.fill(part, cut)
    if cut.level != plan.pattern.of - plan.pattern.keep:
        return None
    found = fast.groups(part, plan.pattern, write=True)
    return (found[0], found[2]) if found else None


def _piecewise(plan: Plan, row: PlanRow, whole: list[Part], reduce: Reduce) -> Measured:
    """The torch routine, for every pattern, dtype and layout."""
    meter = Meter(row.spec.dtype)
    if all(p.tensor.is_contiguous() for p in whole):
        for part, which in gone(plan, row, lambda s, a: whole, reduce):
            meter.add(part.tensor, which)
            zero_(part.tensor, which)
    else:  # flat pieces of a strided tensor are copies, so decide first and write the tensor itself
        for part in whole:
            pieces = list(gone(plan, row, partial(_only, part), reduce))
            for piece, which in pieces:
                meter.add(piece.tensor, which)
            zero_(part.tensor, torch.cat([w for _, w in pieces]).view(part.tensor.shape))
    return meter.total(reduce)


def _only(part: Part, spec: Spec, align: Align) -> list[Part]:
    return [part]


def _fast(plan: Plan, row: PlanRow, found: list[Part]) -> Measured | None:
    """Elements and full N:M by magnitude, of a tensor in contiguous memory."""
    if len(found) != 1 or not found[0].whole or row.cut is None or not _simple(plan) or isinstance(plan.pattern, Row):
        return None
    filled = _filled(plan, row.cut, replace(found[0], spec=row.spec))
    if filled is None:
        return None
    torch.autograd.graph.increment_version(found[0].tensor)
    meter = Meter(row.spec.dtype)
    meter.count(*filled)
    return meter.total(identity)


def _follow(
    plan: Plan, row: PlanRow, member: Member, parts: Parts, reduce: Reduce, targets: list[Part], write: Write
) -> None:
    """Zeros the slices of a follower whose units go."""
    which = units_going(plan, row, parts, reduce)
    for part in targets:
        follow(which, member, part)
        write(part)


def follow(which: Tensor, member: Member, part: Part) -> None:
    """Zeros, in a part of a tensor that goes with a row's channels or heads, what belongs to those that go.

    Raises:
        PlanMismatch: it does not have one element for each.
    """
    if part.spec.dtype not in FORMATS or part.spec.numel != member.numel(len(which)):
        raise PlanMismatch(
            f"{part.spec} does not have one element for each of the {len(which)} channels or heads it goes with."
        )
    zero_(part.tensor, which[member.units(len(which))].to(part.tensor.device)[part.index()])


def units_going(plan: Plan, row: PlanRow, parts: Parts, reduce: Reduce = identity) -> Tensor:
    """Which of a row's channels or heads go; bool."""
    pattern = plan.pattern
    assert isinstance(pattern, Channel | Head)
    if isinstance(pattern, Head):
        return units_of(row, pattern.grid(row.spec))
    grid = pattern.grid(row.spec)
    if plan.masks is None and row.cut is not None:
        source = Source(parts, reduce, named_criterion(plan.criterion), plan.nonfinite)
        return units_gone(Units(source, pattern).table(row.spec), row.cut)
    live, tiles = torch.zeros(grid.units, dtype=torch.int64), Tiles(grid)
    for part, out in gone(plan, row, parts, reduce):
        tiles.add(live, part, (~out).cpu())
    return reduce(live) == 0
