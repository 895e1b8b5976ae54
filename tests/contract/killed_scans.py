"""Scans a network to the end, and again with kills on the way; prints how each process ended.

A program of its own: it forks children that end by SIGKILL at their n-th file operation, or in the middle of a measurement.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from secateur.evaluate.sensitivity import sensitivity
from tests.contract.killed import deadly, in_child


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def scan(folder: Path, calls: int | None) -> None:
    """A scan, killed at so many calls of evaluate if it is not at its end by then."""
    model, x, made = network(), torch.randn(16, 8), 0
    before = model(x).detach()

    def evaluate(m: nn.Module) -> dict[str, float]:
        nonlocal made
        made += 1
        if made == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"mse": float((m(x) - before).square().mean())}

    sensitivity(model, evaluate, (0.5, 0.9), folder=folder)


def at_operation(folder: Path, number: int) -> None:
    deadly(number)
    scan(folder, None)


def until_done(begin: partial[None] | None, folder: Path) -> list[int]:
    """Child after child, the n-th killed at its n-th file operation, or in its second measurement; how each ended."""
    endings: list[int] = []
    while not endings or endings[-1] == -signal.SIGKILL:
        work = partial(scan, folder, 2) if begin is None else partial(begin, folder, len(endings) + 1)
        endings.append(in_child(work))
    return endings


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    scan(root / "0", None)
    print(json.dumps([until_done(None, root / "1"), until_done(partial(at_operation), root / "2")]))
