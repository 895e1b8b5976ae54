"""A folder that is being made of another, file by file, beside its place: written down as it grows, gone on with after a kill.

Beside the folder to be lie what was asked, the plan, and a journal with a line for each file that is written, read back and on
disk. Whoever makes it holds a lock on the journal, which ends with the process. The folder is renamed once, when it is whole,
with a manifest of what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.errors import BadInput

from . import disk
from .rewrite import Counted, Done
from .staging import JOURNAL, home_of, locked, put_in_place, refuse_full, remove_stale, stage_of

RESULT, ASKED, PLAN = "result", "asked.json", "plan.json"
JOURNALS = "journal.*.jsonl"  # one of each worker
MANIFEST = "pruning_manifest.json"


@dataclass
class Stage:
    """A result that is being made.

    Attributes:
        out: where it will be.
        path: the folder beside it.
        done: the files that are written, by name.
    """

    out: Path
    path: Path
    lock: int
    done: dict[str, Done] = field(default_factory=dict)

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
        disk.remove(self.result / MANIFEST)  # of a run that was killed just before it renamed
        disk.write_new(self.result / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for folder in sorted({p for p in self.result.rglob("*") if p.is_dir()}, reverse=True):
            disk.sync_path(folder)
        disk.sync_path(self.result)
        put_in_place(self.result, self.out, overwrite)
        self.remove()

    def close(self) -> None:
        """Lets go of it, so that it can be gone on with."""
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
    remove_stale(out.parent.iterdir(), out.name)
    refuse_full(out, need)
    path = stage_of(out)
    lock = None
    try:
        disk.make_folder(path)
        lock = locked(path / JOURNAL)
        assert lock is not None
        disk.write_new(path / ASKED, json.dumps(asked, sort_keys=True))
    except BaseException:
        if lock is not None:
            os.close(lock)
        disk.remove(path)
        raise
    return Stage(out, path, lock)


def left_by_another(out: Path, asked: Mapping[str, Any]) -> Stage | None:
    """The stage that an interrupted run left for an output, of the same request and source.

    Raises:
        BadInput: a run is at work on it; or it is of another request, or the source has changed since.
    """
    for path in sorted(p for p in out.parent.iterdir() if home_of(p, out.name)):
        if not (path / ASKED).is_file():
            continue  # killed before anything was written
        lock = locked(path / JOURNAL)
        if lock is None:
            raise BadInput(f"another run is making {out} just now: wait for it, or choose another path.")
        if disk.read_text(path / ASKED) != json.dumps(asked, sort_keys=True):
            os.close(lock)
            raise BadInput(
                f"what an interrupted run left for {out} was made by another request, or the source has changed since. Ask for "
                "the same again, or run it without resume, which begins anew."
            )
        return Stage(out, path, lock, _journal(path))
    return None


def _journal(path: Path) -> dict[str, Done]:
    """The files that are on disk; a line that was cut short counts for nothing."""
    found = {}
    for journal in sorted(path.glob(JOURNALS)):
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
