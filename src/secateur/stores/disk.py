"""Every operation on the files of a checkpoint and of what is made of it: one place, so that a test can make each of them fail.

An operation that a signal interrupted is begun again, some times over. Reads are plain reads: of a file that is mapped and cut
short meanwhile, a read ends the program.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

try:
    import fcntl
except ImportError:  # on Windows, where nothing tells whether another process is at work on a stage
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Path_ = str | os.PathLike[str]

before: Callable[[str, str], None] | None = None
"""Called with the name of every operation and its path before it is done; a test may raise there, or end the process."""
TRIES = 20
BUFFER = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
"""What filesystems say of an exchange that they do not know."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


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
    fd = open_fd(path, flags)
    try:
        yield fd
    finally:
        close_fd(fd, path)


def open_fd(path: Path_, flags: int) -> int:
    """A file descriptor, which `close_fd` closes."""
    return _do("open", path, lambda: os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666))


def close_fd(fd: int, path: Path_) -> None:
    """Closes it. Never twice: where a signal interrupted that, or the disk failed at it, it is closed all the same."""
    try:
        if before is not None:
            before("close", os.fspath(path))
    except InterruptedError:
        pass
    finally:
        os.close(fd)


def locked(fd: int, path: Path_) -> bool:
    """Takes a lock that lasts as long as the file is open; whether nobody else has it. Where a filesystem knows no locks,
    nobody has."""
    if fcntl is None:
        return True
    try:
        _do("lock", path, lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except OSError as e:
        if isinstance(e, BlockingIOError):
            return False
        if e.errno not in _NO_LOCKS:
            raise
    return True


class Writer:
    """A new file that bytes are added to; `BUFFER` of them at a time go to disk. (One of Python's own would write what is left of
    it whenever it is let go of, to a descriptor that may be another file's by then.)"""

    def __init__(self, fd: int, path: Path_) -> None:
        self._fd, self._path, self._held = fd, path, bytearray()

    def write(self, data: Any) -> int:
        """Adds bytes; returns how many."""
        view = memoryview(data).cast("B")
        if len(self._held) + len(view) > BUFFER:
            self.flush()
        if len(view) > BUFFER:
            write_all(self._fd, self._path, view)
        else:
            self._held += view
        return len(view)

    def flush(self) -> None:
        """Writes what is held."""
        write_all(self._fd, self._path, memoryview(bytes(self._held)))
        self._held.clear()


@contextmanager
def writer(path: Path_) -> Iterator[IO[bytes]]:
    """A new file, to be written to; whole when the block ends without an error."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        out = Writer(fd, path)
        yield cast(IO[bytes], out)
        out.flush()


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


def read_bytes(path: Path_) -> bytes:
    """All of a file."""
    return _do("read", path, lambda: Path(path).read_bytes())


def read_text(path: Path_) -> str:
    """A text file in UTF-8."""
    return read_bytes(path).decode("utf-8")


def sha256(path: Path_) -> str:
    """The SHA-256 of a file."""
    digest, at = hashlib.sha256(), 0
    room = memoryview(bytearray(BUFFER))
    with opened(path) as fd:
        while got := read_at(fd, path, room, at):
            digest.update(room[:got])
            at += got
    return digest.hexdigest()


def write_new(path: Path_, contents: str | bytes) -> None:
    """A new file, on disk when this returns; text in UTF-8."""
    data = contents.encode() if isinstance(contents, str) else contents
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        write_all(fd, path, memoryview(data))
        sync(fd, path)


def write_whole(path: Path_, text: str) -> None:
    """A text file, on disk when this returns; whoever finds it finds all of it. What is there already is replaced."""
    aside = f"{os.fspath(path)}.new"
    remove(aside)  # of a run that was killed at it
    write_new(aside, text)
    rename(aside, path)


def append(path: Path_, text: str) -> None:
    """Adds to a text file; on disk when this returns."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
        write_all(fd, path, memoryview(text.encode()))
        sync(fd, path)


def copy(source: Path_, target: Path_) -> None:
    """Copies a file's bytes to a new file, on disk when this returns."""
    _do("copy", target, lambda: shutil.copyfile(source, target))
    sync_path(target)


def status(path: Path_) -> os.stat_result:
    """Size, times and kind of a file."""
    return _do("stat", path, Path(path).stat)


def children(path: Path_) -> list[Path]:
    """What is in a folder, sorted by name."""
    return _do("list", path, lambda: sorted(Path(path).iterdir()))


def make_folder(path: Path_) -> None:
    """A new folder."""
    _do("mkdir", path, Path(path).mkdir)


def set_mode(path: Path_, mode: int) -> None:
    """Who may read and write a file."""
    _do("chmod", path, lambda: Path(path).chmod(mode))


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
    for child in children(here):
        remove(child)
    _do("rmdir", here, here.rmdir)


def exchange(a: Path, b: Path, aside: Path) -> None:
    """Swaps two paths in one step, so that a whole result is at ``b`` at any moment.

    Args:
        aside: where ``b`` lies for a moment on a filesystem that cannot do that. Whoever finds it there, and nothing at ``b``,
            puts it back: see `secateur.stores.staging.remove_stale`.
    """
    if _do("exchange", b, lambda: _exchanged(a, b)):
        return
    rename(b, aside)
    try:
        rename(a, b)
    except OSError:
        rename(aside, b)
        raise
    rename(aside, a)


def _exchanged(a: Path, b: Path) -> bool:
    swap: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = os.fsencode(a), os.fsencode(b)
    if swap is None:
        return False
    if swap(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _UNKNOWN:
        raise OSError(code, os.strerror(code), os.fspath(b))
    return False
