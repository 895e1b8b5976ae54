"""Writing a result so that nothing is lost: staged beside its place, synced, and renamed whole."""

from __future__ import annotations

import ctypes
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

_MARGIN = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    _remove_stale(out.parent.iterdir(), out.name)
    free = shutil.disk_usage(out.parent).free
    if free < need + _MARGIN:
        raise BadInput(f"{out.parent} has {free} bytes free, and the result needs {need}.")
    stage = out.parent / f".{out.name}.partial-{_home()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        yield stage
        sync(stage)
        _put_in_place(stage, out, overwrite)
        _sync_one(out.parent)
    finally:
        _remove(stage)


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
    _remove_stale(folder.rglob(".*.partial-*"))


def _remove_stale(paths: Iterable[Path], name: str | None = None) -> None:
    """Removes stages, of one output or of all, of processes that are gone. One of another machine cannot be told from a
    live one, and stays."""
    ours = re.compile(rf"\.(.+)\.partial-{_home()}-([1-9]\d{{0,9}})-[0-9a-f]{{8}}")
    for path in list(paths):
        found = ours.fullmatch(path.name)
        if found and name in (None, found[1]) and _is_gone(int(found[2])):
            with suppress(OSError):  # another run may remove it at the same time
                _remove(path)


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
        for p in path.iterdir():
            sync(p)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put_in_place(stage: Path, out: Path, overwrite: bool) -> None:
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise OutputExists(f"{out} appeared while the result was made; it was left as it is.")
        if stage.is_file() and out.is_dir():
            raise BadInput(f"{out} is a folder, and the result is a file; choose another path.")
        if stage.is_file():
            stage.replace(out)
        else:
            _exchange(stage, out)
    elif stage.is_dir():
        stage.rename(out)
    else:
        os.link(stage, out)  # unlike rename, this fails if a file appears at `out` just now


def _exchange(a: Path, b: Path) -> None:
    """Swaps two paths in one step, so that a whole result is at ``b`` at any moment."""
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    if swap is not None and swap(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return
    aside = b.with_name(f".{b.name}.old-{uuid.uuid4().hex[:8]}")  # a filesystem without exchange: two steps
    b.rename(aside)
    a.rename(b)
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


def readable_by_all(path: Path) -> None:
    """Gives a file the mode the user's umask asks for; safetensors writes 0600 whatever that is."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
