"""Tensors in safetensors files: one file, or a folder as `save_pretrained` writes it, sharded or not.

The result is a copy of the source in which the pruned weights' bytes are zero: headers, metadata, order of tensors, index,
config and tokenizer are those of the source, and every other byte is the same. A piece of a tensor is in memory at a time;
where a criterion or a caller asks for whole tensors, one tensor.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.core.select import identity
from secateur.core.types import Align, Part, Reduce, Spec
from secateur.errors import BadInput, BadTensor, NothingChosen, SecateurError
from secateur.native.checksum import crc32

from . import checks, disk
from .memory import MemoryStore
from .safetensors_file import PACKED, Stored, carry_over, checksum, read_metadata, read_source, read_tensor, read_whole
from .staging import refuse_place, refuse_result, staged

Raw = NDArray[np.uint8]
MEMORY = 256 << 20
"""Bytes that a worker may take, by default."""
_SHARES = 128
"""Pieces of a tensor that fit into them; some seven are held, while one is pruned and written and others wait to be hashed."""


class CheckpointStore:
    """A safetensors file or a folder of them, as a `secateur.stores.base.Store`.

    Args:
        path: a ``.safetensors`` file; or a folder with one, or with shards and their index.
        roles: glob to role, for tensors whose role or orientation their names do not tell.
        memory: bytes that a worker may take beside the interpreter.
        share: where several workers share the files, this one's number, from 0, and how many there are.
        sum: sums counts over these workers.
        ends: names of the first and the last layer's weights, where somebody wants to know.

    Raises:
        BadInput: no such path, another format, or files that do not agree with each other.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"fc.weight": torch.ones(2, 3)}, path)
        >>> [(s.name, s.shape, s.role) for s in CheckpointStore(path).specs()]
        [('fc.weight', (2, 3), 'linear')]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        roles: Mapping[str, str] | None = None,
        memory: int = MEMORY,
        share: tuple[int, int] = (0, 1),
        sum: Reduce = identity,
        ends: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.path, self.roles, self.memory, self.sum, self.ends = Path(path), roles, memory, sum, ends
        self._folder, self._stored = read_source(self.path)
        self._own = set(shared_out(self.files, *share))
        self._room = Room(memory // _SHARES)
        for file in self.files:
            if PACKED in read_metadata(self._folder / file):
                raise BadInput(f"{file} is packed; unpack it first: secateur unpack {self.path.name} -o OUT.")
        if not self._stored:
            raise NothingChosen(f"{self.path} holds no tensors.")
        described = {
            n: torch.empty(s.shape, dtype=s.dtype, device="meta")
            for n, s in self._stored.items()
            if s.dtype is not None
        }
        self._described = MemoryStore(described, roles=roles)
        self._raw = {
            s.name: next(n for n in (s.name, *s.aliases) if n in self._stored) for s in self._described.specs()
        }
        self._by_raw = {self._raw[s.name]: s for s in self.specs()}
        self._written: dict[str, int] = {}
        self._stage: Path | None = None

    def specs(self) -> list[Spec]:
        """Every tensor of a dtype that torch knows, sorted by name. A file does not record the order of layers, and has one
        only where both its ends were named."""
        found = [replace(s, order=None) for s in self._described.specs()]
        if None in self.ends:
            return found
        places = [next((i for i, s in enumerate(found) if e in (s.name, *s.aliases)), None) for e in self.ends]
        if None in places:
            raise BadInput(
                f"first and last are names of tensors; {self.path.name} has no {self.ends[places.index(None)]!r}."
            )
        order = {places[0]: -1, places[1]: len(found)}
        return [replace(s, order=order.get(i, i)) for i, s in enumerate(found)]

    def every(self) -> list[Spec]:
        """Every tensor whose values can be counted."""
        return [s for s in self.specs() if s.dtype in checks.SUPPORTED and s.role != "buffer"]

    @cached_property
    def files(self) -> dict[str, dict[str, Stored]]:
        """Each file's tensors by the names they have there, in the order in which they lie."""
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in sorted(self._stored.items(), key=lambda item: (item[1].file, item[1].start, item[0])):
            found.setdefault(stored.file, {})[name] = stored
        return found

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._folder

    def parts(self, spec: Spec, align: Align) -> Iterator[Part]:
        """A tensor in flat pieces, or whole, read from the staged result if there is one, else from the source.

        Nothing of files that are another worker's, and nothing in memory anyway.
        """
        stored = self._stored[self._raw[spec.name]]
        if align == "resident" or stored.file not in self._own:
            return
        path = self._file(stored)
        if align == "whole":
            yield Part(spec, read_tensor(path, stored))
            return
        yield from self._pieces(path, spec, stored, align if isinstance(align, int) else 1)

    def _pieces(self, path: Path, spec: Spec, stored: Stored, run: int) -> Iterator[Part]:
        width = spec.dtype.itemsize
        step = max(1, self._room.size // (width * run)) * run
        with disk.opened(path) as fd:
            for start in range(0, max(1, spec.numel), step):
                raw = self._room.take(width * min(step, spec.numel - start))
                read_whole(fd, path, raw.data, stored.start + width * start)
                yield Part(spec, as_tensor(raw, spec.dtype), start)

    def write(self, part: Part) -> None:
        """Writes a whole tensor's bytes into the staged result."""
        assert self._stage is not None and part.whole, "a checkpoint is written inside staged(), a tensor at a time"
        stored = self._stored[self._raw[part.spec.name]]
        raw = part.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        path = self._file(stored)
        with disk.opened(path, os.O_WRONLY) as fd:
            disk.write_at(fd, path, raw.data, stored.start)
        self._written[part.spec.name] = crc32(raw.data)

    def check(self, specs: Sequence[Spec]) -> None:
        """Raises `BadTensor` for the first chosen one of ``specs`` that cannot be pruned as it is."""
        for s in specs:
            if s.skip is None and (why := checks.of_dtype(self._described.entry(s))):
                raise BadTensor(f"cannot prune {s}: {why}.")

    def refuse_out(self, out: str | os.PathLike[str], overwrite: bool, in_place: bool = False) -> Path:
        """The path of a result, refused where none can be put; with ``in_place`` it is the source itself.

        Raises:
            OutputExists, BadInput: as `staged`.
        """
        if in_place:
            if Path(out).resolve() != self.path.resolve():
                raise BadInput(f"in place, out is the source itself, {self.path}; got {out}.")
            return refuse_place(Path(out), overwrite=True)
        return refuse_result(self.path, Path(out), overwrite)

    @contextmanager
    def staged(self, out: str | os.PathLike[str], overwrite: bool) -> Iterator[None]:
        """Parts are read from and written to a copy of the source, which is put at ``out`` when the block ends.

        Raises:
            OutputExists, BadInput: see `secateur.stores.staging.staged`; or ``out`` is the source or lies inside it.
        """
        target = self.refuse_out(out, overwrite)
        with staged(target, overwrite, self.nbytes) as stage:
            self._stage = stage
            try:
                self._copy(stage)
                yield
                self._verify()
            finally:
                self._stage = None
                self._written = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return int(np.sum([self.size_of(file) for file in self.files], dtype=np.int64))

    def size_of(self, file: str) -> int:
        """Bytes of one file."""
        return disk.status(self._folder / file).st_size

    def stamp(self) -> dict[str, list[int | str]]:
        """What tells that a file has changed: its size, when it was written, and a hash of its header."""
        found: dict[str, list[int | str]] = {}
        for file, held in self.files.items():
            path, size = self._folder / file, min((s.start for s in held.values()), default=8)
            room = bytearray(size)
            with disk.opened(path) as fd:
                disk.read_at(fd, path, memoryview(room), 0)
            status = disk.status(path)
            found[file] = [status.st_size, status.st_mtime_ns, hashlib.sha256(room).hexdigest()]
        return found

    def spec_of(self, raw: str) -> Spec | None:
        """The description of what a file calls by this name; ``None`` of a dtype that torch does not know."""
        return self._by_raw.get(raw)

    def _file(self, stored: Stored) -> Path:
        if self._stage is None:
            return self._folder / stored.file
        return self._stage / stored.file if self._stage.is_dir() else self._stage

    def _copy(self, stage: Path) -> None:
        if not self.path.is_dir():
            disk.copy(self.path, stage)
            return
        carry_over(self.path, stage, set(self.files))

    def _verify(self) -> None:
        """Reads back what was written, and compares headers and sizes with the source."""
        for name, crc in self._written.items():
            stored = self._stored[self._raw[name]]
            if checksum(self._file(stored), stored) != crc:
                raise SecateurError(f"{name!r} does not read back as it was written; the disk or memory is at fault.")
        for file in {s.file for s in self._stored.values()}:
            source, copy = self._folder / file, self._file(next(s for s in self._stored.values() if s.file == file))
            if source.stat().st_size != copy.stat().st_size:
                raise SecateurError(f"{file} changed while it was pruned; run it again.")


def shared_out(files: Mapping[str, Mapping[str, Stored]], rank: int, world: int) -> list[str]:
    """The files of one of several workers: the largest first, each to the one that has the fewest bytes.

    >>> def file(size: int) -> dict[str, Stored]:
    ...     return {"w": Stored("", 0, size, (size,), "U8", torch.uint8)}
    >>> shared_out({"a": file(3), "b": file(9), "c": file(5)}, 1, 2)
    ['c', 'a']
    """
    sizes = {file: max((s.stop for s in held.values()), default=0) for file, held in files.items()}
    loads, owners = [0] * world, {}
    for file in sorted(sizes, key=lambda f: (-sizes[f], f)):
        least = loads.index(min(loads))
        loads[least] += sizes[file]
        owners[file] = least
    return [file for file, owner in owners.items() if owner == rank]


def as_tensor(raw: Raw, dtype: torch.dtype) -> Tensor:
    """Bytes as a flat tensor in the same memory."""
    flat = torch.from_numpy(raw) if len(raw) else torch.empty(0, dtype=torch.uint8, device="cpu")
    return flat.view(dtype)


class Room:
    """Memory for pieces of files, used again as soon as nobody holds a piece: fresh pages would cost as much as reading them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[Raw] = []

    def take(self, count: int) -> Raw:
        """So many bytes."""
        if count > self.size:  # a run of elements that is not cut
            return np.empty(count, np.uint8)
        free = [i for i in range(len(self._held)) if _holders(self._held, i) == _UNUSED]
        if not free:
            free = [len(self._held)]
            self._held.append(np.empty(self.size, np.uint8))
        return self._held[free[0]][:count]


def _holders(arrays: Sequence[Raw], i: int) -> int:
    return sys.getrefcount(arrays[i])


_UNUSED = _holders([np.empty(0, np.uint8)], 0)
