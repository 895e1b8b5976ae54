"""What goes wrong in the middle of a run, or before it: told with the step and the tensor, and nothing that was good is lost."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import BadInput, BadTensor, PlanMismatch, Pruner, prune, schedules
from secateur.recipe.load import check, parse, with_settings
from secateur.recipe.run import run
from secateur.train.rounds import locked
from tests.contract.killed_runs import Data, network
from tests.contract.test_killed_runs import files
from tests.contract.training import net, the_same

HERE = "tests.contract.test_bad_runs"
RECIPE = f"""
name: bad
folder: unnamed
data: "{HERE}:data"
model: "{HERE}:model"
train: {{epochs: 2, optimizer: {{call: "torch.optim:SGD", args: {{lr: 0.1}}}}, loss: "{HERE}:loss"}}
sparsities: [0.5]
methods:
  fine-tuned: {{prune: {{}}, finetune: {{epochs: 3}}}}
"""
DENSE, EPOCH = 12, 6
"""Updates of the dense network, and of an epoch; of the fine-tuning there are 18."""


class Now:
    """What the functions of the recipe do at this moment."""

    updates = 0
    spoilt: Callable[[int, Tensor], Tensor] | None = None
    built: Callable[[], nn.Module] = network


@pytest.fixture(autouse=True)
def _as_always() -> Iterator[None]:
    Now.updates, Now.spoilt, Now.built = 0, None, network
    yield
    Now.updates, Now.spoilt, Now.built = 0, None, network


def data(seed: int) -> Data:
    return Data(seed)


def model() -> nn.Module:
    return Now.built()


def loss(model: nn.Module, batch: Any) -> Tensor:
    found = nn.functional.cross_entropy(model(batch[0]), batch[1])
    Now.updates += 1
    return found if Now.spoilt is None else Now.spoilt(Now.updates, found)


def nan_at(last: int) -> Callable[[int, Tensor], Tensor]:
    """A loss that is NaN at an update."""
    return lambda update, found: found * torch.nan if update == last else found


def breaks_at(last: int) -> Callable[[int, Tensor], Tensor]:
    """A loss that is finite throughout, and whose gradient at an update is not."""
    return lambda update, found: found + (found - found.detach()) * 1e38 * 1e38 if update == last else found


def recipe(folder: Path, *settings: str) -> Any:
    return check(with_settings(parse(RECIPE), [f"folder={folder}", *settings]))


WEIGHT = r"0\.weight \(shape \(16, 8\)\) holds NaN or infinite values"
BROKEN = {
    "a loss of the dense network": (
        nan_at(4),
        r"the loss is nan at seed 0: dense, 0, step 3 \(all weights are finite\)",
    ),
    "a loss after pruning": (nan_at(DENSE + 9), r"the loss is nan at seed 0: fine-tuned, 0\.5, step 8 \(all weights"),
    "weights in an epoch": (breaks_at(DENSE + 9), rf"the loss is nan at seed 0: fine-tuned, 0\.5, step 9 \({WEIGHT}\)"),
    "weights at the end of one": (breaks_at(DENSE + 2 * EPOCH), rf"{WEIGHT} after epoch 2 of seed 0: fine-tuned, 0\.5"),
    "weights at the last update": (
        breaks_at(DENSE + 18),
        rf"{WEIGHT} after the last update of seed 0: fine-tuned, 0\.5",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_a_run_is_told_and_the_run_goes_on_from_what_was_good(case: str, tmp_path: Path) -> None:
    run(recipe(tmp_path / "whole"))
    Now.updates = 0
    Now.spoilt, words = BROKEN[case]
    with pytest.raises(BadTensor, match=words + ".*; what was finished before is kept"):
        run(recipe(tmp_path / "cut"))
    assert (tmp_path / "cut/seed-0/dense/0/cell.json").exists() == (Now.updates > DENSE)
    assert not (tmp_path / "cut/seed-0/fine-tuned/0.5").exists()
    Now.spoilt = None
    before = Now.updates
    run(recipe(tmp_path / "cut"))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    lost = before - DENSE - EPOCH * ((before - DENSE - 1) // EPOCH) if before > DENSE else before
    assert Now.updates - before == DENSE + 18 - before + lost, "whole epochs that were good are not trained again"


def test_weights_that_break_on_the_way_down_are_told_with_the_step(tmp_path: Path) -> None:
    Now.spoilt = breaks_at(DENSE + 8)
    with pytest.raises(
        BadTensor, match=r"at step 8: '0\.weight' \(shape \(16, 8\).* holds \d+ NaN or infinite weights"
    ):
        run(
            recipe(
                tmp_path, "methods={gradual: {prune: {schedule: {begin: 0, end: 1.5, every: 0.25}}}}", "train.epochs=2"
            )
        )


def test_a_run_that_cannot_begin_is_refused_before_it_trains(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match=r"the run folder .* cannot be written"):
            run(recipe(folder))
    asked = recipe(tmp_path / "taken")
    with locked(tmp_path / "taken", asked.model_dump(mode="json")):
        with pytest.raises(BadInput, match=r"another run is at work in .*taken: wait for it, or choose another folder"):
            run(asked)
    Now.built = lambda: network().requires_grad_(False)
    with pytest.raises(BadInput, match=r"'0\.weight'.* is frozen"):
        run(recipe(tmp_path / "frozen", "methods.fine-tuned.prune.include='0.weight'"))
    assert not Now.updates


def test_another_process_holds_the_folder(tmp_path: Path) -> None:
    asked = recipe(tmp_path / "r")
    hold = (
        "import sys, pathlib; from secateur.train.rounds import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), {}): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, asked.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="another run is at work"):
            run(asked)
        other.kill()
    (tmp_path / "r" / "run.json").unlink()
    run(asked)


def test_a_model_that_has_changed_since(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    run(asked)
    kept = files(tmp_path)
    shutil.rmtree(tmp_path / "seed-0/fine-tuned/0.5")
    Now.built = lambda: nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 2))
    with pytest.raises(
        PlanMismatch, match=r"(?s)the model has changed since this was written: .*size mismatch for 0\.weight"
    ):
        run(asked)
    Now.built = network
    run(asked)
    assert files(tmp_path) == kept


def test_a_target_below_what_is_zero_already() -> None:
    model = net()
    prune(model, 0.75)
    before = copy.deepcopy(model.state_dict())
    for schedule in (schedules.constant(0.5), schedules.cubic(0.7, begin=1, end=5), schedules.one_shot(0.6, at=3)):
        with pytest.raises(
            BadInput, match=r"ends at 0\.\d+, and 312 of the 416 chosen weights are zero already \(0\.7500\)"
        ):
            Pruner(model, torch.optim.SGD(model.parameters()), schedule)
    assert the_same(model.state_dict(), before)
    assert Pruner(model, None, schedules.cubic(0.75, begin=1, end=5)).sparsity == 0.75
