"""Promises 3, 6, 7 and 8 through training: over optimizers, schedules and patterns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import secateur
from secateur import BadInput, PlanMismatch, Pruner, schedules
from secateur.core.allocate import prune_count
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
    asked = SCHEDULES[schedule]
    assert asked is not None
    pruner = Pruner(model, opt, lambda t: asked(t) / 0.75 * target, pattern=pattern)
    seen = [pruner.masks()]

    def each() -> None:
        check_held(model, pruner, opt)
        seen.append(pruner.masks())

    train(model, opt, range(STEPS), each)
    for a, b in pairwise(seen):
        assert all(not (b[n] & ~a[n]).any() for n in a), "a sparser mask lies inside a denser one"
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


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "unstructured"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *(n for n in MIXING if n != "muon")])
def test_zero_stays_zero_in_every_pattern_under_every_optimizer(optimizer: str, pattern: str) -> None:
    model = net()
    opt = {**OPTIMIZERS, **MIXING}[optimizer](model.parameters())
    train(model, opt, range(2))
    pruner = Pruner(model, opt, schedules.cubic(0.5, begin=1, end=4), pattern=pattern)
    counts = []

    def each() -> None:
        counts.append(check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt))

    train(model, opt, range(2, 8), each)
    assert counts == sorted(counts) and 0 < counts[-1] == counts[3] and pruner.asked == 0.5


@st.composite
def ways(draw: st.DrawFn) -> schedules.Schedule:
    """Schedules of every kind that end within twelve steps, whatever their frequency."""
    begin = draw(st.integers(0, 8))
    more = {"begin": begin, "end": draw(st.integers(begin + 1, 12)), "every": draw(st.integers(1, 20))}
    make = draw(st.sampled_from([schedules.cubic, schedules.linear, schedules.polynomial, schedules.exponential]))
    return make(draw(st.sampled_from([0.5, 0.75, 0.9]) | st.floats(0.05, 0.98)), **more)


@settings(max_examples=200)
@given(ways())
def test_a_schedule_ends_at_its_target(schedule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 7, bias=False))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, opt, schedule)
    for _ in range(12):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        opt.step()
        check_held(model, pruner, opt)
        assert round(pruner.sparsity * 135) == prune_count(135, schedule(pruner.steps))
    assert pruner.asked == schedule.target


@pytest.mark.parametrize("name", MIXING)
def test_weights_that_an_optimizer_mixes_are_masked_again(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))
    opt = MIXING[name](list(model.parameters()))
    pruner = Pruner(model, opt, schedules.one_shot(0.5, at=2))
    train(model, opt, range(6), lambda: check_held(model, pruner) and None)
    assert check_held(model, pruner) == 128


Parts = tuple[nn.Module, Pruner, *tuple[Optimizer, ...]]


def check_resumes(start: Callable[[], Parts]) -> None:
    """Interrupted after any step and taken up in any order of the parts, a training ends with the same bits."""
    parts = start()
    saved = []
    for t in range(STEPS):
        saved.append(copy.deepcopy([part.state_dict() for part in parts]))
        train(parts[0], parts[2:], range(t, t + 1))
    wanted = [part.state_dict() for part in parts]
    for t, states in enumerate(saved):
        for order in (1, -1):
            again = start()
            for part, state in list(zip(again, copy.deepcopy(states), strict=True))[::order]:
                part.load_state_dict(state)
            train(again[0], again[2:], range(t, STEPS))
            assert the_same([part.state_dict() for part in again], wanted), (t, order)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "nadam", "adafactor"])
def test_interrupted_at_any_step_and_resumed_is_uninterrupted(name: str, pattern: str) -> None:
    schedule = schedules.cubic(0.5, begin=1, end=6, every=2)

    def start() -> Parts:
        model = net()
        opt = OPTIMIZERS[name](model.parameters())
        return model, Pruner(model, opt, schedule, pattern=pattern), opt

    check_resumes(start)


RESUMED = {
    **SCHEDULES,
    "linear": schedules.linear(0.75, begin=0, end=5),
    "exponential": schedules.exponential(0.75, begin=2, end=7, every=3, initial=0.25),
    "in two": schedules.join([schedules.constant(0.25), schedules.linear(0.75, begin=0, end=3)], [3]),
    "auto": schedules.auto(0.75, STEPS),
    "dense again": schedules.ac_dc(0.75, begin=1, end=7, sparse=2, dense=2),
}


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_under_every_schedule_with_several_optimizers(name: str) -> None:
    def start() -> Parts:
        model = net()
        if RESUMED[name] is None:
            secateur.prune(model, 0.75)
        optimizers = [OPTIMIZERS["sgd momentum"](model[0].parameters()), OPTIMIZERS["adamw"](model[2:].parameters())]
        more = {"allocation": "uniform", "regrow": name == "dense again"}
        return model, Pruner(model, optimizers, RESUMED[name], **more), *optimizers

    check_resumes(start)
    model, pruner, *optimizers = start()
    train(model, optimizers, range(STEPS), lambda: [check_held(model, pruner, o) for o in optimizers] and None)
    assert pruner.steps == STEPS and pruner.sparsity == 0.75


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
