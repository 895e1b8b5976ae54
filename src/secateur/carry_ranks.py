"""Carrying a plan out by the ranks of a program under ``torchrun``: each writes its own files of the one result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from secateur.carry_stage import (
    Carried,
    kept_if_begun,
    manifest,
    missing,
    place_of,
    refuse_changed,
    rewritten,
    written_down,
)
from secateur.core.plan import Plan
from secateur.engines.torchrun import Workers
from secateur.errors import NotDefined
from secateur.files import Files
from secateur.stores.checkpoint import CheckpointStore, shared_out
from secateur.stores.planfile import load_plan, save_plan
from secateur.stores.rewrite import Done
from secateur.stores.stage import Stage, begun, left_by_another


def written_by_ranks(
    store: CheckpointStore, out: Path, asked: Mapping[str, Any], make: Callable[[], Plan], overwrite: bool, how: Files
) -> Carried:
    """Makes a plan together and writes the result; rank 0 keeps the stage, and puts the result in its place.

    Raises:
        NotDefined: a single file, which one rank would write alone.
    """
    if not store.path.is_dir():
        raise NotDefined(
            "ranks share the files of a folder; a single file is written by one worker: leave engine= out."
        )
    ranks = Workers()
    target = ranks.first(lambda: place_of(store, out, overwrite, how))
    before = ranks.first(store.stamp)
    whole = {"asked": dict(asked), "source": before}
    stage: Stage | None = None

    def found() -> Path | None:
        """The plan that an interrupted run made."""
        nonlocal stage
        stage = left_by_another(target, whole) if how.resume else None
        return None if stage is None or not stage.plan.is_file() else stage.plan

    old = ranks.first(found)
    made = load_plan(old) if old is not None else make()

    def start() -> tuple[Path, list[str]]:
        """Where the stage is, and which files are still to be written."""
        nonlocal stage
        stage = stage or begun(target, whole, store.nbytes)
        try:
            if not stage.plan.is_file():
                save_plan(made, stage.plan)
            left = [] if stage.placed else missing(store, stage)
            how.progress(len(stage.done), len(store.files), left[0] if left else "")
        except BaseException:
            with kept_if_begun(stage):
                raise
        return stage.path, left

    path, left = ranks.first(start)
    if stage is None:
        return made, _counted(
            _fill(ranks, store, made, Stage(target, path, None), left, how), ranks, None, lambda done: None
        )
    with kept_if_begun(stage):
        held = stage

        def finish(done: dict[str, Done]) -> None:
            if held.placed:  # an interrupted run left only this to do
                held.remove()
                return
            refuse_changed(store, before)
            held.commit(manifest(store, made, done, held.result), overwrite or how.in_place)

        return made, _counted(_fill(ranks, store, made, held, left, how), ranks, held, finish)


def _fill(
    ranks: Workers, store: CheckpointStore, made: Plan, stage: Stage, left: list[str], how: Files
) -> dict[str, Done]:
    """Writes this rank's files of those that are left; returns what all ranks wrote."""
    own = [f for f in shared_out(store.files, ranks.rank, ranks.world) if f in left]

    def work() -> dict[str, Done]:
        written = {}
        for file in own:
            done = rewritten(store, made, file, stage.result / file)
            stage.record(done, ranks.rank)
            written[file] = done
            how.progress(len(written), len(own), file)
        return written

    return {f: d for part in ranks.each(work) for f, d in part.items()}


def _counted(
    written: dict[str, Done], ranks: Workers, stage: Stage | None, finish: Callable[[dict[str, Done]], None]
) -> dict[str, Any]:
    """What was counted in all files, once rank 0 has put the result in its place."""

    def work() -> dict[str, Done]:
        assert stage is not None
        done = {**stage.done, **written}
        finish(done)
        return done

    return written_down(ranks.first(work))
