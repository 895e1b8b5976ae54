"""The command line, run in this process, and checkpoints for it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.cli import app as cli

NAMES = ["fc1.weight", "fc2.weight"]


class Done(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


Run = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in this process, exit codes and all."""

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, args)])
        capsys.readouterr()
        code = 0
        with warnings.catch_warnings():
            try:
                cli.run()
            except SystemExit as e:
                code = int(e.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "emb.weight": torch.randn(10, 8, generator=g), "fc1.weight": torch.randn(12, 8, generator=g),
        "fc1.bias": torch.randn(12, generator=g), "fc2.weight": torch.randn(4, 12, generator=g),
    }  # fmt: skip


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A sharded model with a config, a tokenizer, and the same weights in another format."""
    path = tmp_path / "hub"
    path.mkdir()
    table = {n: f"model-0000{1 + i // 2}-of-00002.safetensors" for i, n in enumerate(tensors())}
    for shard in set(table.values()):
        save_file({n: t for n, t in tensors().items() if table[n] == shard}, path / shard, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (path / name).write_text(name)
    (path / "pytorch_model.bin").write_bytes(b"unpruned")
    return path


def tree(where: Path) -> dict[str, bytes]:
    return {str(p.relative_to(where)): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file()}


def zeros(found: Mapping[str, Tensor]) -> int:
    return sum(int((found[n] == 0).sum()) for n in NAMES)
