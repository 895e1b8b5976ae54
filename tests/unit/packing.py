"""Pruned weights to pack, a packed file that is as it should be, and ways to change it into one that is not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur.core.packed import Encoding
from secateur.runtime.files import save_packed
from secateur.stores.safetensors_file import PACKED
from tests.unit.hub import state

with_zstd = pytest.mark.skipif(importlib.util.find_spec("zstandard") is None, reason="zstandard is not installed")
codecs = pytest.mark.parametrize("codec", [None, pytest.param("zstd", marks=with_zstd)])

Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
"""Changes the tensors of a file, or the JSON that describes them."""


def pruned() -> dict[str, Tensor]:
    """What lies in real files, and a matrix that each encoding is the smallest for."""
    g = torch.Generator().manual_seed(1)
    more = {
        "mask.weight": torch.randn(64, 43, generator=g), "lean.weight": torch.randn(64, 200, generator=g).bfloat16(),
        "pairs.weight": torch.randn(32, 64, generator=g), "full.weight": torch.randn(40, 40, generator=g),
        "kernel.weight": torch.randn(16, 8, 3, 3, generator=g).half(), "none.weight": torch.zeros(64, 64),
    }  # fmt: skip
    for name, share in (("mask.weight", 0.5), ("lean.weight", 0.98), ("kernel.weight", 0.8)):
        secateur.prune(more[name], share)
    secateur.prune(more["pairs.weight"], pattern="2:4")
    return {**state(), "fft": torch.randn(2, 2, generator=g, dtype=torch.complex64), **more}


ENCODED: dict[str, Encoding] = {
    "mask.weight": "bitmask", "lean.weight": "csr-u16", "pairs.weight": "2:4", "kernel.weight": "bitmask",
    "none.weight": "bitmask",
}  # fmt: skip
"""How those of `pruned` lie that gain by it; nothing at all is in ``none.weight``."""


def bits_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """What must not change of tensors."""
    return {n: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as f:
        return dict(f.metadata() or {})


def facts_of(path: Path) -> dict[str, Any]:
    """What the JSON of a packed file says of its tensors."""
    tensors: dict[str, Any] = json.loads(metadata_of(path)[PACKED])["tensors"]
    return tensors


def valid(folder: Path, codec: str | None = None) -> Path:
    """A packed file with every encoding in it."""
    path = folder / "packed.safetensors"
    keep = ("fc.weight", "scale", *ENCODED)
    save_packed({n: t for n, t in pruned().items() if n in keep}, path, codec=codec)
    return path


def changed(path: Path, change: Change) -> Path:
    """A packed file with a lie in it: whole safetensors, which says something else than it holds."""
    tensors, metadata = load_file(path), metadata_of(path)
    facts = json.loads(metadata[PACKED])
    change(tensors, facts)
    bad = path.with_name("bad.safetensors")
    save_file(tensors, bad, metadata={**metadata, PACKED: json.dumps(facts)})
    return bad
