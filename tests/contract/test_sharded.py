"""Promises 1, 2, 6 and 7 for models that are cut over processes: FSDP2, tensor parallelism, both, copies, several meshes.

Starting processes takes longer than what they do, so one start runs many cases; here each is a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import sharded_run, sharded_training
from tests.contract.processes import launch
from tests.guard.source import ROOT

NAMES = [(w, n) for w in (2, 4) for n in (*sharded_run.CASES[w], *sharded_training.CASES[w])]
Found = dict[int, dict[str, str]]
FEW = "120"
"""Of the combinations one in so many is run with each way to cut them in two; the slow test runs all."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What went wrong, by case, in two processes and then in four."""
    folder = tmp_path_factory.mktemp("sharded")
    out: Found = {}
    for world in (2, 4):
        ended = launch("tests.contract.sharded_run", world, folder, FEW)
        assert [code for code, _ in ended] == [0] * world, "\n".join(said for _, said in ended)
        out[world] = json.loads((folder / f"found-{world}.json").read_text())
    return out


@pytest.mark.parametrize(("world", "name"), NAMES, ids=[f"{w}-{n}" for w, n in NAMES])
def test_sharded(found: Found, world: int, name: str) -> None:
    assert not found[world][name], found[world][name]


def test_every_case_was_run(found: Found) -> None:
    assert [(w, n) for w in found for n in found[w]] == NAMES


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("chosen", ["combinations", "amounts", "odd shapes"])
def test_every_combination(world: int, chosen: str, tmp_path: Path) -> None:
    ended = launch("tests.contract.sharded_run", world, tmp_path, "1", chosen)
    assert [code for code, _ in ended] == [0] * world, "\n".join(said for _, said in ended)
    found = json.loads((tmp_path / f"found-{world}.json").read_text())
    assert found
    assert not "".join(found.values())


@pytest.mark.slow
def test_one_process_takes_up_what_two_have_saved(tmp_path: Path) -> None:
    for world, chosen in ((2, "saved"), (1, "taken up")):
        ended = launch("tests.contract.sharded_run", world, tmp_path, FEW, chosen)
        assert [code for code, _ in ended] == [0] * world, "\n".join(said for _, said in ended)
        assert json.loads((tmp_path / f"found-{world}.json").read_text()) == {chosen: ""}


@pytest.mark.slow
def test_the_example_runs_and_is_taken_up(tmp_path: Path) -> None:
    said = ""
    for _ in range(2):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/fsdp2_prune.py"]
        ended = subprocess.run(
            [sys.executable, *command, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
        said += ended.stdout
    assert said.count("step 60: sparsity 0.900") == 1  # the second time there was nothing left to do
    assert said.count("19354 of 21504 weights are zero") == 2


@pytest.mark.slow
def test_the_others_end_when_one_is_killed(tmp_path: Path) -> None:
    (code, said), (killed, _) = launch("tests.contract.sharded_killed", 2, tmp_path)
    assert killed == -9
    assert code == 3, said
    assert "do not answer" in said
