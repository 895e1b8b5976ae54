"""Promise 6 whoever writes the gradients: by hand, with noise, clipped, in a closure, in a hook; under every optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import secateur
from secateur import Pruner, dynamic, schedules
from tests.contract.training import (
    MIXING,
    NO_ZERO_STATE,
    OPTIMIZERS,
    STEPS,
    batch,
    check_held,
    net,
    the_same,
    weights,
)  # fmt: skip

ALL = {**OPTIMIZERS, "of the user's": MIXING["of the user's"]}


def loss_of(model: nn.Module, t: int) -> Tensor:
    x = batch(t)
    loss: Tensor = (model(x) - x.flip(1)).square().mean()
    return loss


def noise(model: nn.Module, t: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def by_hand(model: nn.Module, t: int) -> None:
    for p, n in zip(model.parameters(), noise(model, t), strict=True):
        p.grad = n


def by_hand_with_as_many_writes(model: nn.Module, t: int) -> None:
    """So that what replaces a masked gradient has been written as often, and may lie where that one lay."""
    loss_of(model, t).backward()
    for p, n in zip(model.parameters(), noise(model, t), strict=True):
        assert p.grad is not None
        writes, p.grad = p.grad._version, None
        for _ in range(writes):
            n.mul_(1)
        p.grad = n


def expanded(model: nn.Module, t: int) -> None:
    """Of the pruned ones: not every optimizer can read such a gradient."""
    by_hand(model, t)
    for p in model.parameters():
        if p.ndim == 2:
            p.grad = torch.tensor(0.1 * (t + 1)).expand(p.shape)


def of_inference_mode(model: nn.Module, t: int) -> None:
    """Of the pruned ones: not every optimizer can write such a gradient."""
    by_hand(model, t)
    with torch.inference_mode():
        made = noise(model, t)
    for p, n in zip(model.parameters(), made, strict=True):
        if p.ndim == 2:
            p.grad = n


def noise_in_place(model: nn.Module, t: int) -> None:
    loss_of(model, t).backward()
    for p, n in zip(model.parameters(), noise(model, t), strict=True):
        assert p.grad is not None
        p.grad.add_(n)


def noise_out_of_place(model: nn.Module, t: int) -> None:
    loss_of(model, t).backward()
    for p, n in zip(model.parameters(), noise(model, t), strict=True):
        p.grad = p.grad + n


def noise_in_all_at_once(model: nn.Module, t: int) -> None:
    loss_of(model, t).backward()
    torch._foreach_add_([p.grad for p in model.parameters()], noise(model, t))


def copied_in(model: nn.Module, t: int) -> None:
    loss_of(model, t).backward()
    for p, n in zip(model.parameters(), noise(model, t), strict=True):
        assert p.grad is not None
        p.grad.copy_(n)


def noise_and_clipping_between_micro_batches(model: nn.Module, t: int) -> None:
    noise_in_place(model, t)
    loss_of(model, t + 50).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(0.01)


WAYS: dict[str, Callable[[nn.Module, int], None]] = {
    f.__name__: f
    for f in (
        by_hand, by_hand_with_as_many_writes, expanded, of_inference_mode, noise_in_place, noise_out_of_place,
        noise_in_all_at_once, copied_in, noise_and_clipping_between_micro_batches,
    )
}  # fmt: skip


def mask_by_hand(model: nn.Module, pruner: Pruner) -> None:
    for name, keep in pruner.masks().items():
        p = model.get_parameter(name)
        assert p.grad is not None
        p.grad = torch.where(keep, p.grad, 0.0)


def started(optimizer: str) -> tuple[nn.Module, Optimizer, Pruner]:
    model = net()
    secateur.prune(model, 0.75)
    opt = ALL[optimizer](model.parameters())
    return model, opt, Pruner(model, opt)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ALL)
def test_zero_stays_zero_and_all_is_as_if_one_had_masked_the_gradients_oneself(optimizer: str, way: str) -> None:
    model, opt, pruner = started(optimizer)
    other, other_opt, other_pruner = started(optimizer)
    for t in range(4):
        opt.zero_grad()
        WAYS[way](model, t)
        opt.step()
        assert check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt) == 0.75 * weights(model)
        other_opt.zero_grad()
        WAYS[way](other, t)
        mask_by_hand(other, other_pruner)
        other_opt.step()
        assert the_same([model.state_dict(), opt.state_dict()], [other.state_dict(), other_opt.state_dict()]), t


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_that_writes_gradients_gives_what_the_loop_gives(optimizer: str, named: bool) -> None:
    model, opt, pruner = started(optimizer)
    other, other_opt, _ = started(optimizer)
    for t in range(4):

        def closure() -> Tensor:
            opt.zero_grad()
            noise_out_of_place(model, t)  # noqa: B023
            return loss_of(model, t).detach()  # noqa: B023

        opt.step(closure=closure) if named else opt.step(closure)
        check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt)
        other_opt.zero_grad()
        noise_out_of_place(other, t)
        other_opt.step()
        assert the_same([model.state_dict(), opt.state_dict()], [other.state_dict(), other_opt.state_dict()]), t


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("optimizer", ALL)
def test_a_hook_that_writes_gradients_brings_nothing_back_before_the_pruners_or_after_it(
    optimizer: str, late: bool
) -> None:
    model = net()
    secateur.prune(model, 0.75)
    opt = ALL[optimizer](model.parameters())
    steps = iter(range(STEPS))

    def hook(*_: Any) -> None:
        for p, n in zip(model.parameters(), noise(model, next(steps)), strict=True):
            assert p.grad is not None
            p.grad.add_(n)

    if not late:
        opt.register_step_pre_hook(hook)
    pruner = Pruner(model, opt)
    if late:
        opt.register_step_pre_hook(hook)
    for t in range(4):
        opt.zero_grad()
        loss_of(model, t).backward()
        opt.step()
        check_held(model, pruner, None if optimizer in NO_ZERO_STATE else opt)
    assert check_held(model, pruner) == 0.75 * weights(model)


@pytest.mark.parametrize("optimizer", [n for n in ALL if n != "sgd nesterov"])  # which writes gradients itself
def test_gradients_that_nobody_wrote_are_not_written_again(optimizer: str) -> None:
    model, opt, _ = started(optimizer)
    for t in range(2):
        opt.zero_grad()
        loss_of(model, t).backward()
        written = [p.grad._version for p in model.parameters() if p.grad is not None]
        opt.step()
        assert [p.grad._version for p in model.parameters() if p.grad is not None] == written


def test_a_gradient_that_comes_back_after_the_mask_has_changed_is_masked_anew() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, opt, schedules.join([schedules.constant(0.25), schedules.constant(0.75)], [1]))
    loss_of(model, 0).backward()
    kept = [p.grad for p in model.parameters()]
    opt.zero_grad()
    opt.step()
    for p, gradient in zip(model.parameters(), kept, strict=True):
        p.grad = gradient
    opt.step()
    assert check_held(model, pruner, opt) == 0.75 * weights(model)


def test_several_optimizers_and_tied_weights() -> None:
    model = net()
    model.append(nn.Linear(8, 16))
    model[5].weight = model[0].weight
    first = torch.optim.SGD([*model[0].parameters(), model[5].bias], lr=0.1, momentum=0.9)
    second = torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    pruner = Pruner(model, [first, second], schedules.cubic(0.75, begin=1, end=4))
    for t in range(6):
        by_hand(model, t)
        first.step()
        noise_into = [p.grad for p in model[2].parameters()]
        torch._foreach_add_(noise_into, 1.0)
        second.step()
        check_held(model, pruner, first)
        check_held(model, pruner, second)
    assert pruner.sparsity == 0.75 and model[5].weight is model[0].weight


def test_a_scaled_step_of_noisy_gradients() -> None:
    model, opt, pruner = started("adamw fused")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t, factor in enumerate([1.0, float("inf"), 1.0]):
        opt.zero_grad()
        scaler.scale(loss_of(model, t) * factor).backward()  # type: ignore[no-untyped-call]
        if t:
            scaler.unscale_(opt)
        torch._foreach_add_([p.grad for p in model.parameters()], noise(model, t))
        scaler.step(opt)
        scaler.update()
        assert check_held(model, pruner, opt) == 0.75 * weights(model)
    assert pruner.steps == 2


REWIRED: dict[str, dict[str, Any]] = {
    "rigl": {"schedule": schedules.constant(0.75), "rewire": dynamic.rigl(every=3, end=7, drop=0.5)},
    "set": {"schedule": schedules.constant(0.75), "rewire": dynamic.random_growth(every=3, end=7, drop=0.5)},
    "movement": {"schedule": schedules.cubic(0.75, begin=1, end=5), "rewire": dynamic.movement(every=2, end=6)},
    "gradual": {"schedule": schedules.cubic(0.75, begin=1, end=5)},
    "held": {},
}


def rewired(how: str, optimizer: str) -> tuple[nn.Module, Pruner, Optimizer]:
    model = net()
    if how == "held":
        secateur.prune(model, 0.75)
    opt = ALL[optimizer](model.parameters())
    return model, Pruner(model, opt, **REWIRED[how]), opt


def train(model: nn.Module, opt: Optimizer, way: str, steps: range, each: Callable[[], Any] = lambda: None) -> None:
    for t in steps:
        opt.zero_grad()
        WAYS[way](model, t)
        opt.step()
        each()


@pytest.mark.parametrize("way", ["by_hand", "noise_in_place"])
@pytest.mark.parametrize("how", REWIRED)
@pytest.mark.parametrize("optimizer", ["sgd momentum", "sgd nesterov", "adamw fused", "adafactor", "of the user's"])
def test_moving_masks_hold_and_resume_is_exact(optimizer: str, how: str, way: str) -> None:
    model, pruner, opt = parts = rewired(how, optimizer)
    saved: list[Any] = [copy.deepcopy([p.state_dict() for p in parts])]

    def each() -> None:
        check_held(model, pruner, opt)
        saved.append(copy.deepcopy([p.state_dict() for p in parts]))

    train(model, opt, way, range(STEPS), each)
    assert pruner.sparsity == 0.75 and pruner.steps == STEPS
    for t in range(0, STEPS, 2):
        again = rewired(how, optimizer)
        for part, state in zip(again, copy.deepcopy(saved[t]), strict=True):
            part.load_state_dict(state)
        train(again[0], again[2], way, range(t, STEPS))
        assert the_same([p.state_dict() for p in again], saved[-1]), t


def test_rigl_grows_where_the_gradients_as_they_were_written_are_largest() -> None:
    model, pruner, opt = rewired("rigl", "sgd momentum")
    train(model, opt, "by_hand", range(2))
    before = pruner.masks()
    live = {n: model.get_parameter(n).detach().abs() for n in before}
    written = dict(zip((n for n, _ in model.named_parameters()), noise(model, 2), strict=True))
    train(model, opt, "by_hand", range(2, 3))
    grown = 0
    for name, now in pruner.masks().items():
        stays = now & before[name] & (live[name] > 0)
        come = now & ~before[name]
        passed_over = ~now & ~before[name]
        grown += int(come.sum())
        assert stays.any() and int(now.sum()) == int(before[name].sum())
        if come.any() and passed_over.any():
            assert written[name][come].abs().min() >= written[name][passed_over].abs().max()
    assert grown
