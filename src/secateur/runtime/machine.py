"""The machine that something was measured on: what its timings depend on, its cache, the memory of this process."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur import native
from secateur.native import products

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
INFO = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
USUAL_CACHE = 32 << 20
"""The size of the last-level cache where the system does not tell."""


def cache_bytes() -> int:
    """Bytes of the last-level cache."""
    found = [p.read_text(encoding="ascii").strip() for p in sorted(CACHES.glob("index*/size"))]
    sizes = [int(s[:-1]) << {"K": 10, "M": 20, "G": 30}[s[-1]] for s in found if s[-1:] in "KMG" and s[:-1].isdigit()]
    return max(sizes, default=USUAL_CACHE)


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
