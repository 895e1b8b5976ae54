"""Regularisers in the loops that people write: what they reach, when they act, and what they leave alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur import NotDefined, NothingChosen, SecateurWarning, regularize, schedules
from secateur.train.regularize import How
from tests.contract.training import OPTIMIZERS, STEPS, check_held, net, the_same, train

HOWS: dict[str, How] = {
    "l1": regularize.l1(0.3),
    "l1 penalty": regularize.l1(0.3, method="penalty"),
    "weight decay": regularize.weight_decay(0.3),
    "group lasso": regularize.group_lasso(0.3),
    "group lasso in": regularize.group_lasso(0.3, dim="in"),
}


def still(model: nn.Module, optimizer: Any) -> None:
    """An update with gradients of zero, under which SGD moves nothing."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def shrunk(w: Tensor, t: float) -> Tensor:
    return w.sign() * (w.abs() - t).clamp(min=0)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)


# What is made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", HOWS)
def test_zeros_are_made_by_the_proximal_kinds_alone(how: str, optimizer: str) -> None:
    model = net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    regularize.attach(model, opt, replace(HOWS[how], strength=0.06 / opt.param_groups[0]["lr"]))
    train(model, opt, range(10))
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    if how in ("l1 penalty", "weight decay"):
        assert zeros(model) == 0
    else:
        assert zeros(model) > 0 and not any(torch.signbit(w[w == 0]).any() for w in weights)
    if how.startswith("group"):
        for w in weights:
            gone = (w == 0).all(1 if how == "group lasso" else 0)
            assert int((w == 0).sum()) == int(gone.sum()) * (w.numel() // len(gone)), "whole channels only"
    assert not any((p == 0).any() for p in model.parameters() if p.ndim == 1), "biases are not chosen"


def test_the_penalty_is_the_gradient_of_its_formula() -> None:
    model, other = net(), net()
    opt, opt_other = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, other))
    regularize.attach(model, opt, regularize.l1(0.2, "penalty"))
    train(model, opt, range(STEPS))
    for t in range(STEPS):
        opt_other.zero_grad()
        (0.2 * sum(p.abs().sum() for p in other.parameters() if p.ndim > 1)).backward()  # type: ignore[union-attr]
        mine = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
        opt_other.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + t))
        (other(x) - x.flip(1)).square().mean().backward()
        for p, g in zip(other.parameters(), mine, strict=True):
            if g is not None and p.grad is not None:
                p.grad.add_(g)
        opt_other.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("closure", [False, True])
def test_weight_decay_is_adamw_to_the_bit(closure: bool) -> None:
    model, other = net(), net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    handle = regularize.attach(model, opt, regularize.weight_decay(0.2))
    assert handle.how == regularize.weight_decay(0.2)
    decayed = [p for p in other.parameters() if p.ndim > 1]
    rest = [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}]
    train_with(model, opt, closure)
    train_with(other, torch.optim.AdamW(groups, lr=0.05), closure)
    assert the_same(model.state_dict(), other.state_dict())


def train_with(model: nn.Module, optimizer: Any, closure: bool) -> None:
    for t in range(STEPS):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t))

        def loss(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            found = (model(x) - x.flip(1)).square().mean()
            found.backward()
            return found

        if closure:
            assert optimizer.step(loss) is not None
        else:
            loss()
            optimizer.step()


@pytest.mark.parametrize("how", HOWS)
def test_a_closure_makes_no_difference(how: str) -> None:
    models = [net(), net()]
    for model, closure in zip(models, (False, True), strict=True):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        regularize.attach(model, opt, HOWS[how])
        train_with(model, opt, closure)
    assert the_same(models[0].state_dict(), models[1].state_dict())
    keyword = net()
    opt = torch.optim.SGD(keyword.parameters(), lr=0.1)
    regularize.attach(keyword, opt, regularize.l1(1.0, "penalty"))
    before = values(keyword)
    opt.step(closure=lambda: [setattr(p, "grad", torch.zeros_like(p)) for p in keyword.parameters()] and 0.0)
    torch.testing.assert_close(keyword[0].weight, before["0.weight"] - 0.1 * before["0.weight"].sign())


# Channels by role

LAYERS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {  # layer, dims summed over for "out" and for "in"
    "linear": (lambda: nn.Linear(6, 4), (1,), (0,)),
    "conv": (lambda: nn.Conv2d(6, 4, 3), (1, 2, 3), (0, 2, 3)),
    "transposed conv": (lambda: nn.ConvTranspose2d(6, 4, 3), (0, 2, 3), (1, 2, 3)),
    "transposed linear": (lambda: Conv1D(4, 6), (0,), (1,)),
}


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("layer", LAYERS)
def test_groups_are_channels_by_role(layer: str, dim: Any) -> None:
    make, over_out, over_in = LAYERS[layer]
    model = nn.Sequential(make())
    over = over_out if dim == "out" else over_in
    weight = model[0].weight
    channels = 4 if dim == "out" else 6
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape) * 0.2)
        weight.mul_(torch.linspace(0.05, 2, channels).view([-1 if d not in over else 1 for d in range(weight.ndim)]))
    w = weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    regularize.attach(model, opt, regularize.group_lasso(0.2, dim))
    still(model, opt)
    size = w.numel() // channels
    norms = w.square().sum(over, keepdim=True).sqrt()
    torch.testing.assert_close(weight.detach(), w * (1 - 0.1 * math.sqrt(size) / norms).clamp(min=0))
    gone = (weight == 0).sum(over)
    assert set(gone.tolist()) == {0, size}


def test_what_has_no_channels_is_left_out_with_a_warning_or_refused() -> None:
    model = nn.ModuleDict({"a": nn.LSTM(4, 4), "b": nn.Linear(4, 4), "c": nn.Conv2d(4, 4, 1, groups=2)})
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    before = values(model)
    with pytest.warns(SecateurWarning, match=r"a\.weight_hh_l0 .*gates") as caught:
        regularize.attach(model, opt, regularize.group_lasso(0.5, "in"))
    assert caught[0].filename == __file__
    still(model, opt)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"b.weight"}
    with pytest.raises(NotDefined, match=r"c\.weight"):
        regularize.attach(model, opt, regularize.group_lasso(0.5, "in"), include="c.weight")


@pytest.mark.parametrize(("value", "strength", "left"), [(2000.0, 200.0, 1800.0), (1e-4, 2e-5, 8e-5)])
def test_norms_of_half_precision_are_taken_in_single(value: float, strength: float, left: float) -> None:
    """float16 holds neither the norm of the first nor a square of the second."""
    model = nn.Linear(4096, 1, bias=False).half()
    model.weight.data.fill_(value)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    regularize.attach(model, opt, regularize.group_lasso(strength))
    still(model, opt)
    found = model.weight.detach().double()
    torch.testing.assert_close(found, torch.full_like(found, left), rtol=2e-3, atol=0)


def test_at_a_learning_rate_of_zero_nothing_moves() -> None:
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[1e-30, -1e-30, 0.0], [1.0, -2.0, 3.0]])
    before = model.weight.detach().clone()
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    for how in HOWS.values():
        regularize.attach(model, opt, how)
    still(model, opt)
    assert torch.equal(model.weight, before)


# When it acts


def test_it_follows_the_learning_rate_of_each_group() -> None:
    model = net()
    opt = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 if t < 1 else 0.5)
    regularize.attach(model, opt, regularize.l1(0.1))
    before = values(model)
    still(model, opt)
    scheduler.step()
    first = {"0.weight": 0.02, "2.weight": 0.01}
    for name, t in first.items():
        torch.testing.assert_close(model.get_parameter(name), shrunk(before[name], t))
    still(model, opt)
    for name, t in first.items():
        torch.testing.assert_close(model.get_parameter(name), shrunk(shrunk(before[name], t), t / 2))
    assert torch.equal(model[4].weight, before["4.weight"]), "another optimizer's"
    opt.add_param_group({"params": model[4].parameters(), "lr": torch.tensor(0.3)})
    still(model, opt)
    torch.testing.assert_close(model[4].weight.detach(), shrunk(before["4.weight"], 0.03))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_a_step_that_the_scaler_skips_does_nothing(how: str, fused: bool) -> None:
    model = net()
    opt = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    regularize.attach(model, opt, HOWS[how])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        before = values(model)
        opt.zero_grad()
        scaler.scale(model(torch.ones(1, 8)).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        same = the_same(values(model), before)
        assert same == (factor == float("inf"))


@pytest.mark.parametrize("unscale", [False, True])
def test_the_penalty_is_in_the_scale_of_the_gradients(unscale: bool) -> None:
    plain, scaled = net(), net()
    for model in (plain, scaled):
        opt = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        regularize.attach(model, opt, regularize.l1(0.2, "penalty"))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is scaled)
        for t in range(4):
            opt.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
            scaler.scale(model(x).square().mean()).backward()
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_it_stops_when_closed(how: str) -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = regularize.attach(model, opt, HOWS[how])
    still(model, opt)
    handle.close()
    before = values(model)
    still(model, opt)
    assert the_same(values(model), before)
    handle.close()


# What it reaches


def test_filters_choose_as_for_prune() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    regularize.attach(model, opt, regularize.weight_decay(0.5), include=["0", "2", "2.bias"], ignore="0")
    before = values(model)
    still(model, opt)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"2.weight", "2.bias"}
    roles = nn.ParameterDict({"table": nn.Parameter(torch.randn(4, 4))})
    opt = torch.optim.SGD(roles.parameters(), lr=0.1)
    with pytest.raises(NothingChosen):
        regularize.attach(roles, opt, regularize.weight_decay(0.5))
    regularize.attach(roles, opt, regularize.weight_decay(0.5), roles={"table": "linear"})
    old = roles["table"].detach().clone()
    still(roles, opt)
    torch.testing.assert_close(roles["table"].detach(), 0.95 * old)


@pytest.mark.parametrize("how", ["l1", "l1 penalty", "weight decay"])
def test_tied_weights_are_reached_once(how: str) -> None:
    shared, views, plain = (nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))) for _ in range(3))
    shared[1].weight = shared[0].weight
    views[1].weight.data = views[0].weight.data  # two parameters over one memory
    plain[1] = nn.Identity()
    for model in (views, plain):
        model[0].weight.data.copy_(shared[0].weight.data)
    for model in (shared, views, plain):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        regularize.attach(model, opt, HOWS[how])
        still(model, opt)
    assert torch.equal(shared[0].weight, plain[0].weight)
    assert torch.equal(views[0].weight, plain[0].weight)


def test_frozen_weights_and_weights_without_a_gradient_are_left_alone() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for how in HOWS.values():
        regularize.attach(model, opt, how)
    before = values(model)
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    opt.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {"2.weight"}


def test_the_model_is_left_alone_and_copies_are_plain() -> None:
    model, plain = net(), net()
    where = [p.data_ptr() for p in model.parameters()]
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for how in HOWS.values():
        regularize.attach(model, opt, how)
    train(model, opt, range(2))
    assert [p.data_ptr() for p in model.parameters()] == where
    assert list(model.state_dict()) == list(plain.state_dict())
    assert the_same([m.__dict__.keys() for m in model.modules()], [m.__dict__.keys() for m in plain.modules()])
    copied, copied_opt = copy.deepcopy((model, opt))
    assert the_same(copied.state_dict(), model.state_dict())
    before = values(copied)
    still(copied, copied_opt)
    assert the_same(values(copied), before)
    still(model, opt)
    assert the_same(values(copied), before) and not the_same(values(model), before)


@pytest.mark.parametrize("regularizer_first", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_it_works_beside_a_pruner(how: str, regularizer_first: bool) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    if regularizer_first:
        regularize.attach(model, opt, HOWS[how])
    pruner = secateur.Pruner(model, opt, schedules.cubic(0.75, begin=1, end=6))
    if not regularizer_first:
        regularize.attach(model, opt, HOWS[how])
    train(model, opt, range(STEPS), lambda: check_held(model, pruner, opt) and None)
    assert check_held(model, pruner) >= round(0.75 * sum(p.numel() for p in model.parameters() if p.ndim > 1))
    assert pruner.steps == STEPS


def test_what_is_zero_already_counts_in_prune() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    regularize.attach(model, opt, regularize.l1(0.05))
    train(model, opt, range(4))
    found = {n: p == 0 for n, p in model.named_parameters()}
    assert 0.2 < secateur.inspect(model).sparsity < 0.5
    before = values(model)
    secateur.prune(model, 0.2)
    assert the_same(values(model), before), "more is zero than was asked"
    assert secateur.prune(model, 0.5).zeros == 208
    assert all((p[found[n]] == 0).all() for n, p in model.named_parameters())
