"""One file of a checkpoint, copied with zeros written in: read once, counted, hashed and written on the way, and read back."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.core import fast
from secateur.core.elements import Meter
from secateur.core.keys import FORMATS, magnitude_key
from secateur.core.plan import Plan, Row
from secateur.core.select import Cut, identity
from secateur.core.types import Member, Part, Spec
from secateur.core.write import follow, streamed, units_going
from secateur.errors import SecateurError
from secateur.native.checksum import crc32

from . import checks, disk
from .checkpoint import CheckpointStore
from .safetensors_file import read_header, read_whole

LIVE = Cut(1, 0)
"""Takes the zeros that are there."""


class Counted(NamedTuple):
    """What was counted in one tensor while it was written: zeros, the smallest magnitude that is left, NaN and infinities."""

    zeros: int
    threshold: float | None
    nonfinite: int = 0


@dataclass(frozen=True)
class Done:
    """A file that is written.

    Attributes:
        file: its name.
        nbytes, sha256, crc32: of its contents.
        counted: of each tensor whose values can be counted, by its canonical name.
    """

    file: str
    nbytes: int
    sha256: str
    crc32: int
    counted: Mapping[str, Counted]


class Digest:
    """SHA-256 and CRC-32 of what it is given, computed in a thread of its own."""

    def __init__(self) -> None:
        self._sha, self.crc, self.nbytes = hashlib.sha256(), 0, 0
        self._waiting: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, data: memoryview) -> None:
        """More bytes, which stay as they are until they have been looked at: whoever gives them holds their memory."""
        self.nbytes += len(data)
        self._waiting.put(data)

    def hex(self) -> str:
        """The SHA-256 of everything; `crc` is right then, too."""
        self._waiting.put(None)
        self._thread.join()
        return self._sha.hexdigest()

    def _work(self) -> None:
        while (data := self._waiting.get()) is not None:
            self._sha.update(data)
            self.crc = crc32(data, self.crc)
            del data  # its memory can be used again


def rewrite(store: CheckpointStore, plan: Plan, file: str, target: Path) -> Done:
    """Writes one of a store's files to a new path, with the plan's zeros in it; `read_back` forces it to disk.

    Raises:
        BadInput: the source is shorter than its header said.
        SecateurError: another number of zeros than planned was written.
    """
    counted: dict[str, Counted] = {}
    digest = Digest()
    try:
        with disk.opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as out:
            for data in _contents(store, plan, file, counted):
                disk.write_all(out, target, data)
                digest.add(data)
    finally:
        sha256 = digest.hex()
    for row in plan.chosen:
        if row.name in counted and counted[row.name].zeros != row.prune:
            raise SecateurError(
                f"wrote {counted[row.name].zeros} zeros to {row.name!r} where the plan says {row.prune}: the source changed "
                "meanwhile, or this is a bug. Run it again."
            )
    return Done(file, digest.nbytes, sha256, digest.crc, counted)


def read_back(store: CheckpointStore, done: Done, target: Path) -> None:
    """Forces a file that was written to disk, and compares it with what was meant to be in it.

    Raises:
        SecateurError: other bytes, or tensors of other names, shapes or dtypes than the source's.
    """
    crc, at, room = 0, 0, memoryview(bytearray(1 << 20))
    with disk.opened(target) as fd:
        disk.sync(fd, target)
        while got := disk.read_at(fd, target, room, at):
            crc = crc32(room[:got], crc)
            at += got
    same = (at, crc) == (done.nbytes, done.crc32)
    if not same or {n: replace(s, file=done.file) for n, s in read_header(target).items()} != store.files[done.file]:
        raise SecateurError(f"{target.name} does not read back as it was written; the disk or memory is at fault.")


def _contents(store: CheckpointStore, plan: Plan, file: str, counted: dict[str, Counted]) -> Iterator[memoryview]:
    """All bytes of a file to be, piece by piece, and in ``counted`` what is in them."""
    rows = {r.name: r for r in plan.chosen}
    led = {m.name: (r, m) for r in plan.chosen for m in r.followers}
    held = store.files[file]
    yield from _raw(store, file, 0, min((s.start for s in held.values()), default=store.size_of(file)))
    for name, stored in held.items():
        spec = store.spec_of(name)
        if spec is None or spec.name in counted:
            yield from _raw(store, file, stored.start, stored.stop)
            continue
        leader = next((led[n] for n in (spec.name, *spec.aliases) if n in led), None)
        look = Look(spec)
        for part in _parts(store, plan, spec, rows.get(spec.name), leader, look):
            raw = part.tensor.reshape(-1).view(torch.uint8)
            yield raw.numpy().data if raw.numel() else memoryview(b"")
        if spec.dtype in checks.SUPPORTED and spec.role != "buffer":
            counted[spec.name] = look.found()


def _parts(
    store: CheckpointStore, plan: Plan, spec: Spec, row: Row | None, leader: tuple[Row, Member] | None, look: Look
) -> Iterator[Part]:
    """The pieces of one tensor as they are to be written."""
    if row is not None:
        for part in streamed(plan, row, store.parts, look.meter):
            if plan.nonfinite == "keep":
                look.at_odd(part.tensor)
            yield part
        return
    which = None if leader is None else units_going(plan, leader[0], store.parts)
    for part in store.parts(spec, "chunk"):
        if leader is not None and which is not None:
            follow(which, leader[1], part)
        look.at(part)
        yield part


class Look:
    """Counts what is in a tensor, piece by piece."""

    def __init__(self, spec: Spec) -> None:
        self.meter, self._spec, self._nonfinite = Meter(spec.dtype), spec, 0

    def at(self, part: Part) -> None:
        """Counts one piece."""
        if self._spec.dtype not in FORMATS:
            return
        found = fast.lost(part, LIVE)
        if found is not None and found[2] < FORMATS[self._spec.dtype].nonfinite:
            self.meter.count(*found[:2])
            return
        for piece in part.chunks(1 << 18):
            self.meter.add(piece.tensor, torch.zeros_like(piece.tensor, dtype=torch.bool))
            self.at_odd(piece.tensor)

    def at_odd(self, values: Tensor) -> None:
        """Counts NaN and infinities."""
        self._nonfinite += int((magnitude_key(values) >= FORMATS[self._spec.dtype].nonfinite).sum())

    def found(self) -> Counted:
        """What was counted."""
        m = self.meter.total(identity)
        return Counted(m.zeros, m.threshold, self._nonfinite)


def _raw(store: CheckpointStore, file: str, start: int, stop: int) -> Iterator[memoryview]:
    path, step = store.folder / file, 4 << 20
    with disk.opened(path) as fd:
        for at in range(start, stop, step):
            room = bytearray(min(step, stop - at))
            read_whole(fd, path, memoryview(room), at)
            yield memoryview(room)
