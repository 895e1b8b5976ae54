"""Every operation on the files of a checkpoint and of what is made of it: one place, so that a test can make each of them fail.

An operation that a signal interrupted is begun again, some times over. Reads are plain reads: of a file that is mapped and cut
short meanwhile, a read ends the program.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Path_ = str | os.PathLike[str]

before: Callable[[str, str], None] | None = None
"""Called with the name of every operation and its path before it is done; a test may raise there, or end the process."""
TRIES = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _do(what: str, path: Path_, operation: Callable[[], T]) -> T:
    for tries in range(TRIES):
        try:
            if before is not None:
                before(what, os.fspath(path))
            return operation()
        except InterruptedError:
            if tries == TRIES - 1:
                raise
    raise AssertionError("unreachable")


@contextmanager
def opened(path: Path_, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A file descriptor, closed when the block ends. New files get the mode that the umask asks for."""
    fd = _do("open", path, lambda: os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666))
    try:
        yield fd
    finally:
        os.close(fd)


def read_at(fd: int, path: Path_, room: memoryview, offset: int) -> int:
    """Fills ``room`` from a place in a file; returns how many bytes there were."""
    done = 0
    while done < len(room):
        got = _do("read", path, partial(_read, fd, room[done:], offset + done))
        if not got:
            break
        done += got
    return done


def _read(fd: int, room: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [room], offset)
    os.lseek(fd, offset, os.SEEK_SET)
    data = os.read(fd, len(room))
    room[: len(data)] = data
    return len(data)


def _write(fd: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    os.lseek(fd, offset, os.SEEK_SET)
    return os.write(fd, data)


def write_all(fd: int, path: Path_, data: memoryview) -> None:
    """Writes all of ``data`` where the file stands."""
    while data:
        wrote = _do("write", path, partial(os.write, fd, data))
        data = data[wrote:]


def write_at(fd: int, path: Path_, data: memoryview, offset: int) -> None:
    """Writes all of ``data`` at a place of a file."""
    while data:
        wrote = _do("write", path, partial(_write, fd, data, offset))
        data, offset = data[wrote:], offset + wrote


def sync(fd: int, path: Path_) -> None:
    """Forces what was written to an open file to disk."""
    _do("fsync", path, lambda: os.fsync(fd))


def sync_path(path: Path_) -> None:
    """Forces a file, or the names in a folder, to disk."""
    with opened(path) as fd:
        sync(fd, path)


def read_text(path: Path_) -> str:
    """A text file in UTF-8."""
    return _do("read", path, lambda: Path(path).read_text("utf-8"))


def write_new(path: Path_, text: str) -> None:
    """A new text file, on disk when this returns."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        write_all(fd, path, memoryview(text.encode()))
        sync(fd, path)


def append(path: Path_, text: str) -> None:
    """Adds to a text file; on disk when this returns."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        write_all(fd, path, memoryview(text.encode()))
        sync(fd, path)


def copy(source: Path_, target: Path_) -> None:
    """Copies a file's bytes to a new file, on disk when this returns."""
    _do("copy", target, lambda: shutil.copyfile(source, target))
    sync_path(target)


def make_folder(path: Path_) -> None:
    """A new folder."""
    _do("mkdir", path, Path(path).mkdir)


def rename(source: Path_, target: Path_) -> None:
    """Renames; what is at the target, if it is a file, is replaced."""
    _do("rename", target, lambda: Path(source).replace(target))


def link(source: Path_, target: Path_) -> None:
    """A second name of a file; unlike `rename`, this fails where something is at the target."""
    _do("link", target, lambda: os.link(source, target))


def unlink(path: Path_) -> None:
    """Removes a file's name."""
    _do("unlink", path, Path(path).unlink)


def remove(path: Path_) -> None:
    """Removes a file, or a folder with all that is in it; nothing where nothing is."""
    here = Path(path)
    if here.is_symlink() or not here.is_dir():
        if os.path.lexists(here):
            unlink(here)
        return
    for child in sorted(here.iterdir()):
        remove(child)
    _do("rmdir", here, here.rmdir)


def exchange(a: Path, b: Path) -> None:
    """Swaps two paths in one step, so that a whole result is at ``b`` at any moment."""
    if not _do("exchange", b, lambda: _exchanged(a, b)):  # a filesystem without exchange: two steps
        aside = b.with_name(f".{b.name}.old-{uuid.uuid4().hex[:8]}")
        rename(b, aside)
        rename(a, b)
        rename(aside, a)


def _exchanged(a: Path, b: Path) -> bool:
    swap: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = os.fsencode(a), os.fsencode(b)
    return swap is not None and swap(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
