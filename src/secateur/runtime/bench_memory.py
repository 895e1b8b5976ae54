"""The memory of a process that holds a checkpoint's tensors, dense or packed: measured in a process that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from secateur.core.layouts import Layout, arrange
from secateur.stores.checkpoint import CheckpointStore

from .bench_sources import matrices
from .machine import resident_bytes

_RUN = (
    "import json, sys\n"
    "from secateur.runtime.bench_memory import held\n"
    "print(json.dumps(held(*json.loads(sys.stdin.read()))))"
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
    """Measures both, each in a fresh process; ``None`` where the system does not tell."""
    if resident_bytes() is None:
        return None
    return Memory(_call(path, {}), _call(path, layouts))


def _call(path: str, layouts: Mapping[str, Layout | None]) -> int:
    told = json.dumps([path, {name: la for name, la in layouts.items() if la is not None}])
    done = subprocess.run([sys.executable, "-c", _RUN], input=told, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed ({done.returncode}):\n{done.stderr[-2000:]}")
    found: int = json.loads(done.stdout.splitlines()[-1])
    return found


def held(path: str, layouts: Mapping[str, Layout]) -> int:
    """Bytes that holding all tensors of a checkpoint takes, those that are named in a layout; in this process."""
    store = CheckpointStore(path)
    before = resident_bytes()
    kept: list[tuple[Tensor, ...]] = []
    packed = {m.name: m for m in matrices(path) if m.name in layouts}
    for spec in store.specs():
        if spec.name in packed:
            kept.append(arrange(packed[spec.name].load(), layouts[spec.name]))
        else:
            kept.append(tuple(p.tensor for p in store.parts(spec, "whole")))
    after = resident_bytes()
    assert before is not None and after is not None
    return after - before
