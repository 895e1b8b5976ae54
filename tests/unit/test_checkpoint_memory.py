"""A checkpoint is read in pieces, whatever is asked; a tensor at a time where a function asks for whole ones."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
import secateur.carry_files  # which holds on to the store's class
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


PIECE = 1 << 14


class Watched(CheckpointStore):
    """Notes with every piece how many bytes of what it has read are still held, by anyone."""

    most = 0

    def parts(self, spec: Spec, align: Align) -> Iterator[Part]:
        read_here = [tracemalloc.Filter(True, f.__file__) for f in (safetensors_file, checkpoint)]
        for part in super().parts(spec, align):
            held = tracemalloc.take_snapshot().filter_traces(read_here).statistics("filename")
            Watched.most = max(Watched.most, sum(h.size for h in held))
            yield part


@pytest.mark.parametrize("what", ASKED)
def test_some_pieces_are_in_memory_at_a_time(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a file is Python's own memory, which it can measure."""
    g = torch.Generator().manual_seed(0)
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    state = {n: torch.randn(SHAPE, generator=g) for n in NAMES}
    save_file(state, path)
    monkeypatch.setattr(checkpoint, "_SHARES", checkpoint.MEMORY // PIECE)
    monkeypatch.setattr(checkpoint, "CheckpointStore", Watched)
    monkeypatch.setattr(Watched, "most", 0)
    tracemalloc.start()
    try:
        secateur.prune(path, **ASKED[what], out=out)
    finally:
        tracemalloc.stop()
    assert PIECE <= Watched.most < (3 * ONE if what == "random" or "function" in what else ONE + 4 * PIECE)
    secateur.prune(state, **ASKED[what])
    assert all(torch.equal(t, state[n]) for n, t in load_file(out).items())
