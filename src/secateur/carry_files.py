"""The verbs on files: a plan is made and carried out by whoever there is to do it, and the result renamed when it is whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.carry import Globs, make_plan, refuse_other
from secateur.carry_ranks import written_by_ranks
from secateur.carry_stage import Carried, fill, kept_if_begun, manifest, place_of, refuse_changed, written_down
from secateur.core.criteria import is_named
from secateur.core.heads import Head
from secateur.core.plan import Plan
from secateur.core.request import Request
from secateur.engines.on_ray import together_on_ray
from secateur.engines.ranks import Ranks
from secateur.engines.sums import Add, together
from secateur.engines.torchrun import Workers
from secateur.errors import NotDefined, PlanMismatch, SecateurWarning
from secateur.files import Files
from secateur.report.report import Report, ReportRow
from secateur.stores.base import Store, globs
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.planfile import load_plan, save_plan
from secateur.stores.rewrite import Counted, read_back, rewrite
from secateur.stores.stage import begun, left_by_another
from secateur.stores.staging import staged


def prune_files(
    store: Store, request: Request, include: Globs, ignore: Globs, out: Any, overwrite: bool, files: Files | None
) -> Report:
    """Prunes files to ``out``; see `secateur.prune`."""
    assert isinstance(store, CheckpointStore)
    asked = {
        **request.asked(), "include": globs(include), "ignore": globs(ignore), "roles": dict(store.roles or {}),
        "ends": list(store.ends),
    }  # fmt: skip
    how = files or Files()
    return _carry_out(store, Path(out), asked, lambda: plan_files(store, request, include, ignore, how), overwrite, how)


def apply_files(made: Plan, store: Store, out: Any, overwrite: bool, files: Files | None) -> Report:
    """Carries a plan out on files; see `secateur.apply`."""
    assert isinstance(store, CheckpointStore)

    def checked() -> Plan:
        _refuse_other_files(made, store)
        refuse_other(made, store)
        return made

    return _carry_out(store, Path(out), {"plan": made.digest()}, checked, overwrite, files or Files())


def _refuse_other_files(made: Plan, store: CheckpointStore) -> None:
    """Refuses files of the same names that are not those the plan was made of; others may be another cut of the same tensors."""
    found = identified(store)
    if made.source is None or set(made.source) != set(found):
        return
    for file, told in made.source.items():
        if list(told) != found[file]:
            raise PlanMismatch(
                f"{file} is not the file that the plan was made of: it has {found[file][0]} bytes and a header with the sha256 "
                f"{str(found[file][1])[:16]}…, and the plan says {told[0]} and {str(told[1])[:16]}…. Make a new plan."
            )


def identified(store: CheckpointStore) -> dict[str, list[int | str]]:
    """What tells a store's files from others wherever they lie: bytes, and the hash of the header."""
    return {file: [size, header] for file, (size, _, header) in store.stamp().items()}


def plan_files(store: Store, request: Request, include: Globs, ignore: Globs, files: Files | None) -> Plan:
    """The plan of a request over files, by whoever there is to count; see `secateur.plan`.

    Raises:
        NotDefined: a criterion that is a function of the user's, which other workers may not have.
    """
    assert isinstance(store, CheckpointStore)
    made = _planned(store, request, include, ignore, files or Files())
    return replace(made, source=identified(store))


def _planned(store: CheckpointStore, request: Request, include: Globs, ignore: Globs, how: Files) -> Plan:
    if how.engine == "serial" or (how.engine in ("processes", "ray") and how.workers == 1):
        return make_plan(store, request, include, ignore, stacklevel=7)
    if not is_named(request.criterion) or callable(request.allocation):
        raise NotDefined("criteria and allocations that are functions run in one worker: leave engine= out.")
    if how.engine == "torch":
        Workers()  # refuses where there are none
        ranks = Ranks()
        share = ranks.rank, ranks.size
        own = CheckpointStore(
            store.path, roles=store.roles, memory=store.memory, share=share, sum=ranks.sum, ends=store.ends
        )
        with ranks.together():
            return make_plan(own, request, include, ignore, stacklevel=7)
    there = partial(planned_there, store.path, store.roles, store.memory, store.ends, request, include, ignore)
    run = together if how.engine == "processes" else together_on_ray
    made, noted = run(there, how.workers)
    for text in noted:
        warnings.warn(text, SecateurWarning, stacklevel=6)
    return made


def planned_there(
    path: Path, roles: Mapping[str, str] | None, memory: int, ends: tuple[str | None, str | None], request: Request,
    include: Globs, ignore: Globs, worker: int, workers: int, add: Add,
) -> tuple[Plan, tuple[str, ...]]:  # fmt: skip
    """The plan, made by one of several workers, each of which counts in its own files."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        store = CheckpointStore(path, roles=roles, memory=memory, share=(worker, workers), sum=add, ends=ends)
        made = make_plan(store, request, include, ignore)
    return made, made.warnings


def _carry_out(
    store: CheckpointStore, out: Path, asked: Mapping[str, Any], make: Callable[[], Plan], overwrite: bool, how: Files
) -> Report:
    """Makes a plan, or takes the one an interrupted run made, and writes the result.

    Args:
        store: the source.
        out: where the result goes.
        asked: what decides the plan, for ``how.resume``.
        make: makes the plan.
        overwrite: whether something may be there already.
        how: by whom, and from where on.

    Raises:
        OutputExists, BadInput, SecateurError: see `secateur.stores.staging.staged` and `secateur.stores.rewrite`.
    """
    if how.engine == "torch":
        made, counted = written_by_ranks(store, out, asked, make, overwrite, how)
    else:
        target, replaced = place_of(store, out, overwrite, how), overwrite or how.in_place
        if store.path.is_dir():
            made, counted = _folder(store, target, asked, make, replaced, how)
        else:
            made, counted = _one_file(store, target, make, replaced, how)
    return Report(report_rows(store, made, counted), made.asked(), made.warnings, str(out))


def _one_file(store: CheckpointStore, target: Path, make: Callable[[], Plan], overwrite: bool, how: Files) -> Carried:
    before, made = store.stamp(), make()
    (file,) = store.files
    how.progress(0, 1, file)
    with staged(target, overwrite, store.nbytes) as path:
        done = rewrite(store, made, file, path)
        read_back(store, done, path)
        refuse_changed(store, before)
    how.progress(1, 1, file)
    return made, done.counted


def _folder(
    store: CheckpointStore,
    target: Path,
    asked: Mapping[str, Any],
    make: Callable[[], Plan],
    overwrite: bool,
    how: Files,
) -> Carried:
    before = store.stamp()
    whole = {"asked": dict(asked), "source": before}
    stage = left_by_another(target, whole) if how.resume else None
    made = make() if stage is None else None
    stage = stage or begun(target, whole, store.nbytes)
    with kept_if_begun(stage):
        if made is None:
            made = load_plan(stage.plan) if stage.plan.is_file() else make()
        if not stage.plan.is_file():
            save_plan(made, stage.plan)
        if stage.placed:  # an interrupted run left only this to do
            stage.remove()
        else:
            fill(store, made, stage, how)
            refuse_changed(store, before)
            stage.commit(manifest(store, made, stage.done, stage.result), overwrite)
        return made, written_down(stage.done)


def report_rows(store: CheckpointStore, made: Plan, counted: Mapping[str, Counted]) -> tuple[ReportRow, ...]:
    """The rows of a report: what was counted in each tensor."""
    specs = {s.name: s for s in store.specs()}
    canonical = {n: s.name for s in specs.values() for n in (s.name, *s.aliases)}
    leaders = {canonical[m.name]: r.name for r in made.chosen for m in r.followers}
    units = "heads" if isinstance(made.pattern, Head) else "channels"
    rows = []
    for r in made.rows:
        if r.name not in specs:  # left as it is, in the model that the plan was made of, and not in this one
            continue
        spec, c = specs[r.name], counted.get(r.name)
        row = ReportRow(
            spec.name, spec.shape, str(spec.dtype).removeprefix("torch."), spec.role, spec.numel, aliases=spec.aliases,
            skip=r.skip, asked=r.asked if r.skip is None else None, units=r.units,
        )  # fmt: skip
        if c is not None:
            row = replace(row, zeros=c.zeros, threshold=c.threshold, nonfinite=c.nonfinite)
        leader = leaders.get(r.name)
        rows.append(row if leader is None else replace(row, skip=f"goes with its layer's {units}", goes_with=leader))
    return tuple(rows)
