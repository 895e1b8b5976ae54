"""Training with zeros on a GPU: the same promises, and the same masks as on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import secateur
from secateur import Pruner, regularize, schedules
from tests.contract.training import (
    NO_ZERO_STATE,
    OPTIMIZERS,
    PATTERNS,
    STEPS,
    batch,
    check_held,
    moved_by_hand,
    net,
    the_same,
    weights,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUBIC = schedules.cubic(0.75, begin=1, end=6, every=2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        optimizer.zero_grad()
        x = batch(t).cuda()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adagrad fused"])  # which torch has for the CPU alone
def test_zero_stays_zero(name: str) -> None:
    model = net().cuda()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))
    pruner = Pruner(model, optimizer, CUBIC)
    for t in range(2, 2 + STEPS):
        train(model, optimizer, range(t, t + 1))
        check_held(model, pruner, None if name in NO_ZERO_STATE else optimizer)
    assert check_held(model, pruner) == round(0.75 * weights(model)) and pruner.sparsity == 0.75


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_those_of_the_cpu(pattern: str) -> None:
    here, there = net(), net().cuda()
    masks = [Pruner(m, None, schedules.constant(0.5), pattern=pattern).masks() for m in (here, there)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][n], masks[1][n].cpu()) for n in masks[0])


def test_a_state_goes_from_one_device_to_the_other() -> None:
    there = net().cuda()
    pruner = Pruner(there, None, schedules.constant(0.5))
    here = Pruner(net(seed=3), None, schedules.constant(0.5))
    here.load_state_dict(pruner.state_dict())
    assert all(torch.equal(m, pruner.masks()[n].cpu()) for n, m in here.masks().items())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model = net().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    pruner = Pruner(model, optimizer, CUBIC)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    for t in range(STEPS):
        optimizer.zero_grad()
        x = batch(t).cuda() * (float("inf") if t == 3 else 1.0)
        with torch.autocast("cuda", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert pruner.steps == STEPS - 1 and pruner.sparsity == 0.75
    check_held(model, pruner, optimizer)


@pytest.mark.parametrize("grow", ["rigl", "random_growth"])
def test_moving_masks_are_those_of_the_cpu(grow: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        rewire = getattr(secateur.dynamic, grow)(every=2, end=8)
        pruner = Pruner(model, optimizer, schedules.constant(0.75), criterion="random", allocation="erk", rewire=rewire)
        before = {n: int(m.sum()) for n, m in pruner.masks().items()}
        for t in range(2):
            optimizer.zero_grad()
            for i, p in enumerate(model.parameters()):  # the same gradients on both devices
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(device)
            optimizer.step()
        assert {n: int(m.sum()) for n, m in pruner.masks().items()} == before
        found.append({n: m.cpu() for n, m in pruner.masks().items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_movement_is_that_of_the_cpu() -> None:
    assert the_same(moved_by_hand("cpu"), moved_by_hand("cuda"))


def test_iterative_pruning_and_its_random_numbers(tmp_path: Path) -> None:
    def run(folder: Path) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(*net(), nn.Dropout(0.1)).cuda()
        rounds = secateur.iterate(
            model, folder, epochs=2, rounds=2, rate=0.5, rewind=2,
            make_optimizer=lambda m: (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), None),
            make_data=lambda g: [batch(int(i)).cuda() for i in torch.randperm(4, generator=g)],
            loss=lambda m, x: (m(x) - x).square().mean(),
        )  # fmt: skip
        assert [r.sparsity for r in rounds] == [0.0, 0.5, 0.75]
        return [r.masks() for r in rounds]

    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


def test_compiled_whole_and_not_again_when_a_mask_changes() -> None:
    model = net().cuda()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = Pruner(model, optimizer, CUBIC)
    for t in range(STEPS):
        optimizer.zero_grad()
        compiled(batch(t).cuda()).square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1 and pruner.sparsity == 0.75
    x = batch(0).cuda()
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    check_held(model, pruner, optimizer)


def test_copies_go_their_own_way() -> None:
    model = net().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, schedules.constant(0.5))
    m, o, p = copy.deepcopy((model, optimizer, pruner))
    train(m, o, range(3))
    check_held(m, p)
    assert pruner.steps == 0 and p.steps == 3


def test_proximal_steps_are_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        regularize.attach(model, optimizer, regularize.l1(0.1))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        found.append([p.detach().cpu() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any(int((a == 0).sum()) for a in found[0])
