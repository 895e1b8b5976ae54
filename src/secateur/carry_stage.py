"""Filling the stage of a result: each file is written on its own, read back, and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from secateur.core.plan import Plan
from secateur.engines.spread import spread
from secateur.errors import SecateurError
from secateur.files import Files
from secateur.stores import disk
from secateur.stores.checkpoint import CheckpointStore
from secateur.stores.planfile import load_plan
from secateur.stores.rewrite import Counted, Done, read_back, rewrite
from secateur.stores.safetensors_file import carry_over
from secateur.stores.stage import MANIFEST, Stage, is_placed

Carried = tuple[Plan, Mapping[str, Counted]]
"""A plan, and what was counted in each tensor while it was carried out."""


@dataclass(frozen=True)
class Job:
    """A file that somebody is to write: what of, by which plan, where to."""

    source: Path
    roles: Mapping[str, str] | None
    memory: int
    plan: Path
    file: str
    target: Path


@contextmanager
def kept_if_begun(stage: Stage) -> Iterator[None]:
    """On an error a stage goes, unless a file of it is done: then it stays, to be gone on with."""
    try:
        yield
    except BaseException as e:
        if not stage.done:
            with suppress(OSError):  # of a disk that fails at everything; the first error is the one to tell
                stage.remove()
        elif isinstance(e, Exception):
            e.add_note(f"{len(stage.done)} files are done; go on with them by resume (--resume).")
        raise
    finally:
        stage.close()


def fill(store: CheckpointStore, made: Plan, stage: Stage, how: Files) -> None:
    """Writes what is not there yet."""
    total, left = len(store.files), missing(store, stage)
    how.progress(len(stage.done), total, left[0] if left else "")
    if how.engine == "serial" or how.engine == "torch":
        written = _rewritten(store, made, stage.result, left)
    else:
        jobs = [Job(store.path, store.roles, store.memory, stage.plan, f, stage.result / f) for f in left]
        written = spread(rewritten_there, [jobs], how.engine, how.workers)
    with one_thread():
        for done in written:
            stage.record(done)
            how.progress(len(stage.done), total, done.file)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch takes one thread inside: files are read, hashed, written and read back in threads of their own, and torch's would
    spin beside them while they wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def missing(store: CheckpointStore, stage: Stage) -> list[str]:
    """The files that are still to be written, once there is a folder for them with what is not weights in it."""
    files = list(store.files)
    stage.carry(lambda folder: carry_over(store.path, folder, set(files), left_out=[*files, MANIFEST]))
    return [f for f in files if not _is_there(store, stage, f)]


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


def rewritten_there(job: Job) -> Done:
    """Writes one file, in a worker."""
    made, store = _known(job.source, tuple((job.roles or {}).items()), job.memory, job.plan)
    disk.remove(job.target)  # of a worker that was killed at it
    return rewritten(store, made, job.file, job.target)


def rewritten(store: CheckpointStore, made: Plan, file: str, target: Path) -> Done:
    """Writes one file and reads it back."""
    with one_thread():
        done = rewrite(store, made, file, target)
        read_back(store, done, target)
    return done


@lru_cache(maxsize=1)
def _known(source: Path, roles: tuple[tuple[str, str], ...], memory: int, plan: Path) -> tuple[Plan, CheckpointStore]:
    return load_plan(plan), CheckpointStore(source, roles=dict(roles), memory=memory)


def written_down(done: Mapping[str, Done]) -> dict[str, Counted]:
    """What was counted in all files."""
    return {n: c for d in done.values() for n, c in d.counted.items()}


def place_of(store: CheckpointStore, out: Path, overwrite: bool, how: Files) -> Path:
    """The place of a result, refused where none can be put; one that an interrupted run put there may be gone on with."""
    placed = how.resume and store.path.is_dir() and is_placed(Path.cwd() / out)
    return store.refuse_out(out, overwrite or placed, how.in_place)


def refuse_changed(store: CheckpointStore, before: Mapping[str, Any]) -> None:
    """Raises `SecateurError` where a store's files are not as they were stamped."""
    if store.stamp() != before:
        raise SecateurError(f"{store.path} changed while it was pruned; run it again.")


def manifest(store: CheckpointStore, made: Plan, done: Mapping[str, Done], result: Path) -> dict[str, Any]:
    """What is in a result, for `verify`: the same for the same result, whoever made it and when."""
    counted = written_down(done)
    ours = {result / f for f in (*done, MANIFEST)}
    others = [p for p in result.rglob("*") if p.is_file() and p not in ours]
    return {
        "secateur_manifest": 1,
        "asked": {**made.asked(), "nonfinite": made.nonfinite},
        "pruned": {r.name: {"zeros": r.prune, "of": r.numel} for r in made.chosen},
        "zeros": {n: counted[n].zeros for n in sorted(counted)},
        "files": {f: {"bytes": done[f].nbytes, "sha256": done[f].sha256} for f in sorted(done)},
        "carried": {str(p.relative_to(result)): disk.sha256(p) for p in sorted(others)},
    }  # fmt: skip
