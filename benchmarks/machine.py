"""The machine a number was measured on, how busy it was, and the peak memory of a process."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from secateur import native
from secateur.runtime import machine as machines
from secateur.runtime.machine import STATUS, processor, resident_bytes

REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Machine(machines.Machine):
    """What a timing depends on; ``load`` is the number of processes that wanted a core, just before and just after."""

    python: str
    load: tuple[float, float]

    def __str__(self) -> str:
        return f"{super().__str__()}, Python {self.python}, load {self.load[0]:.1f} before and {self.load[1]:.1f} after"


def machine(load_before: float) -> Machine:
    """This machine, now."""
    return Machine(
        processor(), os.cpu_count() or 1, torch.get_num_threads(), native.isa() if native.available() else "none",
        torch.__version__, platform.python_version(), (load_before, load()),
    )  # fmt: skip


def load() -> float:
    """Processes that want a core, averaged over the last minute."""
    return os.getloadavg()[0]


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    if STATUS.exists():  # getrusage would say the parent's peak where that was larger
        line = next(x for x in STATUS.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Lets `peak_bytes` start anew from what is held now; ``False`` where the system cannot."""
    try:
        REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def held_bytes() -> int:
    """The memory this process holds now; its peak where the system does not tell."""
    return resident_bytes() or peak_bytes()


def available_bytes() -> int | None:
    """Memory that can be had without swapping, or ``None`` where the system does not tell."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    line = next(x for x in info.read_text(encoding="utf-8").splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
