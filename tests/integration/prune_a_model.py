"""Prunes a small model in several ways and prints a digest of each mask, as JSON.

Run as a program of its own, so that a test can compare builds and settings of the package from outside.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

import secateur

WAYS: dict[str, dict[str, Any]] = {
    "global": {"sparsity": 0.9},
    "uniform": {"sparsity": 0.7, "allocation": "uniform"},
    "lamp": {"sparsity": 0.8, "allocation": "lamp"},
    "2:4": {"pattern": "2:4"},
    "4x4": {"sparsity": 0.5, "pattern": "4x4"},
    "threshold": {"threshold": 0.02},
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def model(dtype: torch.dtype) -> nn.Module:
    """The same weights in every process; the last layer has ties and zeros in any dtype."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 128), nn.Linear(128, 32))
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=0.05)
        net[-1].weight.copy_(net[-1].weight.round(decimals=2))
    return net.to(dtype)


def digest(masks: dict[str, torch.Tensor]) -> str:
    """One hash of all masks, bit for bit."""
    h = hashlib.sha256()
    for name, mask in sorted(masks.items()):
        h.update(f"{name} {tuple(mask.shape)} ".encode())
        h.update(mask.contiguous().numpy().tobytes())
    return h.hexdigest()


def results() -> dict[str, str]:
    """``"dtype way" -> digest`` of the masks each way of pruning leaves."""
    found = {}
    for dtype in DTYPES:
        for way, options in WAYS.items():
            pruned = model(dtype)
            report = secateur.prune(pruned, **options)
            assert report.zeros > 0
            found[f"{dtype} {way}"] = digest(secateur.masks(pruned))
    return found


if __name__ == "__main__":
    from secateur import native

    print(json.dumps({"native": native.available(), "file": secateur.__file__, "masks": results()}))
