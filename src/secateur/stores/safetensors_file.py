"""Safetensors files and folders of them, read with distrust: every size and name is checked before it is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import BadInput
from secateur.native.checksum import crc32

from . import disk

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PACKED = "secateur.packed"
"""The key that a packed file's metadata has; see `secateur.runtime.format`."""
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
MAX_HEADER, MAX_INDEX = 100_000_000, 500_000_000

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: file name, byte range in the file, shape, the dtype's name in the file, and torch's dtype.

    The last is ``None`` where torch has none.
    """

    file: str
    start: int
    stop: int
    shape: tuple[int, ...]
    code: str
    dtype: torch.dtype | None


def read_source(path: Path) -> tuple[Path, dict[str, Stored]]:
    """The folder that a path's files lie in, and their tensors.

    Raises:
        BadInput: no such path, another format, or files that do not agree with each other.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist.")
    if path.is_dir():
        return path, read_folder(path)
    if not path.is_file():  # a pipe would be waited for, for ever
        raise BadInput(f"{path} is not a regular file.")
    if path.suffix == SUFFIX:
        return path.parent, read_header(path)
    raise BadInput(
        f"{path.name} is not a {SUFFIX} file. Pickled checkpoints (.bin, .pt) are read by the command line "
        "with --allow-pickle; or load it with torch.load(weights_only=True) and pass the dict."
    )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
        BadInput: truncated, inconsistent, or a name that occurs twice.
    """
    try:
        with safe_open(path, framework="pt"):  # checks offsets, sizes and that the whole file is covered
            pass
        with disk.opened(path) as fd:
            size = int.from_bytes(_read(fd, path, 8, 0), "little")
            if size > min(MAX_HEADER, disk.status(path).st_size - 8):
                raise BadInput(f"{path.name}: its header claims {size} bytes, more than the file holds.")
            header = json.loads(_read(fd, path, size, 8), object_pairs_hook=_no_doubles)
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        if isinstance(e, BadInput):
            raise BadInput(f"{path.name}: {e}") from e
        raise BadInput(f"{path.name} ({_size(path)} bytes) is not a whole safetensors file: {e}") from e
    out = {}
    for name, entry in header.items():
        if name != "__metadata__":
            a, b = entry["data_offsets"]
            code = entry["dtype"]
            out[name] = Stored(path.name, 8 + size + a, 8 + size + b, tuple(entry["shape"]), code, DTYPES.get(code))
    return out


def _read(fd: int, path: Path, size: int, offset: int) -> bytes:
    room = bytearray(size)
    return bytes(room[: disk.read_at(fd, path, memoryview(room), offset)])


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file that `read_header` found whole."""
    with safe_open(path, framework="pt") as f:
        return dict(f.metadata() or {})


def read_raw(path: Path, stored: Stored) -> Tensor:
    """The bytes of one tensor, uint8.

    Raises:
        BadInput: the file ends before them.
    """
    raw = np.empty(stored.stop - stored.start, dtype=np.uint8)
    with disk.opened(path) as fd:
        read_whole(fd, path, raw.data, stored.start)
    return (
        torch.from_numpy(raw) if len(raw) else torch.empty(0, dtype=torch.uint8, device="cpu")
    )  # numpy's has no stride


def read_whole(fd: int, path: Path, room: memoryview, offset: int) -> None:
    """Fills ``room`` from a place in an open file.

    Raises:
        BadInput: the file ends before.
    """
    if disk.read_at(fd, path, room, offset) != len(room):
        raise BadInput(f"{path.name} ended inside a tensor; it was changed while it was read.")


def checksum(path: Path, stored: Stored) -> int:
    """The CRC-32 of the bytes of one tensor, as far as the file has them."""
    left, crc = stored.stop - stored.start, 0
    buffer = memoryview(bytearray(min(left, 1 << 20)))
    with disk.opened(path) as fd:
        while left and (got := disk.read_at(fd, path, buffer[:left], stored.stop - left)):
            crc = crc32(buffer[:got], crc)
            left -= got
    return crc


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """One tensor, of a dtype that torch knows.

    Raises:
        BadInput: the file ends before it.
    """
    assert stored.dtype is not None
    return read_raw(path, stored).view(stored.dtype).view(stored.shape)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [k for k, _ in pairs]
        raise BadInput(f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice in its header.")
    return out


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder: by its index if it has one, else of its one safetensors file.

    Raises:
        BadInput: no such file, several without an index, an index that does not agree with the files, an unsafe name.
    """
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) > 1:
        raise BadInput(f"{folder.name} has {len(indices)} indices ({', '.join(i.name for i in indices)}); keep one.")
    if indices:
        return _by_index(folder, indices[0])
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) > 1 and (folder / f"model{SUFFIX}") in files:
        files = [folder / f"model{SUFFIX}"]
    if len(files) != 1:
        have = ", ".join(f.name for f in files) or ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise BadInput(
            f"{folder.name} must hold one safetensors file, or several with an index "
            f"(*{INDEX_SUFFIX}); it holds {have}."
        )
    return read_header(_safe(folder, files[0].name))


def _by_index(folder: Path, index: Path) -> dict[str, Stored]:
    if index.stat().st_size > MAX_INDEX:
        raise BadInput(f"{index.name} has {index.stat().st_size} bytes; an index has at most {MAX_INDEX}.")
    try:
        table = json.loads(disk.read_text(index), object_pairs_hook=_no_doubles)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise BadInput(f"{index.name} is not an index with a weight_map: {e!r}") from e
    if not isinstance(table, Mapping) or not all(isinstance(v, str) for v in table.values()):
        raise BadInput(f"{index.name}: weight_map must map names of tensors to names of files.")
    files = sorted(set(table.values()))
    paths = {f: _safe(folder, f) for f in files}
    missing = [f for f in files if not paths[f].exists()]
    if missing:
        raise BadInput(f"{index.name} names files that are not there: {', '.join(missing)}.")
    _refuse_unlisted(folder, index, files)
    out: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(paths[file]).items():
            if name in out:
                raise BadInput(f"the tensor {name!r} is in two files, {out[name].file} and {file}.")
            if table.get(name) != file:
                raise BadInput(f"{file} holds {name!r}, which {index.name} places in {table.get(name)}.")
            out[name] = stored
    ghosts = sorted(set(table) - set(out))
    if ghosts:
        raise BadInput(f"{index.name} lists tensors that no file holds: {', '.join(ghosts[:6])}.")
    return out


def _refuse_unlisted(folder: Path, index: Path, files: Collection[str]) -> None:
    """A shard that the index does not list would be lost; other files are the same weights in another form."""
    ours = {(m[1], m[2]) for f in files if (m := _SHARD.fullmatch(f))}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        m = _SHARD.fullmatch(path.name)
        if m and (m[1], m[2]) in ours and path.name not in files:
            raise BadInput(f"{path.name} is one of the shards by its name, and {index.name} lists no tensor of it.")


def _safe(folder: Path, name: str) -> Path:
    """A file of the folder, by a name from an untrusted index."""
    pure = PureWindowsPath(name), PurePosixPath(name)
    if any(p.name != name or p.drive or p.root for p in pure) or name in (".", "..") or not name.endswith(SUFFIX):
        raise BadInput(
            f"{name!r} is not the name of a safetensors file in the folder; names in an index are not paths."
        )
    return _inside(folder, folder / name)


def _inside(folder: Path, path: Path) -> Path:
    """A regular file, or a link to one inside the folder or the hub cache that the folder belongs to."""
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        cache = home.parent.parent / "blobs"  # a hub cache: snapshots/<revision>/ links into blobs/
        if home not in target.parents and cache not in target.parents:
            raise BadInput(f"{path.name!r} is a link to {target}, outside its folder; copy the file there.")
    if os.path.lexists(path) and not path.is_file():
        raise BadInput(f"{path.name!r} is not a regular file; take it out of the folder.")
    return path


OTHER_WEIGHTS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".index.json",
)
OTHER_FOLDERS = ("onnx", "openvino")


def carry_over(folder: Path, stage: Path, shards: set[str], left_out: Collection[str] = ()) -> None:
    """Copies a folder's files to a new folder: shards, their index, and what is not the same weights in another format.

    Other formats of the weights lie beside the shards, or in folders of their own; they would stay unpruned, so they are
    left out, and so are hidden files. All other sub-folders are carried whole. New files get the mode the umask asks for.
    Files named in ``left_out`` are checked like the others, and not copied.
    """
    files = []
    for path in disk.children(folder):
        ours = path.name in shards or path.name.endswith(INDEX_SUFFIX)
        other = path.name.endswith((*OTHER_WEIGHTS, SUFFIX)) or path.name in OTHER_FOLDERS
        if path.name.startswith(".") or (other and not ours):
            continue
        files += [path, *sorted(path.rglob("*"))] if path.is_dir() and not path.is_symlink() else [path]
    checked = [p if p.is_dir() and not p.is_symlink() else _inside(folder, p) for p in files]
    disk.make_folder(stage)
    for path in checked:
        copy = stage / path.relative_to(folder)
        if path.is_dir():
            disk.make_folder(copy)
        elif path.name not in left_out:
            disk.copy(path, copy)
