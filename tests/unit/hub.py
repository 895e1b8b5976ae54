"""Checkpoints on disk as people have them, and as nobody should."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur

WEIGHTS = {"conv.weight": (8, 4, 3, 3), "fc.weight": (6, 8)}


def state() -> dict[str, Tensor]:
    """Weights, and everything else that lies in real files beside them."""
    g = torch.Generator().manual_seed(0)
    return {
        **{n: torch.randn(s, generator=g) for n, s in WEIGHTS.items()},
        "conv.bias": torch.randn(8, generator=g),
        "norm.weight": torch.randn(8, generator=g), "norm.running_mean": torch.zeros(8),
        "norm.num_batches_tracked": torch.tensor(7),
        "embed_tokens.weight": torch.randn(10, 8, generator=g).bfloat16(),
        "mask": torch.ones(3, dtype=torch.bool), "empty": torch.empty(0, 4), "scale": torch.tensor(2.0),
        "fft": torch.randn(2, 2, dtype=torch.complex64),
        "half.weight": torch.randn(4, 8, generator=g).half(),
        "tiny.weight": torch.randn(4, 4, generator=g).to(torch.float8_e4m3fn),
    }  # fmt: skip


def one_file(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    path = folder / "model.safetensors"
    save_file(dict(tensors or state()), path, metadata={"format": "pt", "note": "kept"})
    return path


def hub_folder(folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A sharded model as hubs hold it, with everything that lies beside the weights."""
    folder.mkdir(parents=True)
    tensors = state() if tensors is None else tensors
    names = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    table = {n: names[i % 2] for i, n in enumerate(tensors)}
    for file in set(table.values()):
        save_file({n: t for n, t in tensors.items() if table[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"x": 1}, "weight_map": table}))
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json", "README.md", "modeling_own.py"):
        (folder / name).write_text(f"content of {name}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """(length of the header with its 8 bytes, the header)."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return 8 + size, json.loads(raw[8 : 8 + size])


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file by hand, whatever its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(error: type[Exception], text: str, source: Path, out: Path, root: Path, **options: Any) -> None:
    """The call raises, and nothing below ``root`` has changed."""
    before = tree(root)
    with pytest.raises(error, match=text):
        secateur.prune(source, 0.5, out=out, **options)
    assert tree(root) == before
