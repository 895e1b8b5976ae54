"""Ratios of whole `secateur.prune` calls to one native read pass: ``python -m benchmarks.quick bfloat16``.

The candidates take turns on the same 115 M weights in 110 tensors; minimum and median of five rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import secateur
from secateur import native

CASES: dict[str, dict[str, Any]] = {
    "global": {"sparsity": 0.9},
    "uniform": {"sparsity": 0.9, "allocation": "uniform"},
    "2:4": {"pattern": "2:4"},
    "lamp": {"sparsity": 0.9, "allocation": "lamp"},
}


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(dtype: torch.dtype, rounds: int = 5) -> None:
    """Measures and prints one line a case."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"l{i:03d}.weight": (torch.randn(1024, 1024, generator=generator) * (0.02 + 0.0005 * i)).to(dtype)
        for i in range(110)
    }
    work = {name: w.clone() for name, w in weights.items()}
    passes: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(rounds):
        passes.append(seconds(lambda: [native.scan(w) for w in weights.values()]))
        for name, asked in CASES.items():
            for key, w in weights.items():
                work[key].copy_(w)
            times[name].append(seconds(lambda asked=asked: secateur.prune(work, **asked)))
    print(f"{dtype}: read pass {min(passes) * 1e3:.1f} ms (median {median(passes) * 1e3:.1f})")
    for name, found in times.items():
        print(f"{name:8} {min(found) / min(passes):6.2f} (medians {median(found) / median(passes):.2f})")


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "float32"))
