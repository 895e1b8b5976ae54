"""A Pruner in the loops that people write: the model is left alone, tied stays tied, and what cannot be is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur import BadInput, BadTensor, NotDefined, PlanMismatch, Pruner, SecateurWarning, schedules
from tests.contract.training import (
    NETS,
    OPTIMIZERS,
    STEPS,
    Attention,
    Convolutional,
    Halved,
    Recurrent,
    Tied,
    batch,
    check_held,
    net,
    the_same,
    train,
    weights,
)  # fmt: skip


def test_the_model_is_left_alone() -> None:
    model, plain = net(), net()
    where = [p.data_ptr() for p in model.parameters()]
    opt = torch.optim.AdamW(model.parameters())
    Pruner(model, opt, schedules.cubic(0.75, begin=0, end=4))
    train(model, opt, range(5))
    assert [p.data_ptr() for p in model.parameters()] == where
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_deep_copy_goes_its_own_way() -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.cubic(0.75, begin=1, end=6))
    train(model, opt, range(3))
    other, other_opt, other_pruner = copy.deepcopy((model, opt, pruner))
    before = copy.deepcopy(model.state_dict())
    train(other, other_opt, range(3, STEPS), lambda: check_held(other, other_pruner, other_opt) and None)
    assert the_same(model.state_dict(), before) and pruner.steps == 3 and other_pruner.steps == STEPS
    train(model, opt, range(3, STEPS))
    assert the_same(other.state_dict(), model.state_dict())
    assert the_same(other_pruner.state_dict(), pruner.state_dict())


def test_compiled_whole_and_not_again_when_a_mask_changes() -> None:
    model, compiled = net(), []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, opt, schedules.cubic(0.75, begin=1, end=6))
    fast = torch.compile(model, fullgraph=True, backend=backend)
    train(fast, opt, range(STEPS), lambda: check_held(model, pruner, opt) and None)
    assert len(compiled) == 1 and pruner.sparsity == 0.75


def test_step_by_hand_equals_the_attached_optimizer() -> None:
    a, b = net(), net()
    schedule = schedules.cubic(0.75, begin=1, end=6)
    opt_a, opt_b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b))
    Pruner(a, opt_a, schedule)
    train(a, opt_a, range(STEPS))
    by_hand = Pruner(b, None, schedule)
    train(b, opt_b, range(STEPS), by_hand.step)
    assert the_same(a.state_dict(), b.state_dict())


def test_step_with_an_attached_optimizer_is_refused() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters())
    pruner = Pruner(model, opt)
    with pytest.raises(BadInput, match="counted already"):
        pruner.step()
    with pytest.raises(BadInput, match="attached already"):
        pruner.attach(opt)
    assert pruner.steps == 0


def test_optimizers_that_cannot_be_are_refused_before_anything_is_touched() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    for bad, error, words in [
        (torch.optim.LBFGS(model.parameters()), NotDefined, "LBFGS"),
        (torch.optim.SGD(net().parameters()), BadInput, "none of the parameters"),
        ("adam", BadInput, "must be a torch optimizer"),
    ]:
        with pytest.raises(error, match=words):
            Pruner(model, bad, schedules.constant(0.5))
        assert the_same(model.state_dict(), before)


def test_a_step_that_the_scaler_skips_does_not_count() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.one_shot(0.5, at=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t, factor in enumerate([1.0, float("inf"), 1.0]):
        opt.zero_grad()
        scaler.scale(model(batch(t)).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
        assert (pruner.steps, pruner.sparsity) == [(1, 0.0), (1, 0.0), (2, 0.5)][t]


def test_clipping_sees_masked_gradients_and_accumulation_too() -> None:
    model = net()
    secateur.prune(model, 0.75)
    pruner = Pruner(model)
    for t in range(2):
        model(batch(t)).square().mean().backward()
    norm = torch.nn.utils.clip_grad_norm_([model.get_parameter(n) for n in pruner.masks()], 1e9)
    live = [model.get_parameter(n).grad[m] for n, m in pruner.masks().items()]  # type: ignore[index]
    assert torch.isclose(norm, torch.cat(live).norm())
    assert all(not model.get_parameter(n).grad[~m].any() for n, m in pruner.masks().items())  # type: ignore[index]


def test_unmasked_gradients_still_leave_zeros() -> None:
    model = net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.constant(0.75), grad_mask=False)
    train(model, opt, range(3), lambda: check_held(model, pruner) and None)
    assert any(model.get_parameter(n).grad[~m].any() for n, m in pruner.masks().items())  # type: ignore[index]


def test_several_optimizers_count_by_the_first() -> None:
    model = net()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    pruner = Pruner(model, [first, second], schedules.cubic(0.75, begin=0, end=4))
    for t in range(5):
        first.zero_grad()
        second.zero_grad()
        model(batch(t)).square().mean().backward()
        second.step()
        first.step()
        check_held(model, pruner, first)
        check_held(model, pruner, second)
    assert pruner.steps == 5 and pruner.sparsity == 0.75


def test_a_loop_that_never_steps_is_warned_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    Pruner(model, None, schedules.one_shot(0.5, at=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            model(torch.ones(1, 4)).sum().backward()
    told = [str(w.message) for w in caught if issubclass(w.category, SecateurWarning)]
    assert len(told) == 1 and "pruner.step()" in told[0]


def test_frozen_parameters_are_left_out_and_refused_by_name() -> None:
    model = net()
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecateurWarning)
        pruner = Pruner(model, None, schedules.constant(0.5))
    assert "2.weight" not in pruner.masks() and torch.equal(model[2].weight, before)
    with pytest.raises(BadInput, match=r"2\.weight"):
        Pruner(model, None, schedules.constant(0.5), include="2.weight")


def test_tied_weights_are_masked_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[4].weight = model[0].weight
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.cubic(0.5, begin=1, end=4))
    train(model, opt, range(6), lambda: check_held(model, pruner, opt) and None)
    assert set(pruner.masks()) == {"0.weight", "2.weight"}
    assert model[4].weight is model[0].weight
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 64


def test_a_wholly_zero_tensor_is_not_held_without_a_schedule() -> None:
    model = net()
    secateur.prune(model, 0.5)
    nn.init.zeros_(model[4].weight)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt)
    train(model, opt, range(2))
    assert pruner.masks()["4.weight"].all() and model[4].weight.count_nonzero() > 0
    assert check_held(model, pruner, opt) > 0


def test_weights_live_again_in_the_dense_phases_of_ac_dc() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, opt, schedules.ac_dc(0.75, begin=1, end=7, sparse=2, dense=2), regrow=True)
    seen: list[tuple[float, int]] = []

    def each() -> None:
        check_held(model, pruner, opt)
        live = sum(int(model.get_parameter(n).count_nonzero()) for n in pruner.masks())
        seen.append((pruner.sparsity, live))

    train(model, opt, range(STEPS), each)
    n = weights(model)
    assert [s for s, _ in seen] == [0.75, 0.75, 0, 0, 0.75, 0.75, 0.75, 0.75]
    assert seen[3][1] > 0.9 * n and seen[-1][1] == n // 4  # a unit with no way out gets no gradient at first


def test_without_regrow_a_schedule_that_falls_gives_nothing_back() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, lambda t: 0.75 if t < 3 else 0.25)
    train(model, opt, range(6), lambda: check_held(model, pruner, opt) and None)
    assert check_held(model, pruner) == weights(model) * 3 // 4


def test_an_averaged_copy_is_made_sparse() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.one_shot(0.75, at=3))
    train(model, opt, range(5), lambda: average.update_parameters(model))
    assert average.module[0].weight.count_nonzero() == 128
    for copied in (average, average.module):
        pruner.apply(copied)
        for name, mask in pruner.masks().items():
            assert torch.equal(average.module.get_parameter(name) != 0, mask)
    with pytest.raises(PlanMismatch, match=r"2\.weight"):
        pruner.apply(nn.Sequential(nn.Linear(8, 16)))


def test_nan_in_the_middle_is_an_error_with_the_step_and_the_tensor() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model, opt, schedules.one_shot(0.5, at=3))
    train(model, opt, range(2))
    model(batch(2)).square().mean().backward()
    with torch.no_grad():
        model[2].weight[1, 1] = float("nan")
    with pytest.raises(BadTensor, match=r"at step 3: .*2\.weight"):
        opt.step()


@pytest.mark.parametrize("name", ["sgd momentum", "adamw", "adafactor"])
@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_weight_trains(kind: type[nn.Module], name: str) -> None:
    torch.manual_seed(0)
    model = kind()
    opt = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, opt, schedules.cubic(0.75, begin=1, end=5))
    train(model, opt, range(7), lambda: check_held(model, pruner, opt) and None)
    masks = pruner.masks()
    assert masks.keys() >= {
        Convolutional: {"first.weight", "second.weight"}, Attention: {"attention.in_proj_weight"},
        Recurrent: {"lstm.weight_hh_l1"}, Tied: {"down.weight"}, Halved: {"second.weight"},
    }[kind]  # fmt: skip
    assert check_held(model, pruner, opt) == round(0.75 * sum(m.numel() for m in masks.values()))
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(batch(0))).all()


def test_closed_leaves_the_zeros_and_no_hook() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, schedules.constant(0.5))
    pruner.close()
    train(model, opt, range(1))
    assert pruner.steps == 0 and model[0].weight.count_nonzero() == 128
