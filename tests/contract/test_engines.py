"""Promise 2, of engines: one mask, and one folder to the byte, whoever works on it and in however small pieces."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import secateur
from secateur import carry_files, carry_stage
from secateur.engines.spread import spread
from secateur.engines.sums import Ledger
from secateur.errors import SecateurError, SecateurWarning
from secateur.stores import checkpoint
from secateur.stores.verify import verify
from tests.contract import engine_cases
from tests.contract.disk import load, save_shards
from tests.contract.engine_cases import CASES, FLAG, cut_into, prune
from tests.contract.nets import CHOSEN, bits, net, tensors
from tests.guard.source import ROOT

QUICK = ("lamp", "channel")


def source(folder: Path) -> Path:
    """Three shards of different dtypes, with ties and zeros."""
    return save_shards(tensors(net("mixed", "ties")), folder / "in")


def mask_hash(state: dict[str, Tensor]) -> str:
    """One hash of where the zeros are."""
    masks = [bits(state[n].float() != 0) for n in CHOSEN]
    return hashlib.sha256(b"".join(masks)).hexdigest()


@cache
def of_the_module(case: str) -> str:
    model = net("mixed", "ties")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        secateur.prune(model, **CASES[case])
    return mask_hash(tensors(model))


def files_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def whole(out: Path, case: str, like: Path | None = None) -> None:
    """The mask of the module, as the manifest says, and the bytes of another result."""
    assert mask_hash(load(out)) == of_the_module(case)
    assert not verify(out).wrong
    if like is not None:
        assert files_of(out) == files_of(like)
    assert [p.name for p in out.parent.glob(".*")] == []


@pytest.mark.parametrize("case", CASES)
def test_memory_changes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as a whole, and in pieces of a few hundred bytes and of a dozen."""
    given, first = source(tmp_path), None
    for memory, shares in (("1GiB", 32), ("32MiB", cut_into(200)), ("32MiB", cut_into(24))):
        monkeypatch.setattr(checkpoint, "_SHARES", shares)
        out = tmp_path / f"out{shares}"
        prune(given, out, case, memory=memory)
        whole(out, case, first)
        first = first or out


@pytest.mark.parametrize("case", CASES)
def test_sharing_the_files_changes_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that count each in its own files: threads here, which begin at once."""
    given = source(tmp_path)
    prune(given, tmp_path / "one", case)
    monkeypatch.setattr(carry_files, "together", in_threads)
    monkeypatch.setattr(carry_stage, "spread", lambda function, stages, engine, workers: spread(function, stages))
    monkeypatch.setattr(checkpoint, "_SHARES", cut_into(100))
    for workers in (2, 3, 5):
        prune(given, tmp_path / str(workers), case, engine="processes", workers=workers)
        whole(tmp_path / str(workers), case, tmp_path / "one")


def in_threads(function: Callable[..., Any], workers: int) -> Any:
    """`secateur.engines.sums.together`, in threads."""
    ledger, new, seen = Ledger(workers), threading.Condition(), [0] * workers

    def work(worker: int) -> Any:
        def add(counts: Tensor) -> Tensor:
            number = seen[worker]
            seen[worker] += 1
            with new:
                if ledger.add(number, worker, counts) is None:
                    assert new.wait_for(lambda: len(ledger.sums) > number, timeout=30)
                new.notify_all()
                return ledger.sums[number].clone()

        return function(worker, workers, add)

    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(work, range(workers)))
    assert len({plan.digest() for plan, _ in found}) == 1
    return found[0]


@pytest.mark.parametrize("case", [c if c in QUICK[:1] else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_processes(case: str, tmp_path: Path) -> None:
    given = source(tmp_path)
    prune(given, tmp_path / "one", case)
    prune(given, tmp_path / "two", case, engine="processes", workers=2)
    whole(tmp_path / "two", case, tmp_path / "one")


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_ranks(world: int, tmp_path: Path) -> None:
    given = source(tmp_path)
    done = torchrun(world, given, tmp_path, list(CASES), "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        name = case.replace(":", "of")
        prune(given, tmp_path / f"{name}-alone", case)
        whole(tmp_path / name, case, tmp_path / f"{name}-alone")


def torchrun(world: int, given: Path, folder: Path, cases: list[str], how: str) -> subprocess.CompletedProcess[str]:
    run = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(world)]
    command = [sys.executable, "-m", *run, "-m", "tests.contract.engine_cases", str(given), str(folder), "100", how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, *cases], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_leaves_no_output(tmp_path: Path) -> None:
    given = source(tmp_path)
    done = torchrun(2, given, tmp_path, ["global"], "kill")
    assert done.returncode != 0
    assert not (tmp_path / "global").exists()
    assert len(list(tmp_path.glob(".global.partial-*"))) <= 1
    prune(given, tmp_path / "global", "global", resume=True)  # one worker goes on with what several began
    prune(given, tmp_path / "one", "global")
    whole(tmp_path / "global", "global", tmp_path / "one")


@pytest.mark.slow
def test_a_worker_killed_while_it_counts_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(tmp_path)
    prune(given, tmp_path / "one", "lamp")
    monkeypatch.setenv(FLAG, str(tmp_path / "flag"))
    monkeypatch.setattr(carry_files, "planned_there", engine_cases.planned_and_killed)
    prune(given, tmp_path / "two", "lamp", engine="processes", workers=2)
    assert (tmp_path / "flag").exists()
    whole(tmp_path / "two", "lamp", tmp_path / "one")


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_is_told_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(tmp_path)
    prune(given, tmp_path / "one", "global")
    monkeypatch.setenv(FLAG, str(tmp_path / "flag"))
    monkeypatch.setattr(carry_stage, "rewritten_there", engine_cases.rewritten_and_killed)
    with pytest.raises(SecateurError, match="ended from outside"):
        prune(given, tmp_path / "two", "global", engine="processes", workers=2)
    assert (tmp_path / "flag").exists()
    assert not (tmp_path / "two").exists()
    prune(given, tmp_path / "two", "global", engine="processes", workers=2, resume=True)
    whole(tmp_path / "two", "global", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
@pytest.mark.parametrize("case", QUICK)
def test_ray(case: str, tmp_path: Path) -> None:
    given = source(tmp_path)
    prune(given, tmp_path / "one", case)
    prune(given, tmp_path / "two", case, engine="ray", workers=2)
    whole(tmp_path / "two", case, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="ray is not installed")
@pytest.mark.parametrize("at", ["counting", "writing"])
def test_a_worker_on_ray_that_is_killed_is_begun_again(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source(tmp_path)
    prune(given, tmp_path / "one", "lamp")
    monkeypatch.setenv(FLAG, str(tmp_path / "flag"))
    if at == "counting":
        monkeypatch.setattr(carry_files, "planned_there", engine_cases.planned_and_killed)
    else:
        monkeypatch.setattr(carry_stage, "rewritten_there", engine_cases.rewritten_and_killed)
    prune(given, tmp_path / "two", "lamp", engine="ray", workers=2)
    assert (tmp_path / "flag").exists()
    whole(tmp_path / "two", "lamp", tmp_path / "one")


def test_the_masks_differ() -> None:
    """Each case is one of its own, or the comparisons above would say little."""
    assert len({of_the_module(case) for case in CASES}) == len(CASES)
