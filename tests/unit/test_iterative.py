"""Iterative pruning: counts of every round, what is rewound, controls, rounds on disk, and taking a run up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import secateur
from secateur.core.bits import unpack
from secateur.errors import BadInput, BadTensor, PlanMismatch
from secateur.stores.staging import staged
from secateur.train.engine import Run
from secateur.train.rounds import Round, locked, read_rounds

Batch = tuple[Tensor, Tensor]
G = torch.Generator().manual_seed(0)
X = torch.randn(96, 12, generator=G)
Y = (X @ torch.randn(12, 3, generator=G)).argmax(1)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 3))


def optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return made, LambdaLR(made, lambda t: 1 / (1 + t))


def data(generator: torch.Generator) -> Sequence[Batch]:
    return [(X[i], Y[i]) for i in torch.randperm(96, generator=generator).split(16)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(folder: Path, model: nn.Module | None = None, **more: Any) -> list[Round]:
    how: dict[str, Any] = {
        "make_optimizer": optimizer,
        "make_data": data,
        "loss": loss,
        "epochs": 2,
        "rounds": 3,
        "rate": 0.5,
    }
    return secateur.iterate(net() if model is None else model, folder, **(how | more))


def weights(found: Round) -> dict[str, Tensor]:
    return load_file(found.folder / "weights.safetensors")


def zeros(found: Round) -> int:
    return sum(int((t == 0).sum()) for n, t in weights(found).items() if n in ("0.weight", "4.weight"))


def files(folder: Path) -> dict[str, bytes]:
    kept = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".pt" and p.name != "lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


@pytest.mark.parametrize("rewind", ["init", 3, "lr", "linear", "finetune"])
def test_every_round_prunes_a_share_of_the_original_size(tmp_path: Path, rewind: Any) -> None:
    found = run(tmp_path, rewind=rewind)
    assert [zeros(r) for r in found] == [0, 150, 225, round(0.875 * 300)]
    assert [r.asked for r in found] == [0.0, 0.5, 0.75, 0.875]
    assert [r.sparsity for r in found] == [0.0, 0.5, 0.75, pytest.approx(262 / 300)]
    alive = [{n: t != 0 for n, t in weights(r).items() if n == "0.weight"} for r in found]
    for before, after in pairwise(alive):
        assert not bool((after["0.weight"] & ~before["0.weight"]).any())


def test_rates_of_layers_and_a_target(tmp_path: Path) -> None:
    found = run(tmp_path / "a", rounds=1, rate={"4": 0.1, "*": 0.2})
    w = weights(found[1])
    assert int((w["0.weight"] == 0).sum()) == 48 and int((w["4.weight"] == 0).sum()) == 6
    assert [r.asked for r in run(tmp_path / "b", rounds=2, target=0.91)][1:] == [pytest.approx(0.7), 0.91]
    assert [r.asked for r in run(tmp_path / "c", sparsities=[0.2, 0.6])] == [0.0, 0.2, 0.6]


class Watch:
    """A loop of the user's own that keeps what each stretch began with, and then trains."""

    def __init__(self) -> None:
        self.began: list[dict[str, Any]] = []

    def __call__(self, given: Run) -> None:
        (group,) = given.optimizer.param_groups
        batches = list(given.batches())
        self.began.append({
            "model": {n: t.clone() for n, t in given.model.state_dict().items()}, "rate": group["lr"], "random": torch.rand(1),
            "momentum": len(given.optimizer.state), "steps": [s for s, _ in batches], "first": batches[0][1][0],
            "pruner": given.pruner,
        })  # fmt: skip
        given.model.train()
        for _, batch in batches:
            given.optimizer.zero_grad()
            loss(given.model, batch).backward()
            given.optimizer.step()
            if given.scheduler is not None:
                given.scheduler.step()


def test_a_step_is_rewound_whole(tmp_path: Path) -> None:
    """Weights, statistics, momentum, rate, random numbers, and the order of the data, from the middle of an epoch."""
    watch = Watch()
    run(tmp_path, loss=None, train=watch, rewind=4, rounds=1)
    _, dense, again = watch.began
    assert dense["steps"] == again["steps"] == list(range(4, 12))
    assert dense["rate"] == again["rate"] and dense["momentum"] == again["momentum"] > 0
    assert torch.equal(dense["random"], again["random"]) and torch.equal(dense["first"], again["first"])
    for name, t in dense["model"].items():
        live = again["model"][name] != 0 if name in ("0.weight", "4.weight") else torch.ones_like(t, dtype=torch.bool)
        assert torch.equal(again["model"][name][live], t[live]), name
    assert dense["pruner"] is None and again["pruner"].steps == 8


@pytest.mark.parametrize(("rewind", "rates"), [("lr", [1 / 7]), ("finetune", [1 / 13]), ("linear", [1.0])])
def test_weights_stay_and_the_rate_is_run_again(tmp_path: Path, rewind: Any, rates: list[float]) -> None:
    watch = Watch()
    found = run(tmp_path, loss=None, train=watch, rewind=rewind, rounds=1, retrain_epochs=1)
    again = watch.began[-1]
    assert again["rate"] == pytest.approx(0.1 * rates[0]) and again["momentum"] == 0
    dense = weights(found[0])
    live = again["model"]["0.weight"] != 0
    assert torch.equal(again["model"]["0.weight"][live], dense["0.weight"][live])
    assert again["steps"] == list(range(6, 12))


@pytest.mark.parametrize("rewind", ["init", "lr"])
def test_controls_stand_beside_every_round(tmp_path: Path, rewind: Any) -> None:
    found = run(tmp_path / "both", controls=["reinit", "random"], rewind=rewind, rounds=2)
    alone = run(tmp_path / "alone", rewind=rewind, rounds=2)
    assert found[0].controls == {} and read_rounds(tmp_path / "both") == found
    read = run(tmp_path / "both", controls=["reinit", "random"], rewind=rewind, rounds=2)
    assert [list(r.controls) for r in read] == [[], ["reinit", "random"], ["reinit", "random"]], (
        "in the order asked for"
    )
    for with_controls, ticket in zip(found[1:], alone[1:], strict=True):
        assert all(torch.equal(t, weights(ticket)[n]) for n, t in weights(with_controls).items()), (
            "controls change nothing"
        )
        drawn, random = (with_controls.controls[c] for c in ("reinit", "random"))
        masks = [{n: b.tolist() for n, b in r.masks().items()} for r in (ticket, drawn, random)]
        assert masks[0] == masks[1] != masks[2]
        kept = [{n: sum(v.bit_count() for v in b) for n, b in m.items()} for m in masks]
        assert kept[0] == kept[1] == kept[2], "as many in each tensor"
        assert not torch.equal(weights(ticket)["0.weight"], weights(drawn)["0.weight"])
        assert drawn.how == {"rewind": rewind, "control": "reinit", "steps": 12, "made": 12}
    first, second = (unpacked(r.controls["random"].masks()) for r in found[1:])
    assert all(not (second[n] & ~first[n]).any() for n in second), "random masks are nested too"


def unpacked(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: unpack(b, 0, 8 * b.numel()) for n, b in masks.items()}


def test_random_masks_start_from_the_weights_of_the_ticket(tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path, loss=None, train=watch, controls=["random"], rounds=1)
    dense, ticket, random = watch.began
    for name, t in random["model"].items():
        live = t != 0 if name in ("0.weight", "4.weight") else torch.ones_like(t, dtype=torch.bool)
        assert torch.equal(t[live], dense["model"][name][live])
    assert torch.equal(ticket["random"], random["random"])


def stop_in_round(number: int) -> Callable[[Run], None]:
    """A loop that breaks off in the middle of a round."""
    calls = [0]

    def train(given: Run) -> None:
        calls[0] += 1
        given.model.train()
        for step, batch in given.batches():
            if calls[0] > number and step > given.first + 2:
                raise KeyboardInterrupt
            given.optimizer.zero_grad()
            loss(given.model, batch).backward()
            given.optimizer.step()
            given.scheduler.step()

    return train


@pytest.mark.parametrize("rewind", ["init", 4])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 6])
def test_a_run_is_taken_up_with_the_same_result(tmp_path: Path, rewind: Any, number: int) -> None:
    plain: dict[str, Any] = {"loss": None, "rewind": rewind, "controls": ["random"]}
    run(tmp_path / "whole", train=stop_in_round(99), **plain)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", train=stop_in_round(number), **plain)
    torch.manual_seed(99)
    other = nn.Sequential(*(net().children()))
    run(tmp_path / "cut", other, train=stop_in_round(99), **plain)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_what_a_killed_run_staged_is_removed(tmp_path: Path) -> None:
    with staged(tmp_path / "x.pt", False, 0) as stage:
        stage.write_text("")
        live = stage.name
    assert (tmp_path / "x.pt").exists()
    (gone := subprocess.Popen(["true"])).wait()
    dead = [tmp_path / name.replace(f"-{os.getpid()}-", f"-{gone.pid}-") for name in (live, f"round/{live}")]
    (tmp_path / "round").mkdir()
    for path in (*dead, tmp_path / live):
        path.write_text("")
    with locked(tmp_path, {}):
        assert not any(path.exists() for path in dead) and (tmp_path / live).exists()


def test_tickets_can_be_listed_loaded_and_trained(tmp_path: Path) -> None:
    last = run(tmp_path)[-1]
    assert [r.number for r in read_rounds(tmp_path)] == [0, 1, 2, 3]
    model = net()
    last.load(model)
    made, _ = optimizer(model)
    pruner = secateur.Pruner(model, made)
    pruner.hold(last.masks())
    for batch in data(torch.Generator()):
        made.zero_grad()
        loss(model, batch).backward()
        made.step()
    assert sum(int((m == 0).sum()) for m in pruner.masks().values()) == 262
    assert int((model.get_parameter("0.weight") == 0).sum() + (model.get_parameter("4.weight") == 0).sum()) == 262
    with pytest.raises(PlanMismatch, match="has changed"):
        last.load(nn.Linear(2, 2))


def test_bad_runs_are_refused(tmp_path: Path) -> None:
    for more, text in (
        ({"rounds": 0}, "rounds is a number"), ({"rate": 1.5}, "rate"), ({"loss": None}, "one of the two"),
        ({"rate": {"4": 0.1}, "allocation": "erk"}, "leave allocation out"), ({"include": "nothing"}, "matches nothing"),
        ({"rate": {"nowhere": 0.1}}, "matches none"), ({"sparsities": [0.5, 0.4]}, "must rise"),
        ({"controls": "reinit"}, "a sequence of some of"), ({"controls": ["none"]}, "a sequence of some of"),
        ({"rewind": 99}, "leaves no steps"), ({"target": 90}, "Did you mean 0.9"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=text):
            run(tmp_path / "x", **more)
    assert not (tmp_path / "x").exists()
    run(tmp_path / "y")
    with pytest.raises(BadInput, match=r"other settings \(rate: 0.5 then, 0.2 now\)"):
        run(tmp_path / "y", rate=0.2)
    with locked(tmp_path / "z", {}), pytest.raises(BadInput, match="another run is at work"):
        run(tmp_path / "z")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        run(tmp_path / "file" / "run")
    with pytest.raises(BadInput, match="not the folder of a run"):
        read_rounds(tmp_path / "nowhere")


def test_a_loss_that_breaks_ends_the_run_and_keeps_the_rounds(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: Batch) -> Tensor:
        value = loss(model, batch)
        return value * torch.nan if (tmp_path / "round-00").exists() else value

    with pytest.raises(BadTensor, match=r"the loss is nan at round 1, step 0 \(all weights are finite\); what was"):
        run(tmp_path, loss=broken)
    assert [r.number for r in read_rounds(tmp_path)] == [0]
    assert json.loads((tmp_path / "round-00" / "round.json").read_text())["number"] == 0
