"""A folder that is being made of another, file by file, beside its place: written down as it grows, gone on with after a kill.

Beside the folder to be lie what was asked, the plan, and a journal with a line for each file that is written, read back and on
disk. Whoever makes it holds a lock on the journal, which ends with the process. The folder is renamed once, when it is whole,
with a manifest of what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import BadInput

from . import disk
from .rewrite import Counted, Done
from .staging import JOURNAL, is_stage, locked, put_in_place, refuse_full, remove_stale, stage_of

RESULT, ASKED, PLAN, WHOLE = "result", "asked.json", "plan.json", "whole.json"
JOURNALS = "journal.*.jsonl"  # one of each worker
MANIFEST = "pruning_manifest.json"


@dataclass
class Stage:
    """A result that is being made.

    Attributes:
        out: where it will be.
        path: the folder beside it.
        lock: an open journal, locked.
        done: the files that are written, by name.
        placed: whether ``out`` is its result already, and only what is left of the stage is to be removed.
    """

    out: Path
    path: Path
    lock: int | None
    done: dict[str, Done] = field(default_factory=dict)
    placed: bool = False

    @property
    def result(self) -> Path:
        """The folder to be."""
        return self.path / RESULT

    @property
    def plan(self) -> Path:
        """Where its plan is, or will be."""
        return self.path / PLAN

    def record(self, done: Done, worker: int = 0) -> None:
        """Writes down that a file is on disk and was read back."""
        disk.append(self.path / f"journal.{worker}.jsonl", json.dumps(asdict(done)) + "\n")
        self.done[done.file] = done

    def forget(self, file: str) -> None:
        """Removes what there is of a file that is not done."""
        self.done.pop(file, None)
        disk.remove(self.result / file)

    def carry(self, copy: Callable[[Path], None]) -> None:
        """Makes the result's folder with what is not weights in it, in one step, unless it is there."""
        if not self.result.is_dir():
            beside = self.path / "carried"
            disk.remove(beside)
            copy(beside)
            disk.rename(beside, self.result)

    def commit(self, manifest: Mapping[str, Any], overwrite: bool) -> None:
        """Puts the folder in its place, with its manifest, and removes the rest.

        Raises:
            OutputExists: something appeared there, and ``overwrite`` is false.
        """
        text = json.dumps(manifest, indent=1) + "\n"
        disk.write_whole(self.path / WHOLE, text)  # by which a result that is in its place is known
        disk.remove(self.result / MANIFEST)
        disk.write_new(self.result / MANIFEST, text)
        for folder in sorted({p for p in self.result.rglob("*") if p.is_dir()}, reverse=True):
            disk.sync_path(folder)
        disk.sync_path(self.result)
        put_in_place(self.result, self.out, overwrite)
        self.remove()

    def close(self) -> None:
        """Lets go of it, so that it can be gone on with."""
        if self.lock is not None:
            os.close(self.lock)

    def remove(self) -> None:
        """Removes what is left of it."""
        disk.remove(self.path)


def begun(out: Path, asked: Mapping[str, Any], need: int) -> Stage:
    """A new stage of a result. Stages that killed runs of this machine left for the same output are removed.

    Args:
        out: the folder to be, whose place was found free.
        asked: what decides the result: the request, and the source.
        need: bytes that will be written.

    Raises:
        BadInput: too little room.
    """
    remove_stale(disk.children(out.parent), out.name)
    refuse_full(out, need)
    stage = Stage(out, stage_of(out), None)
    disk.make_folder(stage.path)
    try:
        stage.lock = locked(stage.path / JOURNAL)
        disk.write_whole(stage.path / ASKED, json.dumps(asked, sort_keys=True))
    except BaseException:
        stage.close()
        with suppress(OSError):
            stage.remove()
        raise
    return stage


def left_by_another(out: Path, asked: Mapping[str, Any]) -> Stage | None:
    """The stage that an interrupted run left for an output, of the same request and source; this process's from now on.

    Raises:
        BadInput: a run is at work on it; or it is of another request, or the source has changed since.
    """
    for path in disk.children(out.parent):
        if not is_stage(path, out.name) or not (path / ASKED).is_file():
            continue  # killed before anything was written
        lock = locked(path / JOURNAL)
        if lock is None:
            raise BadInput(f"another run is making {out} just now: wait for it, or choose another path.")
        stage = Stage(out, path, lock)
        try:
            stage.placed = _is_placed(path, out)
            _refuse_another(stage, asked)
            stage.path = stage_of(out)
            disk.rename(path, stage.path)  # lest somebody take it for one that a killed run left
            stage.done = _journal(stage.path)
        except BaseException:
            stage.close()
            raise
        return stage
    return None


def _refuse_another(stage: Stage, asked: Mapping[str, Any]) -> None:
    found, wanted = json.loads(disk.read_text(stage.path / ASKED)), json.loads(json.dumps(asked))
    if stage.placed:  # in place, the source is another by then
        found, wanted = found["asked"], wanted["asked"]
    if found != wanted:
        raise BadInput(
            f"what an interrupted run left for {stage.out} was made by another request, or the source has changed since. Ask for "
            "the same again, or run it without resume, which begins anew."
        )


def is_placed(out: Path) -> bool:
    """Whether an interrupted run left a stage whose result is in its place already."""
    return any(is_stage(p, out.name) and _is_placed(p, out) for p in disk.children(out.parent))


def _is_placed(path: Path, out: Path) -> bool:
    """A stage says what manifest its result has before it is put in its place."""
    whole, there = path / WHOLE, out / MANIFEST
    return whole.is_file() and there.is_file() and disk.read_bytes(whole) == disk.read_bytes(there)


def _journal(path: Path) -> dict[str, Done]:
    """The files that are on disk; a line that was cut short counts for nothing."""
    found = {}
    for journal in (p for p in disk.children(path) if p.match(JOURNALS)):
        text = disk.read_text(journal)
        if text and not text.endswith("\n"):
            disk.append(journal, "\n")
        for line in text.splitlines():
            try:
                d = json.loads(line)
                counted = {n: Counted(*c) for n, c in d["counted"].items()}
                found[d["file"]] = Done(d["file"], d["nbytes"], d["sha256"], d["crc32"], counted)
            except (ValueError, TypeError, KeyError):
                continue
    return found
