"""Recipes that slip: what would fail after hours is refused first, and what was trained is not lost or made otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import BadInput
from secateur.recipe.load import check, parse, with_settings
from secateur.recipe.run import Cell, run
from secateur.recipe.training import Trainer, log
from tests.unit.test_recipe import TEXT, Data

HERE = "tests.unit.test_recipe_slips"
HEAD = TEXT.split("methods:")[0].replace("[0, 1]", "[0]") + "methods:\n  a: "


class Endless(Data):
    def train(self, generator: torch.Generator) -> Any:
        return iter(super().train(generator))


def endless(seed: int) -> Data:
    return Endless(seed, 64)


def tensors(model: nn.Module, data: Data) -> dict[str, Any]:
    return {"loss": torch.tensor(3.0)}


def broken(model: nn.Module, data: Data) -> dict[str, Any]:
    raise RuntimeError("a slip in evaluate")


def go(folder: Path, method: str, *settings: str) -> list[Cell]:
    return run(check(with_settings(parse(HEAD + method), [*settings, f"folder={folder}"])))


@pytest.mark.parametrize(
    ("method", "setting", "text"),
    [
        ("{prune: {}}", "seeds=[]", "seeds are not empty"),
        ("{prune: {}}", "seeds=[1, 1]", "none is there twice"),
        ("{prune: {}}", "seeds=[1000000000000000000000]", "a seed is an int"),
        ("{prune: {}}", "sparsities=[0.0, 0.5]", "above 0"),
        ("{prune: {}}", "sparsities=[0.5, 0.50000001]", "first six digits"),
        ("{prune: {schedule: {begin: 0, end: .inf, every: 1}}}", "name=x", "finite"),
        ("{prune: {}}", "train.regularize={kind: l1, strength: .inf}", "finite"),
        ("{iterate: {epochs: 1, criterion: random}}", "name=x", "prunes by magnitude"),
        ("{sparse: {every: 100}}", "name=x", "every=100"),
        ("{prune: {pattern: '2:4'}}", "sparsities=[0.25, 0.5]", "2:4 means sparsity 0.5"),
        ("{iterate: {rewind: 999, epochs: 1}}", "name=x", "leaves no steps"),
        ("{iterate: {rewind: finetune, epochs: 1}}", "train.learning_rate=linear", "ends at 0"),
        ("{prune: {}}", "train.optimizer.args={lrr: 1.0}", "lrr"),
        ("{prune: {}}", f"data={HERE}:endless", "has no length"),
        ("{prune: {}}\n  " + "b" * 61 + ": {prune: {}}", "name=x", "60 at most"),
    ],
)
def test_what_would_fail_later_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, setting: str, text: str
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *a: pytest.fail("trains"))
    with pytest.raises(BadInput, match=text):
        go(tmp_path / "r", method, setting)


def test_what_evaluate_returns_becomes_numbers(tmp_path: Path) -> None:
    assert all(c.metrics == {"loss": 3.0} for c in go(tmp_path / "r", "{prune: {}}", f"evaluate={HERE}:tensors"))


def test_a_slip_in_evaluate_does_not_throw_the_training_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a slip"):
        go(tmp_path / "r", "{prune: {}}", f"evaluate={HERE}:broken")
    kept = tmp_path / "r/seed-0/dense/0.snapshot.pt"
    assert kept.exists()
    go(tmp_path / "whole", "{prune: {}}")
    (tmp_path / "whole/seed-0/dense").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "whole/seed-0/dense/0")
    kept.rename(tmp_path / "whole/seed-0/dense" / kept.name)
    go(tmp_path / "whole", "{prune: {}}")
    assert not (tmp_path / "whole/seed-0/dense" / kept.name).exists()


def test_a_dense_network_that_was_there_changes_nothing_of_what_follows(tmp_path: Path) -> None:
    how = (
        "{prune: {}, finetune: {epochs: 1}, train: {epochs: 1, optimizer: {call: 'torch.optim:SGD', args: {lr: 0.1}}}}"
    )
    settings = "sparsities=[0.5]", "model=tests.unit.test_recipe:dropping"
    go(tmp_path / "r", how, *settings)
    made = tmp_path / "r/seed-0/a/0.5"
    before = (made / "weights.safetensors").read_bytes()
    shutil.rmtree(made)
    go(tmp_path / "r", how, *settings)
    assert (made / "weights.safetensors").read_bytes() == before


def test_a_log_is_cut_and_never_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    inode = path.stat().st_ino

    def lines() -> Iterator[str]:
        with log(path, 2) as out:
            yield path.read_text()  # what a kill would leave
            out.write('{"step": 3}\n')
        yield path.read_text()

    assert list(lines()) == ['{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n{"step": 3}\n']
    assert path.stat().st_ino == inode
    with log(path, 0):
        pass
    assert path.read_text() == ""
