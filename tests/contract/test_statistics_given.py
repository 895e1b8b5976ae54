"""Promise 2 with statistics that were measured: one mask from a module, its dict, file and shards, and a saved plan."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.contract.disk import load, save_one, save_shards
from tests.contract.nets import is_zero


def net() -> nn.Module:
    """A convolution and two linear layers; names as in a file."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(4, 8, 3))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc1", nn.Linear(72, 16))
    model.add_module("relu", nn.ReLU())
    model.add_module("fc2", nn.Linear(16, 4))
    return model


def batches() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(12, 4, 5, 5, generator=g) * torch.linspace(0.3, 2, 4).view(1, 4, 1, 1) for _ in range(3)]


def by_second_moment(weight: Tensor, *, input_norm: Tensor, name: str) -> Tensor:
    """A user's criterion, of a whole tensor."""
    return weight.double() * float(input_norm.double().square().mean()) + len(name)


HOWS: dict[str, dict[str, Any]] = {
    "wanda": {"criterion": "wanda", "sparsity": 0.5},
    "wanda, global": {"criterion": "wanda", "sparsity": 0.5, "pattern": "unstructured", "allocation": "global"},
    "wanda, 2:4": {"criterion": "wanda", "pattern": "2:4"},
    "wanda, erk": {"criterion": "wanda", "sparsity": 0.7, "allocation": "erk", "max_sparsity": 0.9},
    "wanda, channels": {"criterion": "wanda", "sparsity": 0.5, "pattern": "channel", "allocation": "uniform"},
    "the function": {"criterion": secateur.criteria.wanda, "sparsity": 0.4},
    "a criterion of one's own": {"criterion": by_second_moment, "sparsity": 0.5},
}


@pytest.fixture(scope="module")
def measured() -> Any:
    return secateur.calibrate(net(), batches())


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_one_mask_from_every_target(how: dict[str, Any], measured: Any, tmp_path: Path) -> None:
    model = net()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    targets: dict[str, Any] = {
        "dict": {n: t.clone() for n, t in state.items()},
        "wrapped": {f"module.{n}": t.clone() for n, t in state.items()},
        "compiled": torch.compile(copy.deepcopy(model), backend="eager"),
    }
    report = secateur.prune(model, statistics=measured, **how)
    masks = {r.name: is_zero(model.get_parameter(r.name)) for r in report.chosen}
    assert 0 < report.zeros < report.total
    for kind, target in targets.items():
        secateur.prune(target, statistics=measured, **how)
        found = target.state_dict() if isinstance(target, nn.Module) else target
        for n, t in found.items():
            name = n.removeprefix("module.").removeprefix("_orig_mod.")
            assert name not in masks or torch.equal(is_zero(t), masks[name]), (kind, n)
    for source in (save_one(state, tmp_path), save_shards(state, tmp_path / "hub")):
        out = tmp_path / f"out-{source.name}"
        assert secateur.prune(source, statistics=measured, out=out, **how).zeros == report.zeros
        for n, t in load(out).items():
            assert n not in masks or torch.equal(is_zero(t), masks[n]), (source.name, n)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_plan_of_it_is_saved_and_carried_out(how: dict[str, Any], measured: Any, tmp_path: Path) -> None:
    """A plan with data carries its masks, so that who carries it out needs no statistics."""
    model, other = net(), net()
    plan = secateur.plan(model, statistics=measured, **how)
    secateur.prune(model, statistics=measured, **how)
    secateur.save_plan(plan, tmp_path / "plan.json")
    secateur.apply(secateur.load_plan(tmp_path / "plan.json"), other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_what_calibrating_the_dense_network_in_one_go_gives(measured: Any) -> None:
    model, other = net(), net()
    secateur.prune(model, 0.5, criterion="wanda", statistics=measured)
    calibration = secateur.Calibration(batches(), blocks="whole")
    secateur.prune(other, 0.5, criterion="wanda", calibration=calibration)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_threads_do_not_matter_to_a_mask(measured: Any) -> None:
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = net()
        secateur.prune(model, 0.5, criterion="wanda", statistics=measured)
        masks.append([is_zero(t) for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_a_criterion_that_is_bound_already(measured: Any) -> None:
    """``bind`` joins a criterion with statistics beforehand; dims come from the target."""
    model, other = net(), net()
    secateur.prune(model, 0.5, criterion=secateur.criteria.bind(secateur.criteria.wanda, measured))
    secateur.prune(other, 0.5, criterion="wanda", statistics=measured)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    moved = net()

    def halve(weight: Tensor, *, hessian: Tensor, mask: Tensor) -> Any:
        return weight / 2, mask

    bound = secateur.criteria.bind(secateur.criteria.wanda, measured)
    with pytest.warns(secateur.SecateurWarning, match="fc1.weight: 36 of 72"):
        secateur.prune(moved, 0.5, criterion=bound, solver=halve, calibration=batches())
    assert all(torch.equal(a == 0, b == 0) for a, b in zip(model.parameters(), moved.parameters(), strict=True))
    with pytest.raises(
        secateur.BadInput, match=r"asks for 'in_dim' of 'fc.weight', which is not known: give it to bind"
    ):
        bound_alone = secateur.criteria.bind(secateur.criteria.wanda, {"fc.weight": {"input_norm": torch.ones(2)}})
        bound_alone(torch.ones(1, 2), name="fc.weight", index=torch.arange(2))
