"""What the README shows runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from tests.guard.source import ROOT, text

BLOCKS = re.findall(r"```python\n(.*?)```", text(ROOT / "README.md"), re.S)


def given() -> dict[str, Any]:
    """The names the README takes for granted."""
    trunk = (nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64))
    model = nn.Sequential(*trunk)
    model.add_module("lm_head", nn.Linear(64, 8))
    batch = torch.randn(2, 4, 8, 8)
    return {
        "secateur": secateur,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "state_dict": {"layer.weight": torch.randn(8, 8) / 100},
        "example_input": batch,
        "loader": [batch, batch],
        "batches": [torch.randn(64, 4, 8, 8) for _ in range(10)],  # more than the features of any layer
        "evaluate": lambda m: float((m(batch).argmax(1) == 0).float().mean()),
    }


def test_there_is_something_to_run() -> None:
    assert any("secateur.prune(model, 0.9)" in block for block in BLOCKS)


# What packing gains is a matter of the processor, and a model as small as this one gains nothing on any.
@pytest.mark.filterwarnings("ignore:.*dense:secateur.SecateurWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_it_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = given()
    exec(compile(block, "README.md", "exec"), names)
    assert 0.89 < secateur.inspect(names["model"]).sparsity < 0.91
    assert "state_dict" not in block or names["state_dict"]["layer.weight"].eq(0).any()
