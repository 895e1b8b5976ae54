"""The memory of a process that holds a checkpoint's tensors, dense or packed: measured in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.lay_out import arranged
from secateur.core.layouts import LAYOUTS, Layout, Parts

from .bench_sources import opened
from .machine import resident_bytes

_RUN = (
    "import json, sys\n"
    "from secateur.runtime.bench_memory import both\n"
    "print(json.dumps(both(*json.loads(sys.stdin.read()))))"
)


@dataclass(frozen=True)
class Memory:
    """Bytes that a process held more with the tensors of a checkpoint than before, measured.

    Attributes:
        dense: all tensors, as they are stored.
        packed: the same with the layers packed.
    """

    dense: int
    packed: int


def resident(path: str, layouts: Mapping[str, Layout | None]) -> Memory | None:
    """Measures both, in a fresh process; ``None`` where the system does not tell.

    Args:
        path: of a checkpoint.
        layouts: for each layer its layout, or ``None`` where it stays dense.
    """
    if resident_bytes() is None:
        return None
    told = json.dumps([path, {name: la for name, la in layouts.items() if la is not None}])
    done = subprocess.run([sys.executable, "-c", _RUN], input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return Memory(*json.loads(done.stdout.splitlines()[-1]))


def both(path: str, layouts: Mapping[str, Layout]) -> tuple[int, int]:
    """Bytes that holding the tensors of a checkpoint takes in this process, dense and packed."""
    for layout in LAYOUTS:
        arranged(torch.eye(64), layout)  # so that code that is loaded late is there before anything is measured
    packed = _held(path, layouts)
    return _held(path, {}), packed


def _held(path: str, layouts: Mapping[str, Layout]) -> int:
    before = _now()
    found = opened(path)
    kept: list[Parts | Tensor] = [m.parts(layouts[m.name]) if m.name in layouts else m.load() for m in found.matrices]
    kept += [load() for load in found.others]
    return _now() - before


def _now() -> int:
    """What this process holds, without what it has freed and the allocator keeps for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    found = resident_bytes()
    assert found is not None
    return found
