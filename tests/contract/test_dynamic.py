"""Sparse from the start: exact counts at all times, RigL's and SET's updates against their definitions, exact resume."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateur
from secateur import Pruner, dynamic, schedules
from secateur.core.allocate import prune_count
from secateur.train.optimizers import STATE_KEYS
from tests.contract.training import MIXING, NO_ZERO_STATE, OPTIMIZERS, batch, check_held, net, the_same, train

EVERY, END, LAST = 3, 12, 14
HOW = {
    "rigl": dynamic.rigl(every=EVERY, end=END, drop=0.5),
    "set": dynamic.random_growth(every=EVERY, end=END, drop=0.5),
}
UPDATES = (3, 6, 9)
SGD = "sgd momentum"


def started(how: str, optimizer: str = SGD, **choice: Any) -> tuple[nn.Module, Optimizer, Pruner]:
    model = net()
    opt = {**OPTIMIZERS, **MIXING}[optimizer](model.parameters())
    given = {"criterion": "random", "allocation": "erk", "rewire": HOW[how], **choice}
    return model, opt, Pruner(model, opt, schedules.constant(0.75), **given)


def live_counts(pruner: Pruner) -> dict[str, int]:
    return {n: int(m.sum()) for n, m in pruner.masks().items()}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Dense gradients, taken where no hook of a pruner sees them."""
    loss = (model(x) - x.flip(1)).square().mean()
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def by_sort(live: Tensor, weight: Tensor, score: Tensor, count: int) -> Tensor:
    """The new mask by stable sorts: the smallest live weights go, those of the highest score come."""
    order = [i for i in np.argsort(weight.abs().flatten().numpy(), kind="stable") if live.flatten()[i]]
    rest = live.flatten().clone()
    rest[order[:count]] = False
    come = [i for i in np.argsort(-score.flatten().double().numpy(), kind="stable") if not rest[i]]
    rest[come[:count]] = True
    return rest.view(live.shape)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *MIXING])
def test_counts_are_exact_and_zero_is_zero_after_every_update(optimizer: str, how: str) -> None:
    model, opt, pruner = started(how, optimizer)
    counts = live_counts(pruner)
    assert sum(counts.values()) == sum(m.numel() for m in pruner.masks().values()) - prune_count(416, 0.75)
    moved, last = [], pruner.masks()

    def each() -> None:
        nonlocal last
        check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt)
        assert live_counts(pruner) == counts
        now = pruner.masks()
        moved.extend([pruner.steps] * (not the_same(now, last)))
        last = now

    train(model, opt, range(LAST), each)
    assert tuple(moved) == UPDATES and pruner.steps == LAST and pruner.sparsity == 0.75


@pytest.mark.parametrize(
    "optimizer", ["sgd momentum", "sgd nesterov", "adam", "adamw fused", "adamax", "of the user's"]
)
def test_rigl_grows_the_largest_dense_gradients_and_makes_no_step(optimizer: str) -> None:
    model, opt, pruner = started("rigl", optimizer)
    for t in range(LAST):
        before, masks = copy.deepcopy((model.state_dict(), opt.state_dict())), pruner.masks()
        dense = gradients(model, batch(t))
        train(model, opt, range(t, t + 1))
        if t + 1 not in UPDATES:
            continue
        kept = {n: m & pruner.masks()[n] for n, m in masks.items()}
        for name, mask in masks.items():
            weight = before[0][name]
            k = prune_count(int(mask.sum()), HOW["rigl"].fraction(t + 1))
            wanted = by_sort(mask, weight, dense[name].abs(), k)
            assert torch.equal(pruner.masks()[name], wanted), name
        wanted_state = copy.deepcopy(before[0])
        for name, mask in kept.items():
            wanted_state[name][~mask] = 0
        assert the_same(model.state_dict(), wanted_state), "what stays keeps its value, whatever else begins at zero"
        for i, (name, p) in enumerate(model.named_parameters()):
            for key, value in before[1]["state"].get(i, {}).items():
                now = opt.state[p][key]
                if name in kept and key in STATE_KEYS:
                    assert torch.equal(now, value.masked_fill(~kept[name], 0)), (name, key)
                else:
                    assert the_same(now, value), (name, key)
        assert all(p.grad is None for p in model.parameters())


def test_a_weight_that_was_just_dropped_may_grow_again_with_its_value_and_momentum() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, opt, schedules.constant(0.5), rewire=dynamic.rigl(every=2, end=100, drop=0.5))
    w = model.get_parameter("0.weight")
    with torch.no_grad():
        w.copy_(torch.tensor([[0.1, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
    pruner.hold({"0.weight": w != 0})
    opt.state[w]["momentum_buffer"] = torch.full_like(w, 0.5) * (w != 0)

    def step(gradient: list[float]) -> None:
        opt.zero_grad()
        (w * torch.tensor(gradient).view(2, 4)).sum().backward()
        opt.step()

    step([0.0] * 8)
    before, state = w.detach().clone(), opt.state[w]["momentum_buffer"].clone()
    assert w.abs().flatten()[:4].argsort()[:2].tolist() == [0, 1]
    step([9.0, 0.0, 0.0, 0.0, 0.0, 8.0, 1.0, 0.0])  # 0 and 1 go, as the smallest; 0 and 5 come
    assert pruner.masks()["0.weight"].flatten().nonzero().flatten().tolist() == [0, 2, 3, 5]
    assert torch.equal(w[0, [0, 2, 3]], before[0, [0, 2, 3]])
    assert torch.equal(opt.state[w]["momentum_buffer"][0, [0, 2, 3]], state[0, [0, 2, 3]])
    assert w[0, 1] == 0 and w[1, 1] == 0 and opt.state[w]["momentum_buffer"].flatten()[[1, 5]].tolist() == [0, 0]


def test_set_makes_its_step_and_then_grows_by_a_hash() -> None:
    model, opt, pruner = started("set")
    other, other_opt, static = started("set", rewire=None)
    train(model, opt, range(UPDATES[0] - 1))
    train(other, other_opt, range(UPDATES[0] - 1))
    assert the_same(model.state_dict(), other.state_dict())
    train(model, opt, range(UPDATES[0] - 1, UPDATES[0]))
    train(other, other_opt, range(UPDATES[0] - 1, UPDATES[0]))
    for name, mask in static.masks().items():
        w, now = other.get_parameter(name).detach(), pruner.masks()[name]
        hashed = secateur.random(0)(w, name=f"{name}\0{UPDATES[0]}", index=torch.arange(w.numel()).view_as(w))
        k = prune_count(int(mask.sum()), HOW["set"].fraction(UPDATES[0]))
        assert torch.equal(now, by_sort(mask, w, -hashed.double(), k))
        assert torch.equal(model.get_parameter(name), w.masked_fill(~(now & mask), 0))


def test_set_grows_everywhere_alike_and_as_its_seed_says() -> None:
    def grown(seed: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(100, 100, bias=False)
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        how = dynamic.random_growth(every=1, end=1000, drop=0.9, seed=seed)
        pruner = Pruner(model, opt, schedules.constant(0.9), criterion="random", rewire=how)
        times = torch.zeros(100, 100)
        for _ in range(40):
            before = pruner.masks()["weight"]
            model.weight.grad = torch.zeros(100, 100)
            opt.step()
            times += pruner.masks()["weight"] & ~before
        return times

    times = grown(0)
    assert torch.equal(times, grown(0)) and not torch.equal(times, grown(1))
    # About 30,000 draws over 100 rows and columns: some 300 each, with a deviation of 17.
    for dim in (0, 1):
        assert 5 * times.sum(dim).mean().sqrt() > (times.sum(dim) - times.sum(dim).mean()).abs().max()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw fused", "nadam"])
def test_interrupted_at_any_step_and_resumed_is_uninterrupted(optimizer: str, how: str) -> None:
    model, opt, pruner = started(how, optimizer)
    saved, live_zeros = [], 0
    for t in range(LAST):
        saved.append(copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict())))
        live_zeros += sum(int((model.get_parameter(n)[m] == 0).sum()) for n, m in pruner.masks().items())
        train(model, opt, range(t, t + 1))
    assert live_zeros, "what has just grown is zero, and is in some of the states"
    wanted = (model.state_dict(), opt.state_dict(), pruner.state_dict())
    for t, states in enumerate(saved):
        for order in ((0, 1, 2), (2, 1, 0)):
            again = started(how, optimizer)
            for i in order:
                again[i].load_state_dict(copy.deepcopy(states[i]))
            train(again[0], again[1], range(t, LAST))
            assert the_same(tuple(part.state_dict() for part in again), wanted), (t, order)
