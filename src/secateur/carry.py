"""What the verbs share: finding the store, making a plan over it, carrying it out, counting what is there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor, nn

from secateur.core.bits import pack
from secateur.core.elements import Measured, Meter, chunks_of, survey
from secateur.core.fast import settle
from secateur.core.heads import Head
from secateur.core.keys import FORMATS
from secateur.core.make import make
from secateur.core.patterns import Channel, Unstructured
from secateur.core.plan import Plan, Row, gone, row_of
from secateur.core.profile import KEPT
from secateur.core.request import Request
from secateur.core.select import Cut, identity
from secateur.core.tiles import Tiles
from secateur.core.types import Part, Spec
from secateur.core.write import count_row, write_rows
from secateur.errors import BadInput, OutputExists, PlanMismatch, SecateurError, SecateurWarning
from secateur.evaluate.norms import firing_norms
from secateur.files import Files
from secateur.report.report import Report, ReportRow
from secateur.stores.base import Store, choose, matches
from secateur.stores.dtensor import ShardedStore, live
from secateur.stores.followers import check_followers
from secateur.stores.memory import MemoryStore
from secateur.stores.shards import is_sharded

Globs = str | Sequence[str] | None
Path = str | PathLike[str]
Target = nn.Module | Mapping[str, Tensor] | Tensor | Path


def store_of(target: Target, roles: Mapping[str, str] | None, files: Files | None = None) -> Store:
    """The store of a target."""
    if isinstance(target, str | PathLike):
        from secateur.stores.checkpoint import CheckpointStore

        how = files or Files()
        return CheckpointStore(target, roles=roles, memory=how.nbytes, ends=(how.first, how.last))
    if files is not None:
        raise BadInput(f"files= says how a path is worked on; a {type(target).__name__} is in memory.")
    return live(target, roles)


@contextmanager
def opened(target: Target, roles: Mapping[str, str] | None, files: Files | None = None) -> Iterator[Store]:
    """The store of a target, without gradients. Of a target that is cut over processes, an error of one reaches all."""
    with torch.no_grad():
        store = store_of(target, roles, files)
        if isinstance(store, MemoryStore):
            with store.together():
                yield store
        else:
            yield store


def check_out(target: Target, out: Path | None, overwrite: bool, in_place: bool = False) -> None:
    """A path is pruned to another path that is free, everything else in place."""
    is_path = isinstance(target, str | PathLike)
    if is_path and out is None:
        raise BadInput(
            f"{str(target)!r} is a path: say where the result goes with out=; files are not changed in place."
        )
    if out is not None and not is_path:
        raise BadInput(
            f"out= goes with a path; a {type(target).__name__} is pruned in place. Save it afterwards as you always do "
            "(save_pretrained, safetensors.torch.save_model)."
        )
    if out is not None and os.path.lexists(out) and not (overwrite or in_place):
        raise OutputExists(f"{str(out)!r} is already there; choose another path, or say overwrite=True (--overwrite).")


def make_plan(store: Store, request: Request, include: Globs, ignore: Globs, *, stacklevel: int = 3) -> Plan:
    """The plan of a request over a store, with its warnings issued."""
    specs = choose(store.specs(), include, ignore)
    store.check(specs)
    if isinstance(store, ShardedStore):
        store.check_request(request, specs)
    # Of what a worker on files may take, half for counts; the rest is for pieces of tensors.
    made = make(specs, store.parts, request, matches, store.sum, getattr(store, "memory", 2 * KEPT) // 2)
    check_followers(made, store)
    for text in made.warnings:
        warnings.warn(text, SecateurWarning, stacklevel=stacklevel)
    return made


def carry_out(made: Plan, store: Store, target: Target) -> Report:
    """Writes what a plan says, and reports what was counted while writing. Warns before anything is written."""
    noted = (*made.warnings, *_norm_warnings(made, store, target))
    specs = {s.name: s for s in store.specs()}

    def part_of(name: str) -> list[Part]:
        return list(store.parts(specs[name], "whole"))

    measured = write_rows(made, store.parts, store.sum, part_of, store.write)
    for row in made.chosen:
        if measured[row.name].zeros != row.prune:
            raise SecateurError(
                f"wrote {measured[row.name].zeros} zeros to {row.name!r} where the plan says {row.prune}: a bug."
            )
    others = [replace(specs[r.name], skip=r.skip) for r in made.rows if r.name not in measured]
    rest = {r.name: r for r in count_rows(others, store)}
    canonical = {n: s.name for s in specs.values() for n in (s.name, *s.aliases)}
    leaders = {canonical[m.name]: r.name for r in made.chosen for m in r.followers}
    rows = [
        _written(specs[r.name], measured[r.name], r, store, made)
        if r.name in measured
        else _following(rest[r.name], leaders.get(r.name), made)
        for r in made.rows
    ]
    return Report(tuple(rows), made.asked(), noted)


def _norm_warnings(made: Plan, store: Store, target: Target) -> list[str]:
    """What norms make of pruned output channels, issued as warnings too; nothing is written yet. Not of sharded models."""
    channels_go = isinstance(made.pattern, Channel) and made.pattern.side == "out"
    if not isinstance(target, nn.Module) or not channels_go or isinstance(store, ShardedStore):
        return []
    channels: dict[str, Tensor] = {}
    for row in made.chosen:
        which = _channels_gone(made, row, store)
        channels |= {name.rpartition(".")[0]: which for name in (row.name, *row.aliases)}
    texts = firing_norms(target, channels)
    for text in texts:
        warnings.warn(text, SecateurWarning, stacklevel=4)
    return texts


def _channels_gone(made: Plan, row: Row, store: Store) -> Tensor:
    """Which of a tensor's channels a plan leaves without a weight (bool), from the plan alone."""
    assert isinstance(made.pattern, Channel)
    grid = made.pattern.grid(row.spec)
    kept, tiles = torch.zeros(grid.units, dtype=torch.int64), Tiles(grid)
    for part, which in gone(made, row, store.parts, store.sum):
        tiles.add(kept, part, (~which).cpu())
    return store.sum(kept) == 0


def _row(spec: Spec, **more: object) -> ReportRow:
    dtype = str(spec.dtype).removeprefix("torch.")
    return ReportRow(spec.name, spec.shape, dtype, spec.role, spec.numel, aliases=spec.aliases, **more)  # type: ignore[arg-type]


def _following(row: ReportRow, leader: str | None, made: Plan) -> ReportRow:
    """The row of a tensor that is not chosen: left alone, or gone along with the channels or heads of another."""
    units = "heads" if isinstance(made.pattern, Head) else "channels"
    return row if leader is None else replace(row, skip=f"goes with its layer's {units}", goes_with=leader)


def _written(spec: Spec, m: Measured, row: Row, store: Store, made: Plan) -> ReportRow:
    kept = survey(spec, store.parts, store.sum).nonfinite if made.nonfinite == "keep" else 0
    return _row(spec, zeros=m.zeros, threshold=m.threshold, asked=row.asked, nonfinite=kept, units=row.units)


def count_rows(specs: Sequence[Spec], store: Store) -> tuple[ReportRow, ...]:
    """Report rows of tensors as they are; those without values to count have no figures."""
    countable = {s.name for s in store.every()}
    return tuple(_count(s, store) if s.name in countable else _row(s, skip=s.skip) for s in specs)


def _count(spec: Spec, store: Store) -> ReportRow:
    if spec.dtype not in FORMATS:
        return _row(spec, skip=spec.skip)
    found = settle(spec, store.parts, Cut(1, 0)) if store.sum is identity else None
    if found is not None and found.largest < FORMATS[spec.dtype].nonfinite:
        return _row(spec, zeros=found.zeros, threshold=found.threshold, skip=spec.skip)
    facts, meter = survey(spec, store.parts, store.sum), Meter(spec.dtype)
    for part in chunks_of(spec, store.parts):
        meter.add(part.tensor, torch.zeros(part.tensor.shape, dtype=torch.bool, device=part.tensor.device))
    threshold = meter.total(store.sum).threshold
    return _row(spec, zeros=facts.zeros, threshold=threshold, nonfinite=facts.nonfinite, skip=spec.skip)


def plan_of_masks(masks: Mapping[str, Tensor], store: Store) -> Plan:
    """Masks as a plan that carries them.

    Raises:
        PlanMismatch: a name the target does not have, another shape, not bool.
    """
    if isinstance(masks, Mapping) and not masks:
        raise BadInput(
            "apply was given an empty dict of masks: give a bool tensor for at least one tensor, by its name."
        )
    if not isinstance(masks, Mapping):
        raise BadInput(f"apply takes a Plan or a dict of bool masks, got {type(masks).__name__}: {masks!r:.80}")
    specs = store.specs()
    by_name = {n: s for s in specs for n in (s.name, *s.aliases)}
    packed: dict[str, Tensor] = {}
    for name, mask in masks.items():
        spec = by_name.get(name)
        if spec is None:
            raise PlanMismatch(
                f"there is a mask for {name!r}, but the target has no such tensor; it has {_some(by_name)}."
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != spec.shape or mask.is_meta:
            got = (
                f"{tuple(mask.shape)}, {mask.dtype}, {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
            )
            raise PlanMismatch(f"the mask of {spec} must be a bool tensor of its shape, True = keep; got {got}.")
        if spec.name in packed:
            raise PlanMismatch(f"{name!r} is another name of {spec.name!r}, which has a mask already.")
        packed[spec.name] = pack(mask.full_tensor() if is_sharded(mask) else mask)  # type: ignore[attr-defined]
    chosen = [replace(s, skip=None if s.name in packed else s.skip or "has no mask") for s in specs]
    store.check(chosen)
    empty = Plan((), None, None, "masks", "masks", Unstructured(), "keep", (), packed)
    rows = []
    for s in chosen:
        taken = count_row(empty, row_of(s), store.parts, store.sum) if s.skip is None else None
        more = {"zeros": taken.zeros, "prune": taken.pruned, "threshold": taken.threshold} if taken else {}
        rows.append(row_of(s, **more))
    return replace(empty, rows=tuple(rows))


def refuse_other(made: Plan, store: Store) -> None:
    """Refuses a target that is not the one a plan was made for, before anything is touched.

    Raises:
        PlanMismatch: a tensor is missing, has another shape or dtype, or gives another count at the plan's cut.
    """
    specs = {s.name: s for s in store.specs()}
    for row in made.chosen:
        spec = specs.get(row.name)
        if spec is None:
            raise PlanMismatch(
                f"the plan prunes {row.name!r}, but the target has no such tensor; it has {_some(specs)}."
            )
        if spec.shape != row.shape or spec.dtype != row.spec.dtype:
            raise PlanMismatch(f"the plan was made for {row.spec}, but the target has {spec}: make a new plan.")
    chosen = [replace(specs[r.name], skip=None) for r in made.chosen]
    store.check(chosen)
    if isinstance(store, ShardedStore):
        store.agree(made.to_json().encode(), "all processes must carry out the same plan")
        if made.masks is None:
            store.check_pattern(made.pattern, chosen)
    check_followers(made, store)
    for row in made.chosen:
        taken = count_row(made, row, store.parts, store.sum)
        if taken.pruned != row.prune:
            raise PlanMismatch(
                f"at the plan's cut {taken.pruned} weights of {row.spec} would be zero, where the plan says {row.prune}: "
                "its values are not those the plan was made from. Make a new plan."
            )


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")
