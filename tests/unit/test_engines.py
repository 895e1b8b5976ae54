"""Where jobs run: the same results from all, in order, and what goes wrong in a worker is told here."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from secateur.engines.spread import Engine, spread
from secateur.errors import BadInput, SecateurError, SecateurWarning
from tests.guard.source import ROOT

HERE = "tests.unit.test_engines"
RAY = pytest.param("ray", marks=pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed"))


def square(n: int) -> tuple[int, str]:
    if n == 3:
        warnings.warn("three was asked for", SecateurWarning, stacklevel=1)
    if n < 0:
        raise BadInput(f"{n} is below zero")
    time.sleep(0.05 * (n == 1))  # later jobs are done before it
    return n * n, str(Path.cwd())


def dies(n: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("engine", ["serial", "processes", RAY])
def test_results_come_in_the_order_of_the_jobs_up_to_what_one_raises(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = spread(square, [[1, 2, 3], [4, -1, 6]], engine, 2)
    with pytest.warns(SecateurWarning, match="three was asked for"):
        assert [next(found) for _ in range(4)] == [(n, str(tmp_path)) for n in (1, 4, 9, 16)]
    with pytest.raises(BadInput, match="-1 is below zero"):
        next(found)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(SecateurError, match=r"ended from outside.*; what was finished before is kept"):
        list(spread(dies, [[1, 2]], "processes", 2))


def test_what_cannot_be_meant_is_refused() -> None:
    for engine, workers in (("threads", 2), ("processes", 0)):
        with pytest.raises(BadInput, match="jobs run 'serial'"):
            list(spread(square, [[1]], engine, workers))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_says_what_to_install() -> None:
    with pytest.raises(BadInput, match=r"pip install 'secateur\[ray\]'"):
        list(spread(square, [[1]], "ray", 2))


def slow(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.slow
def test_workers_do_not_outlive_who_began_them(tmp_path: Path) -> None:
    begin = (
        f"from secateur.engines.spread import spread; from {HERE} import slow\n"
        f"if __name__ == '__main__': list(spread(slow, [[{str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}]], 'processes', 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", begin], cwd=ROOT)
    numbers = [int(_eventually(tmp_path / name)) for name in "ab"]
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not any(Path(f"/proc/{n}").exists() for n in numbers):
            return
        time.sleep(0.05)
    pytest.fail("a worker is still there")


def _eventually(path: Path) -> str:
    for _ in range(1000):
        if path.exists() and (found := path.read_text()):
            return found
        time.sleep(0.05)
    pytest.fail(f"{path} was not written")
