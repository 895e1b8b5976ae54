"""Promises 3, 6, 7 and 8 through training: over optimizers, schedules and patterns."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateur
from secateur import BadInput, PlanMismatch, Pruner, schedules
from tests.contract.training import (
    MIXING,
    NO_ZERO_STATE,
    OPTIMIZERS,
    PATTERNS,
    SCHEDULES,
    STEPS,
    check_held,
    net,
    the_same,
    train,
    weights,
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *(n for n in MIXING if n != "muon")])
def test_zero_stays_zero_and_the_count_is_the_target(optimizer: str, schedule: str) -> None:
    model = net()
    if SCHEDULES[schedule] is None:
        secateur.prune(model, 0.75)
    opt = {**OPTIMIZERS, **MIXING}[optimizer](model.parameters())
    train(model, opt, range(2))  # state there before the pruner, of weights that it prunes
    if SCHEDULES[schedule] is None:
        secateur.prune(model, 0.75)
    pruner = Pruner(model, opt, SCHEDULES[schedule])
    masks: list[dict[str, Tensor]] = []

    def each() -> None:
        check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt)
        masks.append(pruner.masks())

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, opt, range(2, 2 + STEPS), each)
    for a, b in pairwise(masks):
        assert all(not (b[n] & ~a[n]).any() for n in a), "a sparser mask lies inside a denser one"
    assert check_held(model, pruner) == round(0.75 * weights(model))
    assert pruner.steps == STEPS and pruner.sparsity == 0.75
    for name, mask in pruner.masks().items():
        assert not torch.equal(model.get_parameter(name)[mask], before[name][mask]), "what lives is trained"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("schedule", [n for n in SCHEDULES if n != "none"])
def test_every_pattern_goes_by_every_schedule(pattern: str, schedule: str) -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    target = 0.5
    given = SCHEDULES[schedule]
    assert given is not None
    pruner = Pruner(model, opt, lambda t: given(t) / 0.75 * target, pattern=pattern)
    train(model, opt, range(STEPS), lambda: check_held(model, pruner, opt) and None)
    masks = {n: m for n, m in pruner.masks().items() if m.ndim > 1}
    pruned = sum(int((~m).sum()) for m in masks.values())
    if pattern == "channel":
        assert 0 < pruned <= target * sum(m.numel() for m in masks.values())
    else:
        assert pruned == target * weights(model)
    if pattern == "2:4":
        assert all((m.view(-1, 4).sum(1) == 2).all() for m in masks.values())
    if pattern == "2x4":
        for m in masks.values():
            blocks = m.view(m.shape[0] // 2, 2, m.shape[1] // 4, 4).sum((1, 3))
            assert ((blocks == 0) | (blocks == 8)).all()


@pytest.mark.parametrize("name", MIXING)
def test_weights_that_an_optimizer_mixes_are_masked_again(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    opt = MIXING[name](list(model.parameters()))
    pruner = Pruner(model, opt, schedules.one_shot(0.5, at=2))
    train(model, opt, range(6), lambda: check_held(model, pruner) and None)
    assert check_held(model, pruner) == 128


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "nadam", "adafactor"])
def test_interrupted_at_any_step_and_resumed_is_uninterrupted(name: str, pattern: str) -> None:
    schedule = schedules.cubic(0.5, begin=1, end=6, every=2)

    def start() -> tuple[nn.Module, Optimizer, Pruner]:
        model = net()
        opt = OPTIMIZERS[name](model.parameters())
        return model, opt, Pruner(model, opt, schedule, pattern=pattern)

    model, opt, pruner = start()
    saved = []
    for t in range(STEPS):
        saved.append(copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict())))
        train(model, opt, range(t, t + 1))
    wanted = (model.state_dict(), opt.state_dict(), pruner.state_dict())
    for t, states in enumerate(saved):
        for order in ((0, 1, 2), (2, 1, 0)):
            again = start()
            for i in order:
                again[i].load_state_dict(copy.deepcopy(states[i]))
            train(again[0], again[1], range(t, STEPS))
            found = tuple(part.state_dict() for part in again)
            assert the_same(found, wanted), (t, order)


def test_a_state_is_small_loads_weights_only_and_fits_no_other_model(tmp_path: Any) -> None:
    model = net()
    pruner = Pruner(model, None, schedules.constant(0.5))
    state = pruner.state_dict()
    assert {n: b.numel() for n, b in state["masks"].items()} == {"0.weight": 16, "2.weight": 24, "4.weight": 12}
    torch.save(state, tmp_path / "pruner.pt")
    pruner.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    other = Pruner(nn.Sequential(nn.Linear(8, 15)), None, schedules.constant(0.5))
    with pytest.raises(PlanMismatch, match=r"2\.weight"):
        other.load_state_dict(state)
    short = {**state, "masks": {"0.weight": state["masks"]["0.weight"][:-1]}}
    with pytest.raises(PlanMismatch, match=r"0\.weight"):
        pruner.load_state_dict(short)
    with pytest.raises(BadInput, match="not the state of a Pruner"):
        pruner.load_state_dict({})
