"""A checkpoint is read one tensor at a time, whatever is asked."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import secateur
from secateur.core.types import Align, Part, Spec
from secateur.stores import checkpoint, safetensors_file
from secateur.stores.checkpoint import CheckpointStore

NAMES = [f"{i}.weight" for i in range(12)]
SHAPE = (64, 256)
ONE = 4 * 64 * 256
"""Bytes of one tensor; there are twelve."""

ASKED: dict[str, dict[str, Any]] = {
    "magnitude": {"sparsity": 0.5},
    "threshold": {"threshold": 0.5},
    "uniform": {"sparsity": 0.5, "allocation": "uniform"},
    "erk": {"sparsity": 0.5, "allocation": "erk"},
    "lamp": {"sparsity": 0.5, "allocation": "lamp"},
    "caps": {"sparsity": 0.5, "max_sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "channel": {"sparsity": 0.5, "pattern": "channel"},
    "4x4": {"sparsity": 0.5, "pattern": "4x4", "allocation": "uniform"},
    "random": {"sparsity": 0.5, "criterion": "random"},
    "a function": {"sparsity": 0.5, "criterion": lambda weight: weight.square()},
    "a function, 2:4": {"pattern": "2:4", "criterion": lambda weight: weight.square()},
    "a function, channel": {"sparsity": 0.5, "pattern": "channel", "criterion": lambda weight: weight.square()},
}


class Watched(CheckpointStore):
    """Notes after every read how many bytes of what it has read are still held, by anyone."""

    most = 0

    def parts(self, spec: Spec, align: Align) -> Iterable[Part]:
        found = super().parts(spec, align)
        read_here = tracemalloc.Filter(True, safetensors_file.__file__)
        held = tracemalloc.take_snapshot().filter_traces([read_here]).statistics("filename")
        Watched.most = max(Watched.most, sum(h.size for h in held))
        return found


@pytest.mark.parametrize("what", ASKED)
def test_one_tensor_is_in_memory_at_a_time(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two while one takes the other's place. What is read of a file is Python's own memory, which it can measure."""
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({n: torch.randn(SHAPE, generator=g) for n in NAMES}, path)
    monkeypatch.setattr(checkpoint, "CheckpointStore", Watched)
    monkeypatch.setattr(Watched, "most", 0)
    tracemalloc.start()
    try:
        secateur.prune(path, **ASKED[what], out=tmp_path / "out.safetensors")
    finally:
        tracemalloc.stop()
    assert ONE <= Watched.most < 3 * ONE
