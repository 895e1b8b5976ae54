"""Promise 10, as far as it goes today: killed at any moment, the old output or the new one is there, whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.disk import save_one, save_shards
from tests.guard.source import ROOT


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_every_file_operation(kind: str, tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.arange(1.0, 9).view(2, 4) for n in ("a", "b", "c")}
    source = save_one(state, tmp_path) if kind == "file" else save_shards(state, tmp_path / "in")
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.killed", str(source), str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for mode, seen in json.loads(done.stdout).items():
        assert (seen["old"] == "") == (mode == "new")
        whole(seen, 8 if kind == "file" else 15)


def whole(seen: dict[str, Any], least: int) -> None:
    """Old until one moment, new from then on; the source never touched; at least so many moments."""
    assert seen["new"] not in ("", seen["old"])
    assert seen["endings"][-1] == 0
    assert set(seen["endings"][:-1]) == {-signal.SIGKILL}
    assert len(seen["endings"]) > least
    for n, result, kept, _ in seen["left"]:
        assert result in (seen["old"], seen["new"]), n
        assert kept == seen["source"], n
    results = [result for _, result, _, _ in seen["left"]]
    assert results == sorted(results, key=[seen["old"], seen["new"]].index)
    assert seen["left"][-1][3] == 0  # nothing stays beside a result that was not disturbed
