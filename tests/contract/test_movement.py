"""Movement pruning against a plain loop over its definition: masks, weights and scores bit for bit; exact counts and resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateur
from secateur import Pruner, dynamic, schedules
from secateur.core.allocate import prune_count
from secateur.core.bits import unpack
from secateur.train.optimizers import STATE_KEYS
from tests.contract.training import (
    MIXING,
    NO_ZERO_STATE,
    OPTIMIZERS,
    batch,
    check_held,
    moved_by_hand,
    net,
    the_same,
    train,
    weights,
)

END, LAST = 11, 14
CUBIC = schedules.cubic(0.75, begin=2, end=9, every=2)
HARD = dynamic.movement(every=3, end=END)
SOFT = dynamic.soft_movement(schedules.cubic(0.1, begin=2, end=9), lr=400.0, strength=4e-3, every=3, end=END)
WAYS: dict[str, dict[str, Any]] = {
    "global": {"schedule": CUBIC, "rewire": HARD},
    "uniform": {"schedule": CUBIC, "rewire": HARD, "allocation": "uniform"},
    "soft": {"rewire": SOFT},
}
SGD = "sgd momentum"


def started(way: str, optimizer: str = SGD, **choice: Any) -> tuple[nn.Module, Optimizer, Pruner]:
    model = net()
    opt = {**OPTIMIZERS, **MIXING}[optimizer](model.parameters())
    return model, opt, Pruner(model, opt, **{**WAYS[way], **choice})


def add_noise(model: nn.Module, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(0.01 * torch.randn(p.shape, generator=generator))


class ByDefinition:
    """The same training, with all weights in tensors of its own, and masks by sorting."""

    def __init__(self, way: str, optimizer: str, change: Callable[[nn.Module, int], None] = lambda *_: None) -> None:
        self.way, self.change, self.steps = way, change, 0
        self.model = net()
        self.optimizer = {**OPTIMIZERS, **MIXING}[optimizer](self.model.parameters())
        self.chosen = {n: p for n, p in sorted(self.model.named_parameters()) if p.ndim == 2}
        self.all = {n: p.detach().clone() for n, p in self.chosen.items()}
        self.live = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.chosen.items()}
        self.scores = {n: torch.zeros_like(p) for n, p in self.chosen.items()}

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = batch(self.steps)
        (self.model(x) - x.flip(1)).square().mean().backward()
        self.change(self.model, self.steps)
        for n, p in self.chosen.items():
            assert p.grad is not None
            if self.steps < END:
                change = p.grad * self.all[n]
                if self.way == "soft":
                    sigmoid = self.scores[n].sigmoid()
                    self.scores[n] -= SOFT.lr * SOFT.penalty(self.steps) * (sigmoid * (1 - sigmoid))
                    change = change * SOFT.lr
                self.scores[n] -= change
            p.grad[~self.live[n]] = 0
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            for n, p in self.chosen.items():
                self.all[n] = torch.where(self.live[n], p, self.all[n])
            due = self.steps == END or (self.steps < END and self.steps % 3 == 0)
            moved = self.steps <= END and CUBIC(self.steps) != CUBIC(self.steps - 1)
            if self.way == "soft":
                if due and SOFT.threshold(self.steps):
                    self.take({n: s > SOFT.cut(self.steps) for n, s in self.scores.items()})
            elif moved or (due and CUBIC(self.steps)):
                self.take(self.highest(CUBIC(self.steps)))
            for n, p in self.chosen.items():
                p.copy_(self.all[n].masked_fill(~self.live[n], 0))

    def highest(self, sparsity: float) -> dict[str, Tensor]:
        pools = [list(self.chosen)] if self.way == "global" else [[n] for n in self.chosen]
        found = {}
        for names in pools:
            flat = np.concatenate([self.scores[n].flatten().numpy() for n in names])
            keep = np.ones(len(flat), bool)
            keep[np.argsort(flat, kind="stable")[: prune_count(len(flat), sparsity)]] = False
            for n, part in zip(
                names, np.split(keep, np.cumsum([self.all[n].numel() for n in names])[:-1]), strict=True
            ):
                found[n] = torch.from_numpy(part).view(self.all[n].shape)
        return found

    def take(self, masks: dict[str, Tensor]) -> None:
        for n, p in self.chosen.items():
            stays = self.live[n] & masks[n]
            for key, value in self.optimizer.state.get(p, {}).items():
                if key in STATE_KEYS and value.shape == p.shape:
                    value[~stays] = 0
        self.live = masks


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [
        *((o, "global") for o in (*OPTIMIZERS, *MIXING)),
        *((o, w) for o in (SGD, "adamw fused", "nadam", *MIXING) for w in ("uniform", "soft")),
    ],
)
def test_it_is_what_the_definition_says_under_every_optimizer(optimizer: str, way: str) -> None:
    model, opt, pruner = started(way, optimizer)
    wanted, back = ByDefinition(way, optimizer), 0
    for t in range(LAST):
        before = pruner.masks()
        train(model, opt, range(t, t + 1))
        wanted.step()
        check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt)
        assert the_same(pruner.masks(), wanted.live), t
        assert the_same(model.state_dict(), wanted.model.state_dict()), t
        back += sum(int((m & ~before[n]).sum()) for n, m in pruner.masks().items())
        if t + 1 < END:
            state = pruner.state_dict()["movement"]
            pruned = {n: torch.where(m, 0.0, wanted.all[n]) for n, m in wanted.live.items()}
            assert the_same(state, {"scores": wanted.scores, "values": pruned}), t
    assert back, "some weights come back"
    assert pruner.steps == LAST and "movement" not in pruner.state_dict()
    if way != "soft":
        assert pruner.sparsity == 0.75 and check_held(model, pruner) == 312


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", {"0.weight": 0.9, "*": 0.5}])
@pytest.mark.parametrize(
    "schedule",
    [CUBIC, schedules.linear(0.75, begin=1, end=10), schedules.one_shot(0.75, at=4), lambda t: min(t, 7) / 10],
)
def test_counts_are_exact_after_every_update(schedule: Any, allocation: Any) -> None:
    mapped = isinstance(allocation, dict)
    if mapped:  # of its own shares, from the first update that prunes
        schedule = schedules.one_shot(0.5, at=3)
    model, opt, pruner = started("global", schedule=schedule, allocation=allocation)
    sizes = {n: m.numel() for n, m in pruner.masks().items()}

    def each() -> None:
        check_held(model, pruner, opt)
        asked = schedule(min(pruner.steps, END))
        assert pruner.asked == asked
        pruned = {n: int((~m).sum()) for n, m in pruner.masks().items()}
        if mapped:
            shares = {n: (0.9 if n == "0.weight" else 0.5) if asked else 0.0 for n in sizes}
            assert pruned == {n: prune_count(sizes[n], s) for n, s in shares.items()}
        elif allocation == "uniform":
            assert pruned == {n: prune_count(s, asked) for n, s in sizes.items()}
        else:
            assert sum(pruned.values()) == prune_count(416, asked)

    train(model, opt, range(LAST), each)


@pytest.mark.parametrize("way", WAYS)
def test_what_went_does_not_move_and_comes_back_as_it_was(way: str) -> None:
    model, opt, pruner = started(way, "adamw")  # with weight decay and momentum
    returned = stayed = 0
    for t in range(END - 1):
        masks, values = pruner.masks(), pruner.state_dict()["movement"]["values"]
        train(model, opt, range(t, t + 1))
        for name, now in pruner.masks().items():
            back, out = ~masks[name] & now, ~masks[name] & ~now
            assert torch.equal(model.get_parameter(name)[back], values[name][back])
            assert torch.equal(pruner.state_dict()["movement"]["values"][name][out], values[name][out])
            assert values[name][back | out].all() and not values[name][masks[name]].any()
            returned, stayed = returned + int(back.sum()), stayed + int(out.sum())
    assert returned and stayed


def test_zeros_that_were_there_stay_and_count_first() -> None:
    model = net()
    secateur.prune(model, 0.5)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim == 2}
    opt = OPTIMIZERS[SGD](model.parameters())
    pruner = Pruner(model, opt, **WAYS["global"])
    assert pruner.sparsity == 0.5

    def each() -> None:
        check_held(model, pruner, opt)
        assert all(not (pruner.masks()[n] & z).any() for n, z in zeros.items())

    train(model, opt, range(LAST), each)
    assert pruner.sparsity == 0.75


def test_soft_lives_what_passes_and_the_penalty_says_how_much() -> None:
    found = []
    for strength in (0.0, 4e-3, 4e-2):
        how = dynamic.soft_movement(SOFT.threshold, lr=400.0, strength=strength, every=1, end=END)
        model, opt, pruner = started("soft", rewire=how)
        for t in range(END - 1):
            train(model, opt, range(t, t + 1))
            check_held(model, pruner, opt)
            scores = pruner.state_dict()["movement"]["scores"]
            threshold = SOFT.threshold(t + 1)
            for name, mask in pruner.masks().items():
                clear = (scores[name].double().sigmoid() - threshold).abs() > 1e-6
                assert torch.equal(mask[clear], (scores[name].double().sigmoid() > threshold)[clear])
        assert pruner.asked is None
        found.append(pruner.sparsity)
        assert pruner.sparsity == pytest.approx(check_held(model, pruner) / weights(model))
    assert found == sorted(found) and found[0] < 0.5 < found[-1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", [SGD, "adamw fused", *MIXING])
def test_it_is_what_the_definition_says_of_gradients_that_were_changed_by_hand(optimizer: str, way: str) -> None:
    model, opt, pruner = started(way, optimizer)
    wanted = ByDefinition(way, optimizer, change=add_noise)
    for t in range(LAST):
        opt.zero_grad()
        x = batch(t)
        (model(x) - x.flip(1)).square().mean().backward()
        add_noise(model, t)
        opt.step()
        wanted.step()
        check_held(model, pruner, opt)
        assert the_same(pruner.masks(), wanted.live), t
        assert the_same(model.state_dict(), wanted.model.state_dict()), t


def test_gradients_set_by_hand_bring_nothing_back_before_the_end_and_after_it() -> None:
    found = moved_by_hand("cpu")
    assert sum(len(f) for f in found) == 9 * 6 + 3 * (len(found) - 6)  # scores and values until the mask is fixed
    pruned = {n: int((~m).sum()) for n, m in found[-1].items()}
    assert sum(pruned.values()) == 312 and the_same(found[-1], found[6])


def check_resumes(start: Callable[[], tuple[Any, ...]]) -> None:
    """Interrupted after any step and taken up in either order of the parts, a training ends with the same bits."""
    parts = start()
    saved = []
    for t in range(LAST):
        saved.append(copy.deepcopy([part.state_dict() for part in parts]))
        train(parts[0], parts[1], range(t, t + 1))
    wanted = [part.state_dict() for part in parts]
    assert sum("movement" in s[2] for s in saved) == END, "until the mask is fixed"
    for t, states in enumerate(saved):
        for order in ((0, 1, 2), (2, 1, 0)):
            again = start()
            for i in order:
                again[i].load_state_dict(copy.deepcopy(states[i]))
            train(again[0], again[1], range(t, LAST))
            assert the_same([part.state_dict() for part in again], wanted), (t, order)


@pytest.mark.parametrize(
    ("optimizer", "way"),
    [("sgd momentum", "global"), ("adamw fused", "uniform"), ("nadam", "soft"), ("of the user's", "soft")],
)
def test_interrupted_at_any_step_and_resumed_is_uninterrupted(optimizer: str, way: str) -> None:
    check_resumes(lambda: started(way, optimizer))


def test_a_state_goes_through_a_file_and_back_in_time(tmp_path: Any) -> None:
    model, opt, pruner = started("global")
    train(model, opt, range(5))
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    early = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, range(5, LAST))
    wanted = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    pruner.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))  # after the end, to before it
    model.load_state_dict(early[0])
    opt.load_state_dict(early[1])
    train(model, opt, range(5, LAST))
    assert the_same((model.state_dict(), pruner.state_dict()), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_deep_copy_goes_its_own_way(way: str) -> None:
    model, opt, pruner = started(way)
    train(model, opt, range(6))
    other, other_opt, other_pruner = copy.deepcopy((model, opt, pruner))
    before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    train(other, other_opt, range(6, LAST))
    assert the_same((model.state_dict(), pruner.state_dict()), before)
    train(model, opt, range(6, LAST))
    assert the_same(model.state_dict(), other.state_dict())
    assert the_same(pruner.state_dict(), other_pruner.state_dict())


def test_a_plan_goes_by_the_scores_and_touches_nothing() -> None:
    model, opt, pruner = started("global")
    train(model, opt, range(7))
    before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    made = pruner.plan(0.9)
    assert the_same((model.state_dict(), pruner.state_dict()), before)
    assert made.criterion == "movement" and sum(r.prune for r in made.chosen) == prune_count(416, 0.9)
    flat = torch.cat([s.flatten() for _, s in sorted(before[1]["movement"]["scores"].items())])
    assert made.masks is not None
    kept = torch.cat([unpack(made.masks[n], 0, before[0][n].numel()) for n in sorted(made.masks)])
    assert flat[kept].min() >= flat[~kept].max()
