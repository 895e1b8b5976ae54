"""Iterative runs that slip: arguments that cannot be meant, loops that do something else, folders that were spoilt."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur
from secateur.core.bits import count_kept
from secateur.errors import BadInput, BadTensor
from secateur.train.engine import Run
from secateur.train.rounds import WEIGHTS, Round, read_rounds, write_round

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def run(folder: Path, **more: Any) -> list[Round]:
    how: dict[str, Any] = {
        "make_optimizer": lambda m: (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), None),
        "make_data": lambda g: X[torch.randperm(64, generator=g)].split(16),
        "loss": lambda m, b: m(b).square().mean(),
        "epochs": 1,
        "rounds": 2,
        "rate": 0.5,
    }
    return secateur.iterate(net(), folder, **(how | more))


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"rewind": "initial"}, "rewind is a step"),
        ({"rewind": True}, "rewind is a step"),
        ({"rewind": 1.0}, "rewind is a step"),
        ({"epochs": 1.5}, "epochs"),
        ({"epochs": "2"}, "epochs"),
        ({"retrain_epochs": 0}, "retrain_epochs"),
        ({"seed": 10**30}, "a seed is an int"),
        ({"seed": 1.5}, "a seed is an int"),
        ({"schedule": secateur.schedules.constant(0.5)}, "beside its own arguments; got schedule"),
        ({"make_data": lambda g: (b for b in X.split(16))}, "generator, which has no length"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_the_folder_is_made(tmp_path: Path, more: Any, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        run(tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def looped(times: int, most: int) -> Callable[[Run], None]:
    def train(stretch: Run) -> None:
        for step, x in stretch.batches():
            for _ in range(times if step < most else 0):
                stretch.optimizer.zero_grad()
                stretch.model(x).square().mean().backward()
                stretch.optimizer.step()

    return train


def test_updates_are_counted_and_not_believed(tmp_path: Path) -> None:
    found = run(tmp_path / "early", loss=None, train=looped(1, 3))
    assert [(r.how["steps"], r.how["made"]) for r in found] == [(4, 3)] * 3
    with pytest.raises(BadInput, match="round 0: train made 8 updates, and was asked for 4"):
        run(tmp_path / "many", loss=None, train=looped(2, 99))
    with pytest.raises(BadInput, match="made no update"):
        run(tmp_path / "none", loss=None, train=looped(0, 0))


def test_weights_that_the_last_update_broke_are_not_kept(tmp_path: Path) -> None:
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(0)
        found: Tensor = model(batch).square().mean()
        more = found - found.detach()  # is 0, and has a gradient
        return found + more * 1e38 * 1e38 if len(calls) == 8 else found

    with pytest.raises(BadTensor, match="NaN or infinite values after the last update of round 1"):
        run(tmp_path, loss=loss)
    assert [r.number for r in read_rounds(tmp_path)] == [0]


def test_more_than_a_hundred_rounds_are_in_order(tmp_path: Path) -> None:
    for number in reversed(range(102)):
        write_round(tmp_path, Round(tmp_path, number, 0.0, 0.0, {}, {}), nn.Linear(1, 1), {})
    assert [r.number for r in read_rounds(tmp_path)] == list(range(102))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: (f / "round-01/round.json").write_text("{"), "round.json cannot be read"),
        (lambda f: (f / "round-01/round.json").write_text(json.dumps({"number": 1})), "is not of this version"),
        (lambda f: (f / "round-01/weights.safetensors").write_bytes(b"x" * 20), "weights.safetensors cannot be read"),
        (lambda f: (f / "round-01/weights.safetensors").unlink(), "weights.safetensors cannot be read"),
        (lambda f: (f / "run.json").write_text("{"), "run.json cannot be read"),
        (lambda f: shutil.rmtree(f / "round-00"), "no round 0 before it"),
        (lambda f: (f / "snapshot-00000000.pt").write_bytes(b"x"), "snapshot-00000000.pt cannot be read"),
    ],
)
def test_a_spoilt_folder_is_named(tmp_path: Path, spoil: Callable[[Path], Any], text: str) -> None:
    run(tmp_path)
    shutil.rmtree(tmp_path / "round-02")
    spoil(tmp_path)
    with pytest.raises(BadInput, match=text):
        run(tmp_path)


def test_a_state_that_could_not_be_read_again_is_refused_at_the_first_step(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Any:
        return torch.optim.SGD(model.parameters(), lr=np.float64(0.1)), None

    with pytest.raises(BadInput, match="could not be taken up"):
        run(tmp_path, make_optimizer=make)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "run.json"]


@pytest.mark.parametrize("rewind", ["lr", "linear", 2])
def test_every_generator_is_as_it_was_when_a_round_is_taken_up(tmp_path: Path, rewind: Any) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        noisy: Tensor = model(batch + float(np.random.randn()) + random.random())
        return noisy.square().mean()

    run(tmp_path, loss=loss, rewind=rewind, rate=0.3)
    before = (tmp_path / "round-02/weights.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "round-02")
    np.random.seed(9)
    random.seed(9)
    run(tmp_path, loss=loss, rewind=rewind, rate=0.3)
    assert (tmp_path / "round-02/weights.safetensors").read_bytes() == before


def test_a_dense_round_is_taken_up_also_where_make_optimizer_draws(tmp_path: Path) -> None:
    def make(model: nn.Module) -> Any:
        torch.rand(3)
        return torch.optim.SGD(model.parameters(), lr=0.1), None

    run(tmp_path, make_optimizer=make)
    before = (tmp_path / "round-00/weights.safetensors").read_bytes()
    for path in tmp_path.glob("round-*"):
        shutil.rmtree(path)
    run(tmp_path, make_optimizer=make)
    assert (tmp_path / "round-00/weights.safetensors").read_bytes() == before


def test_random_masks_have_the_tickets_counts_however_the_pattern_is_spelled(tmp_path: Path) -> None:
    for found in run(tmp_path, pattern=secateur.Unstructured(), controls=["random"])[1:]:
        ticket, drawn = found.masks(), found.controls["random"].masks()
        assert {n: count_kept(b) for n, b in ticket.items()} == {n: count_kept(b) for n, b in drawn.items()}


@pytest.mark.parametrize("got", [None, torch.tensor(1.0), {"a": "b"}, {"a": torch.ones(2)}])
def test_what_evaluate_returns_is_named_where_it_is_no_numbers(tmp_path: Path, got: Any) -> None:
    with pytest.raises(BadInput, match="mapping of names to numbers"):
        run(tmp_path, evaluate=lambda model: got)


def test_a_broken_evaluate_shows_before_anything_is_trained(tmp_path: Path) -> None:
    def broken(model: nn.Module) -> dict[str, float]:
        raise KeyError("accuracy")

    with pytest.raises(KeyError):
        run(tmp_path / "x", evaluate=broken, train=lambda r: pytest.fail("trains"), loss=None)
    assert not (tmp_path / "x").exists()


def test_trying_evaluate_changes_nothing(tmp_path: Path) -> None:
    def drawing(model: nn.Module) -> dict[str, float]:
        return {"drawn": float(torch.rand(()))}

    found = run(tmp_path / "a", evaluate=drawing), run(tmp_path / "b")
    with_it, without = (load_file(rounds[0].folder / WEIGHTS) for rounds in found)
    assert with_it.keys() == without.keys() and all(torch.equal(t, without[n]) for n, t in with_it.items())
