"""What is measured while a cell is made: digests of what it began with, sizes, FLOPs, seconds and memory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.evaluate.flops import count_flops
from secateur.report.run_facts import most
from secateur.train.randomness import get_random, set_random

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Taken:
    """What a stretch of work took.

    Attributes:
        seconds, peak: wall time, and the most memory in bytes (``None`` where the system does not tell).
        batch: digest of the first batch it trained on.
        whole: whether every update that was asked for was made.
    """

    seconds: float = 0.0
    peak: int | None = None
    batch: str = ""
    whole: bool = True


class Meter:
    """Measures what is done inside it; goes on from what an earlier stretch took."""

    def __init__(self, device: torch.device, before: Taken | None = None) -> None:
        self._device, self._taken = device, before or Taken()
        self._since: float | None = None
        self._peak_known = False

    def __enter__(self) -> Meter:
        self._peak_known = _forget_peak(self._device)
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._taken, self._since = self.taken, None

    @property
    def taken(self) -> Taken:
        """What was taken so far."""
        if self._since is None:
            return self._taken
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = self._taken.seconds + time.perf_counter() - self._since
        peak = _peak(self._device) if self._peak_known else None
        return replace(self._taken, seconds=seconds, peak=most(self._taken.peak, peak))

    def note(self, batch: Any) -> None:
        """Remembers the first batch."""
        if not self._taken.batch:
            self._taken = replace(self._taken, batch=digest(batch))


def _forget_peak(device: torch.device) -> bool:
    """Lets the peak begin anew; whether that can be done here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        PEAK.write_text("5", "ascii")
    except OSError:
        return False
    return STATUS.exists()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(x for x in STATUS.read_text("utf-8").splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def digest(what: Any) -> str:
    """A short hash of all tensors and words in a batch, a state, or settings; sixteen hexadecimal digits.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2)}) != digest({"a": torch.zeros(3)})
    True
    """
    found = hashlib.blake2b(digest_size=8)
    for part in _parts(what):
        found.update(part)
    return found.hexdigest()


def _parts(what: Any) -> Iterable[Any]:
    if isinstance(what, Tensor):
        yield f"{what.dtype} {tuple(what.shape)};".encode()
        yield what.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(what, Mapping):
        for key in sorted(what, key=str):
            yield f"{key}:".encode()
            yield from _parts(what[key])
    elif isinstance(what, list | tuple):
        for part in what:
            yield from _parts(part)
    elif isinstance(what, str | int | float | None):
        yield f"{what!r};".encode()


def example_of(data: Any) -> Any:
    """One example to count FLOPs with: what the data has as ``example``, else the first of its test part; ``None`` if neither."""
    found = getattr(data, "example", None)
    if found is None:
        before = get_random()  # a DataLoader draws from the common generator as soon as it is looked into
        found = _first(getattr(data, "test", None))
        set_random(before)
    return found


def _first(test: Any) -> Any:
    if not isinstance(test, tuple) or len(test) != 2 or not isinstance(test[0], Tensor):
        test = next(iter(test), None) if isinstance(test, Iterable) else None
    if isinstance(test, Mapping):
        return {k: v[:1] for k, v in test.items() if k != "labels" and isinstance(v, Tensor)}
    if isinstance(test, list | tuple) and test and isinstance(test[0], Tensor):
        return test[0][:1]
    return None


def flops_of(model: nn.Module, example: Any) -> tuple[int | None, int | None]:
    """FLOPs of one example, all and effective; ``None`` where they cannot be counted."""
    if example is None:
        return None, None
    try:
        found = count_flops(model, example)
    except (
        Exception
    ):  # a model may take examples of its own kind, and a run is not lost for that: the comparison says so
        return None, None
    return found.total, found.effective
