"""The test network on disk: one file, and a folder of shards as hubs hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARDS = ("model-00003-of-00003", "model-00001-of-00003", "model-00002-of-00003")


def save_one(state: Mapping[str, Tensor], folder: Path) -> Path:
    """One safetensors file."""
    path = folder / "model.safetensors"
    save_file({n: t.contiguous() for n, t in state.items()}, path, metadata={"format": "pt"})
    return path


def save_shards(state: Mapping[str, Tensor], folder: Path) -> Path:
    """A folder of three shards whose order is not that of the names, layers torn apart, with index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {n: f"{SHARDS[i % 3]}.safetensors" for i, n in enumerate(sorted(state, reverse=True))}
    for file in sorted(set(table.values())):
        part = {n: t.contiguous() for n, t in state.items() if table[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "test"}')
    return folder


def load(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or folder, read by the safetensors package."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    out: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            out |= {name: f.get_tensor(name) for name in f.keys()}
    return out
