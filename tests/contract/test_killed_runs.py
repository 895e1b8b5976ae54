"""Promises 7 and 10 of a whole run: killed with SIGKILL over and over, and resumed, it ends with the bytes of one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guard.source import ROOT

NAMES_THE_FOLDER = {"run.json", "report.html"}
SECONDS = ("taken.json", "costs.json")
KILLED = -signal.SIGKILL


def endings(root: Path, fork: bool, kills: int | None, seed: int = 0, jobs: int = 1) -> list[list[int]]:
    """Runs left alone into the folder ``0``, and killed into the others; how the processes of each ended."""
    how = json.dumps({"fork": fork, "kills": kills, "seed": seed, "jobs": jobs})
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.killed_runs", root, how],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[int]] = json.loads(done.stdout)
    assert found[0] == [0], done.stderr
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too; nothing of those whose text has the folder's name, or seconds, in it."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    empty = {name for name, p in found.items() if p.name in NAMES_THE_FOLDER or name.endswith(SECONDS)}
    return {name: b"" if name in empty else p.read_bytes() for name, p in found.items()}


def the_same(root: Path, folders: int) -> None:
    whole = files(root / "0")
    assert {"results.json", "export/weights.safetensors", "seed-0/tickets/control-02-random/round.json"} <= whole.keys()
    for number in range(1, folders):
        found = files(root / str(number))
        assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
        assert [name for name in whole if found[name] != whole[name]] == []


@pytest.mark.parametrize("fork", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_killed_twenty_times_at_random_moments(fork: bool, tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"the seed of the moments: {seed}")  # shown where this fails
    found = endings(tmp_path, fork, 20, seed)
    assert sum(ending.count(KILLED) for ending in found[1:]) == 20
    assert all(ending[-1] == 0 and set(ending[:-1]) <= {KILLED} for ending in found[1:])
    the_same(tmp_path, len(found))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_with_workers_at_random_moments(tmp_path: Path) -> None:
    seed = time.time_ns()
    print(f"the seed of the moments: {seed}")
    found = endings(tmp_path, False, 6, seed, jobs=2)
    assert sum(ending.count(KILLED) for ending in found[1:]) == 6 and all(ending[-1] == 0 for ending in found[1:])
    the_same(tmp_path, len(found))


@pytest.mark.slow
def test_killed_at_one_file_operation_after_another(tmp_path: Path) -> None:
    found = endings(tmp_path, True, None)
    assert len(found[1]) > 40 and set(found[1][:-1]) == {KILLED} and found[1][-1] == 0
    the_same(tmp_path, 2)
