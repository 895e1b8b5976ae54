"""Writing a result so that nothing is lost: staged beside its place, synced, and renamed whole."""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.errors import BadInput, OutputExists

from . import disk

JOURNAL = "journal.0.jsonl"
"""In a stage that can be gone on with: what is done. Whoever is at work on it holds a lock on this file."""
_MARGIN = 1 << 20
_STAGE = re.compile(r"\.(.+)\.partial-([0-9a-f]{8})-([1-9]\d{0,9})-[0-9a-f]{8}")
_OLD = re.compile(_STAGE.pattern.replace("partial", "old"))


@contextmanager
def staged(out: Path, overwrite: bool, need: int) -> Iterator[Path]:
    """Yields a path beside ``out`` to build the result at; puts it in place when the block ends without an error.

    Args:
        out: a file or folder to be.
        overwrite: whether something may be there already.
        need: bytes that will be written.

    Stages that killed runs of this machine left for the same output are removed first.

    Raises:
        OutputExists: something is there and ``overwrite`` is false; or it is a folder of something else than a model.
        BadInput: the parent folder does not exist, or has too little room.
    """
    out = refuse_place(out, overwrite)
    remove_stale(disk.children(out.parent), out.name)
    refuse_full(out, need)
    stage = stage_of(out)
    try:
        yield stage
        sync(stage)
        put_in_place(stage, out, overwrite)
    except BaseException:
        with suppress(OSError):  # of a disk that fails at everything; the first error is the one to tell
            disk.remove(stage)
        raise
    disk.remove(stage)


def stage_of(out: Path) -> Path:
    """A path beside a result at which this process may build it; nobody else's."""
    return out.parent / f".{out.name}.partial-{_home()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def refuse_full(out: Path, need: int) -> None:
    """Raises `BadInput` where so many bytes do not fit beside a result."""
    free = shutil.disk_usage(out.parent).free
    if free < need + _MARGIN:
        raise BadInput(f"{out.parent} has {free} bytes free, and the result needs {need}.")


def refuse_result(source: Path, out: Path, overwrite: bool) -> Path:
    """The full path of what is made of a safetensors file or a folder of them, refused where none can be put.

    Raises:
        OutputExists, BadInput: as `staged`; or ``out`` is the source, lies inside it or around it, or is no file where
            the source is one.
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise BadInput(f"out={str(out)!r} is the source, or one lies inside the other; the source is never written.")
    if not source.is_dir():
        refuse_suffix(out, "the source is a file, so out")
    return refuse_place(out, overwrite)


def refuse_suffix(out: Path, what: str) -> None:
    """Raises `BadInput` where a path cannot be that of a safetensors file."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise BadInput(f"{what} must be the name of a .safetensors file; got {str(out)!r}.")


def refuse_place(out: Path, overwrite: bool) -> Path:
    """The full path of a result, refused where none can be put.

    Raises:
        OutputExists, BadInput: as `staged`.
    """
    out = Path.cwd() / out
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise OutputExists(f"{out} is already there; choose another path, or say overwrite=True (--overwrite).")
    if not out.parent.is_dir():
        raise BadInput(f"the folder {out.parent} does not exist; make it first.")
    _refuse_foreign(out)
    return out


def _refuse_foreign(out: Path) -> None:
    """A folder is replaced whole, with all that is in it: only one that holds a model, or nothing."""
    if not out.is_dir() or out.is_symlink():
        return
    names = sorted(p.name for p in out.iterdir())
    models = ("config.json", "openvino_model.xml")
    if names and not any(n in models or n.endswith((".safetensors", ".index.json")) for n in names):
        raise OutputExists(
            f"{out} is a folder that does not look like a model (it holds {', '.join(names[:4])}"
            f"{', …' if len(names) > 4 else ''}), and all in it would be lost; choose another path, or empty it first."
        )


def _home() -> str:
    """Where process numbers mean what they mean here: this machine, and this space of processes on it."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{platform.node()} {uuid.getnode()} {space}'.encode()):08x}"


def clear(folder: Path) -> None:
    """Removes what killed runs of this machine staged in a folder, for any output and however deep."""
    remove_stale(folder.rglob(".*.partial-*"))


def remove_stale(paths: Iterable[Path], name: str | None = None) -> list[Path]:
    """Removes stages, of one output or of all, of processes that are gone, and returns them. One of another machine cannot be
    told from a live one, and stays. An output that a process was killed at while it lay aside is put back."""
    removed = []
    paths = list(paths)
    for path in paths:
        _put_back(path, name)
    for path in paths:
        found = _STAGE.fullmatch(path.name)
        if found and name in (None, found[1]) and found[2] == _home() and (_is_gone(int(found[3])) or _is_left(path)):
            with suppress(OSError):  # another run may remove it at the same time
                disk.remove(path)
                removed.append(path)
    return removed


def _put_back(path: Path, name: str | None) -> None:
    """Puts what was there before a result back, if the result did not come: of a filesystem without exchange."""
    found = _OLD.fullmatch(path.name)
    if not found or name not in (None, found[1]) or found[2] != _home() or not _is_gone(int(found[3])):
        return
    out = path.with_name(found[1])
    with suppress(OSError):
        if os.path.lexists(out):
            disk.remove(path)
        else:
            disk.rename(path, out)


def is_stage(path: Path, name: str) -> bool:
    """Whether this is the stage of an output of that name, whoever made it."""
    found = _STAGE.fullmatch(path.name)
    return bool(found and found[1] == name)


def locked(journal: Path) -> int | None:
    """A lock on a journal that lasts until it is closed or the process ends, or ``None`` if another has it."""
    fd = disk.open_fd(journal, os.O_RDWR | os.O_CREAT)
    try:
        if disk.locked(fd, journal):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_left(stage: Path) -> bool:
    """Whether nobody holds the journal of a stage that has one: its run ended, and left it to be gone on with."""
    if not (stage / JOURNAL).is_file():
        return False
    lock = locked(stage / JOURNAL)
    if lock is not None:
        os.close(lock)
    return lock is not None


def _is_gone(pid: int) -> bool:
    if os.name != "posix":  # elsewhere, asking with signal 0 would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def sync(path: Path) -> None:
    """Forces a file, or a folder and all in it, to disk."""
    if path.is_dir():
        for p in disk.children(path):
            sync(p)
    disk.sync_path(path)


def put_in_place(stage: Path, out: Path, overwrite: bool) -> None:
    """Puts a whole result where it belongs, in one step; what was there is at ``stage`` then, or gone.

    Raises:
        OutputExists: something appeared there, and ``overwrite`` is false.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise OutputExists(f"{out} appeared while the result was made; it was left as it is.")
        if stage.is_file() and out.is_dir():
            raise BadInput(f"{out} is a folder, and the result is a file; choose another path.")
        if stage.is_file():
            disk.rename(stage, out)
        else:
            aside = stage_of(out)
            disk.exchange(stage, out, aside.with_name(aside.name.replace(".partial-", ".old-")))
    elif stage.is_dir():
        disk.rename(stage, out)
    else:
        disk.link(stage, out)  # unlike rename, this fails if a file appears at `out` just now
    disk.sync_path(out.parent)


def readable_by_all(path: Path) -> None:
    """Gives a file the mode the user's umask asks for; safetensors writes 0600 whatever that is."""
    mask = os.umask(0)
    os.umask(mask)
    disk.set_mode(path, 0o666 & ~mask)
