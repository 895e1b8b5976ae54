"""Carrying a plan out on files: each is rewritten on its own, by whoever there is to do it, and the result renamed when it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import secateur
from secateur.core.heads import Head
from secateur.core.plan import Plan
from secateur.errors import SecateurError, Stopped
from secateur.report.report import Report, ReportRow
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.planfile import load_plan, save_plan
from secateur.stores.rewrite import Counted, Done, read_back, rewrite
from secateur.stores.safetensors_file import carry_over
from secateur.stores.stage import MANIFEST, Stage, begun, left_by_another
from secateur.stores.staging import staged

Told = Callable[[int, int, str], None]
"""Told how many files are done, of how many, and which was."""


@dataclass(frozen=True)
class Way:
    """How files are carried out.

    Attributes:
        overwrite: whether something may be at the output already.
        resume: whether to go on with what an interrupted run left.
        stop: asked after each file whether to stop there, with what is done kept.
        told: told of each file.
    """

    overwrite: bool = False
    resume: bool = False
    stop: Callable[[], bool] = lambda: False
    told: Told = lambda done, total, file: None


def carry_out_files(
    store: CheckpointStore, out: Path, asked: Mapping[str, Any], make: Callable[[], Plan], way: Way
) -> tuple[Plan, Mapping[str, Counted]]:
    """Makes a plan, or takes the one an interrupted run made, and writes the result.

    Args:
        store: the source.
        out: where the result goes.
        asked: what decides the plan, for `way.resume`.
        make: makes the plan.
        way: how.

    Returns:
        The plan, and what was counted in each tensor while it was written.

    Raises:
        Stopped: `way.stop` said so; what is done is kept.
        OutputExists, BadInput, SecateurError: see `secateur.stores.staging.staged` and `secateur.stores.rewrite`.
    """
    target, before = store.refuse_out(out, way.overwrite), store.stamp()
    if not store.path.is_dir():
        made = make()
        with staged(target, way.overwrite, store.nbytes) as path:
            (file,) = store.files
            done = rewrite(store, made, file, path)
            read_back(store, done, path)
            _refuse_changed(store, before)
        return made, done.counted
    whole = {"asked": dict(asked), "source": before}
    found = left_by_another(target, whole) if way.resume else None
    made = load_plan(found.plan) if found is not None and found.plan.is_file() else make()
    stage = found or begun(target, whole, store.nbytes)
    with kept_if_begun(stage):
        if not stage.plan.is_file():
            save_plan(made, stage.plan)
        _fill(store, made, stage, way)
        _refuse_changed(store, before)
        counted = {n: c for done in stage.done.values() for n, c in done.counted.items()}
        stage.commit(manifest(store, made, stage.done, stage.result), way.overwrite)
    return made, counted


@contextmanager
def kept_if_begun(stage: Stage) -> Iterator[None]:
    """On an error a stage goes, unless a file of it is done: then it stays, to be gone on with."""
    try:
        yield
    except BaseException as e:
        if not stage.done:
            stage.remove()
        elif not isinstance(e, Stopped):
            e.add_note(f"{len(stage.done)} files are done; go on with them by resume (--resume).")
        raise
    finally:
        stage.close()


def _fill(store: CheckpointStore, made: Plan, stage: Stage, way: Way) -> None:
    """Writes what is not there yet."""
    files = list(store.files)
    stage.carry(lambda folder: carry_over(store.path, folder, set(files), left_out=[*files, MANIFEST]))
    left = [f for f in files if not _is_there(store, stage, f)]
    total = len(files)
    for done in _rewritten(store, made, stage.result, left):
        stage.record(done)
        way.told(len(stage.done), total, done.file)
        if way.stop() and len(stage.done) < total:
            raise Stopped(f"stopped after {len(stage.done)} of {total} files, which are kept: go on with --resume.")


def _is_there(store: CheckpointStore, stage: Stage, file: str) -> bool:
    """Whether a file that an interrupted run wrote is still as it was; what else is at its place goes."""
    path = stage.result / file
    if file in stage.done and path.is_file():
        try:
            read_back(store, stage.done[file], path)
            return True
        except SecateurError:
            pass
    stage.forget(file)
    return False


def _rewritten(store: CheckpointStore, made: Plan, result: Path, files: Sequence[str]) -> Iterator[Done]:
    """Each file, written and read back: one is read back while the next is written."""
    with ThreadPoolExecutor(1) as other:
        waiting: Future[None] | None = None
        last: Done | None = None
        for file in files:
            done = rewrite(store, made, file, result / file)
            if waiting is not None and last is not None:
                waiting.result()
                yield last
            waiting, last = other.submit(read_back, store, done, result / file), done
        if waiting is not None and last is not None:
            waiting.result()
            yield last


def _refuse_changed(store: CheckpointStore, before: Mapping[str, Any]) -> None:
    if store.stamp() != before:
        raise SecateurError(f"{store.path} changed while it was pruned; run it again.")


def manifest(store: CheckpointStore, made: Plan, done: Mapping[str, Done], result: Path) -> dict[str, Any]:
    """What is in a result, for `verify`: the same for the same result, whoever made it and when."""
    counted = {n: c.zeros for d in done.values() for n, c in d.counted.items()}
    others = [p for p in result.rglob("*") if p.is_file() and p.name not in done]
    return {
        "secateur_manifest": 1,
        "secateur": secateur.__version__,
        "asked": {**made.asked(), "nonfinite": made.nonfinite},
        "pruned": {r.name: {"zeros": r.prune, "of": r.numel} for r in made.chosen},
        "zeros": {n: counted[n] for n in sorted(counted)},
        "files": {f: {"bytes": done[f].nbytes, "sha256": done[f].sha256} for f in sorted(done)},
        "carried": {str(p.relative_to(result)): _sha256(p) for p in sorted(others)},
    }  # fmt: skip


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report_rows(store: CheckpointStore, made: Plan, counted: Mapping[str, Counted]) -> tuple[ReportRow, ...]:
    """The rows of a report: what was counted in each tensor."""
    specs = {s.name: s for s in store.specs()}
    canonical = {n: s.name for s in specs.values() for n in (s.name, *s.aliases)}
    leaders = {canonical[m.name]: r.name for r in made.chosen for m in r.followers}
    units = "heads" if isinstance(made.pattern, Head) else "channels"
    rows = []
    for r in made.rows:
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


def report_of(store: CheckpointStore, made: Plan, counted: Mapping[str, Counted], out: Path) -> Report:
    """The report of a result."""
    return Report(report_rows(store, made, counted), made.asked(), made.warnings, str(out))
