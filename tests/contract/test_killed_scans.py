"""Promises 7 and 10 of a sensitivity scan: killed over and over, and taken up, it ends with the bytes of one left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.guard.source import ROOT
from tests.unit.conftest import tree

KILLED = -signal.SIGKILL


def test_killed_in_measurements_and_at_file_operations(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.killed_scans", tmp_path],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measuring, writing = json.loads(done.stdout)
    assert measuring == [KILLED] * 4 + [0]  # one cell more each time: the dense network and four others
    assert len(writing) > 10 and writing[-1] == 0 and set(writing[:-1]) == {KILLED}
    whole = tree(tmp_path / "0")
    assert len(whole) == 9  # the cells, the lock, the settings, the result, the page
    assert tree(tmp_path / "1") == whole and tree(tmp_path / "2") == whole
