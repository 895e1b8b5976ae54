"""Promises 1, 2, 6 and 7 for models that are cut over processes: FSDP2, tensor parallelism, both, copies, several meshes.

Starting processes takes longer than what they do, so one start runs many cases; here each is a test.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract import sharded_run, sharded_training
from tests.contract.processes import launch

NAMES = [(w, n) for w in (2, 4) for n in (*sharded_run.CASES[w], *sharded_training.CASES[w])]
Found = dict[int, dict[str, str]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What went wrong, by case, in two processes and then in four."""
    folder = tmp_path_factory.mktemp("sharded")
    out: Found = {}
    for world in (2, 4):
        ended = launch("tests.contract.sharded_run", world, folder)
        assert [code for code, _ in ended] == [0] * world, "\n".join(said for _, said in ended)
        out[world] = json.loads((folder / f"found-{world}.json").read_text())
    return out


@pytest.mark.parametrize(("world", "name"), NAMES, ids=[f"{w}-{n}" for w, n in NAMES])
def test_sharded(found: Found, world: int, name: str) -> None:
    assert not found[world][name], found[world][name]


def test_every_case_was_run(found: Found) -> None:
    assert [(w, n) for w in found for n in found[w]] == NAMES


@pytest.mark.slow
def test_one_process_takes_up_what_two_have_saved(tmp_path: Path) -> None:
    for world, chosen in ((2, "saved"), (1, "taken up")):
        ended = launch("tests.contract.sharded_run", world, tmp_path, chosen)
        assert [code for code, _ in ended] == [0] * world, "\n".join(said for _, said in ended)
        assert json.loads((tmp_path / f"found-{world}.json").read_text()) == {chosen: ""}


@pytest.mark.slow
def test_the_others_end_when_one_is_killed(tmp_path: Path) -> None:
    (code, said), (killed, _) = launch("tests.contract.sharded_killed", 2, tmp_path)
    assert killed == -9
    assert code == 3, said
    assert "do not answer" in said
