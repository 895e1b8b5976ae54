"""Safetensors files written a tensor at a time, where the sizes are known beforehand and where they are not."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.native.checksum import crc32
from secateur.stores import disk
from secateur.stores.safetensors_file import checksum, read_header
from secateur.stores.staging import readable_by_all

IN_MEMORY, BUFFER = 8 << 20, 1 << 20
ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
"""In which safetensors itself writes them, widest first, so that every tensor is aligned to its elements."""


class Described(NamedTuple):
    """A tensor of a file: name, the dtype's name in the file, shape, number of bytes."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int


def raw_bytes(t: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU, uint8."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def in_order(tensors: Iterable[Described]) -> list[Described]:
    """Tensors as safetensors orders them; of dtypes it did not have when this was written, last."""
    rank = {code: i for i, code in enumerate(ORDER)}
    return sorted(tensors, key=lambda t: (rank.get(t.code, len(rank)), t.name))


def header_of(tensors: Sequence[Described], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file in which the tensors lie one after another."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": t.code, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Sums:
    """Writes bytes, and remembers the checksum of each tensor's."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def write(self, name: str, raw: Tensor, file: IO[bytes]) -> None:
        """Adds the bytes of a tensor to a file."""
        data, crc = raw.numpy().data, 0
        for at in range(0, len(data), BUFFER):  # what was summed is still in the cache when it is written
            some = data[at : at + BUFFER]
            crc = crc32(some, crc)
            file.write(some)
        self.of[name] = crc

    def compare(self, path: Path) -> None:
        """Reads a file back.

        Raises:
            SecateurError: it does not hold what was written.
        """
        stored = read_header(path)
        bad = set(stored) ^ set(self.of)
        bad |= {n for n, s in stored.items() if n in self.of and checksum(path, s) != self.of[n]}
        if bad:
            raise SecateurError(f"{min(bad)!r} does not read back as it was written; the disk or memory is at fault.")


class Spool:
    """Tensors that are put in a file once all their sizes are known; memory holds no more than a few MiB of them.

    Args:
        folder: where room is taken for what does not fit, in files without names, which vanish with the process.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[int, IO[bytes]] = {
            width: tempfile.SpooledTemporaryFile(max_size=IN_MEMORY, dir=str(folder)) for width in (8, 4, 2, 1)
        }
        self._held: dict[int, list[Described]] = {width: [] for width in self._files}
        self._sums = Sums()

    def add(self, name: str, code: str, shape: Sequence[int], raw: Tensor, width: int) -> None:
        """Takes the bytes of a tensor whose elements have ``width`` bytes."""
        width = width if width in self._files else 1
        self._held[width].append(Described(name, code, tuple(shape), raw.numel()))
        self._sums.write(name, raw, self._files[width])

    def finish(self, path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
        """Writes the file, the widest elements first, and reads it back. The names in it, and the bytes of each.

        Raises:
            SecateurError: it does not read back as it was written.
        """
        tensors = [t for held in self._held.values() for t in held]
        with disk.writer(path) as out:
            out.write(header_of(tensors, metadata))
            for file in self._files.values():
                file.seek(0)
                shutil.copyfileobj(file, out, BUFFER)
        readable_by_all(path)
        self._sums.compare(path)
        return {t.name: t.nbytes for t in tensors}

    def close(self) -> None:
        """Gives the room back."""
        for file in self._files.values():
            file.close()


@contextmanager
def spool(folder: Path) -> Iterator[Spool]:
    """A `Spool` whose room is given back at the end."""
    made = Spool(folder)
    try:
        yield made
    finally:
        made.close()


def write_file(
    path: Path, tensors: Iterable[Described], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a file of tensors whose sizes are known, one in memory at a time, and reads it back.

    Args:
        read: the bytes of the tensor of a name.

    Raises:
        SecateurError: it does not read back as it was written.
    """
    ordered, sums = in_order(tensors), Sums()
    with disk.writer(path) as out:
        out.write(header_of(ordered, metadata))
        for t in ordered:
            sums.write(t.name, read(t.name), out)
    readable_by_all(path)
    sums.compare(path)
