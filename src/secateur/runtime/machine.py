"""The machine that something was measured on: what its timings depend on, its cache, the memory of this process."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from secateur import native
from secateur.native import products

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
INFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
USUAL_CACHE, USUAL_CORE_CACHE = 32 << 20, 1 << 20
"""The sizes of the last-level cache and of the second level where the system does not tell."""


def cache_bytes() -> int:
    """Bytes of the last-level cache."""
    return max(_caches(), default=USUAL_CACHE)


def core_cache_bytes() -> int:
    """Bytes of the second-level cache, which a core has for itself."""
    return next(iter(_caches()), USUAL_CORE_CACHE)


def _caches() -> list[int]:
    """Sizes of the caches of one core that hold data, those of other levels than the first, ascending."""
    found = {}
    for place in sorted(CACHES.glob("index*")):
        level, text = (_text(place / name) for name in ("level", "size"))
        if level.isdigit() and int(level) > 1 and text[-1:] in tuple("KMG") and text[:-1].isdigit():
            found[int(level)] = int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    return [found[level] for level in sorted(found)]


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


@dataclass(frozen=True)
class Machine:
    """What a timing depends on."""

    processor: str
    cores: int
    threads: int
    kernels: str
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.processor}, {self.cores} cores, {self.threads} threads, kernels {self.kernels}, torch {self.torch}"
        )


def machine() -> Machine:
    """This machine, now."""
    kernels = products.isa() if native.available() else "none"
    return Machine(processor(), os.cpu_count() or 1, torch.get_num_threads(), kernels, torch.__version__)


@cache
def processor() -> str:
    """The processor's name."""
    if INFO.exists():
        for line in INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resident_bytes() -> int | None:
    """Memory this process holds; ``None`` where the system does not tell."""
    if not STATUS.exists():
        return None
    line = next(x for x in STATUS.read_text(encoding="utf-8").splitlines() if x.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024
