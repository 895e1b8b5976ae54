"""Tensors in safetensors files: one file, or a folder as `save_pretrained` writes it, sharded or not.

The result is a copy of the source in which the pruned weights' bytes are zero: headers, metadata, order of tensors, index,
config and tokenizer are those of the source, and every other byte is the same. One tensor is in memory at a time.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from secateur.core.select import identity
from secateur.core.types import Align, Part, Spec
from secateur.errors import BadInput, BadTensor, NothingChosen, SecateurError

from . import checks
from .memory import MemoryStore
from .safetensors_file import PACKED, Stored, carry_over, checksum, read_metadata, read_source, read_tensor
from .staging import refuse_result, staged


class CheckpointStore:
    """A safetensors file or a folder of them, as a `secateur.stores.base.Store`.

    Args:
        path: a ``.safetensors`` file; or a folder with one, or with shards and their index.
        roles: glob to role, for tensors whose role or orientation their names do not tell.

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

    def __init__(self, path: str | os.PathLike[str], *, roles: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._folder, self._stored = read_source(self.path)
        for file in sorted({s.file for s in self._stored.values()}):
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
        self._written: dict[str, int] = {}
        self._stage: Path | None = None

    def specs(self) -> list[Spec]:
        """Every tensor of a dtype that torch knows, sorted by name. A file does not record the order of layers."""
        return [replace(s, order=None) for s in self._described.specs()]

    def every(self) -> list[Spec]:
        """Every tensor whose values can be counted."""
        return [s for s in self.specs() if s.dtype in checks.SUPPORTED and s.role != "buffer"]

    def parts(self, spec: Spec, align: Align) -> Iterable[Part]:
        """The whole tensor, read from the staged result if there is one, else from the source."""
        stored = self._stored[self._raw[spec.name]]
        return (Part(spec, read_tensor(self._file(stored), stored)),)

    sum = staticmethod(identity)  # one worker: the core then knows that all there is lies in this memory

    def write(self, part: Part) -> None:
        """Writes a tensor's bytes into the staged result."""
        assert self._stage is not None, "a checkpoint is written inside staged()"
        stored = self._stored[self._raw[part.spec.name]]
        raw = part.tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._file(stored).open("r+b") as f:
            f.seek(stored.start)
            f.write(raw.data)
        self._written[part.spec.name] = zlib.crc32(raw.data)

    def check(self, specs: Sequence[Spec]) -> None:
        """Raises `BadTensor` for the first chosen one of ``specs`` that cannot be pruned as it is."""
        for s in specs:
            if s.skip is None and (why := checks.of_dtype(self._described.entry(s))):
                raise BadTensor(f"cannot prune {s}: {why}.")

    def refuse_out(self, out: str | os.PathLike[str], overwrite: bool) -> Path:
        """The path of a result, refused where none can be put.

        Raises:
            OutputExists, BadInput: as `staged`.
        """
        return refuse_result(self.path, Path(out), overwrite)

    @contextmanager
    def staged(self, out: str | os.PathLike[str], overwrite: bool) -> Iterator[None]:
        """Parts are read from and written to a copy of the source, which is put at ``out`` when the block ends.

        Raises:
            OutputExists, BadInput: see `secateur.stores.staging.staged`; or ``out`` is the source or lies inside it.
        """
        target = self.refuse_out(out, overwrite)
        files = sorted({self._folder / s.file for s in self._stored.values()})
        with staged(target, overwrite, sum(f.stat().st_size for f in files)) as stage:
            self._stage = stage
            try:
                self._copy(stage)
                yield
                self._verify()
            finally:
                self._stage = None
                self._written = {}

    def _file(self, stored: Stored) -> Path:
        if self._stage is None:
            return self._folder / stored.file
        return self._stage / stored.file if self._stage.is_dir() else self._stage

    def _copy(self, stage: Path) -> None:
        if not self.path.is_dir():
            shutil.copyfile(self.path, stage)
            return
        carry_over(self.path, stage, {s.file for s in self._stored.values()})

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
