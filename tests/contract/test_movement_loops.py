"""Movement pruning in the loops that people write: scalers, accumulation, clipping, closures; and what cannot be is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import (
    BadInput,
    BadTensor,
    Infeasible,
    NotDefined,
    NothingChosen,
    PlanMismatch,
    Pruner,
    SecateurWarning,
    dynamic,
    schedules,
)
from tests.contract.test_movement import CUBIC, END, HARD, LAST, SOFT, WAYS, started
from tests.contract.training import NETS, OPTIMIZERS, Tied, batch, check_held, net, the_same, train


def everything(model: nn.Module, opt: torch.optim.Optimizer, pruner: Pruner) -> Any:
    return copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x.flip(1)).square().mean()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["sgd momentum", "sgd fused", "adamw", "adamw fused"])
def test_scores_are_of_gradients_without_the_scale_and_of_no_step_that_is_skipped(optimizer: str, way: str) -> None:
    plain, scaled = started(way, optimizer), started(way, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)  # powers of two, so nothing is rounded

    def step(t: int, factor: float = 1.0) -> None:
        scaled[1].zero_grad()
        scaler.scale(loss_of(scaled[0], batch(t)) * factor).backward()
        scaler.step(scaled[1])
        scaler.update()

    for t in range(END - 1):
        train(plain[0], plain[1], range(t, t + 1))
        if t in (1, 5):
            before = everything(*scaled)
            step(t, float("inf"))
            assert the_same(everything(*scaled), before)
        step(t)
        assert scaled[2].steps == t + 1
    assert the_same(scaled[2].state_dict(), plain[2].state_dict())
    assert the_same(scaled[0].state_dict(), plain[0].state_dict())


def test_the_gradients_are_those_of_all_micro_batches_and_dense_until_the_step() -> None:
    model, opt, pruner = started("global")
    for t in range(LAST):
        opt.zero_grad()
        loss_of(model, batch(t)).backward()
        loss_of(model, batch(50 + t)).backward()
        masks, state = pruner.masks(), pruner.state_dict().get("movement")
        parameters = {n: model.get_parameter(n) for n in masks}
        gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        pruned = [bool(gradients[n][~m].any()) for n, m in masks.items() if not m.all()]
        assert all(pruned) if t < END else not any(pruned), "dense as long as they are looked at"
        before = {n: p.detach().clone() for n, p in parameters.items()}
        opt.step()
        if t < END - 1 and state is not None:
            now = pruner.state_dict()["movement"]["scores"]
            for n, g in gradients.items():
                assert torch.equal(now[n], state["scores"][n] - g * (before[n] + state["values"][n]))


def test_scores_are_of_what_clipping_leaves() -> None:
    model, opt, pruner = started("global")
    opt.zero_grad()
    loss_of(model, batch(0)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = copy.deepcopy(model.state_dict())
    opt.step()
    for name, scores in pruner.state_dict()["movement"]["scores"].items():
        assert torch.equal(scores, -(gradients[name] * before[name]))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("way", ["global", "soft"])
def test_a_closure_is_called_once_a_step_and_gives_the_same(way: str, named: bool) -> None:
    a, b = started(way), started(way)
    train(a[0], a[1], range(LAST))
    calls = []
    for t in range(LAST):

        def closure(t: int = t) -> Tensor:
            calls.append(t)
            b[1].zero_grad()
            loss = loss_of(b[0], batch(t))
            loss.backward()
            return loss

        loss = b[1].step(closure=closure) if named else b[1].step(closure)  # type: ignore[call-overload]
        assert float(loss.detach()) > 0
    assert calls == list(range(LAST)) and the_same(everything(*a), everything(*b))


def test_a_second_step_on_the_same_gradients_brings_nothing_back() -> None:
    model, opt, pruner = started("global", "adamw")
    for t in range(LAST):
        train(model, opt, range(t, t + 1))
        opt.step()
        check_held(model, pruner, opt)
    assert pruner.sparsity == 0.75


@pytest.mark.parametrize("kind", NETS)
def test_every_kind_of_weight_trains(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    opt = OPTIMIZERS["adamw"](model.parameters())
    pruner = Pruner(model, opt, **WAYS["global"])
    train(model, opt, range(LAST), lambda: check_held(model, pruner, opt) and None)
    assert check_held(model, pruner) == round(0.75 * sum(m.numel() for m in pruner.masks().values()))
    if isinstance(model, Tied):
        assert model.up.weight is model.down.weight and "up.weight" not in pruner.masks()


def test_an_averaged_copy_is_made_sparse() -> None:
    model, opt, pruner = started("global")
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, opt, range(LAST), lambda: average.update_parameters(model))
    pruner.apply(average)
    for name, mask in pruner.masks().items():
        assert torch.equal(average.module.get_parameter(name) != 0, mask)


def test_closed_it_leaves_the_zeros_and_remembers_nothing() -> None:
    model, opt, pruner = started("global")
    train(model, opt, range(7))
    zeros = check_held(model, pruner)
    pruner.close()
    assert zeros and check_held(model, pruner) == zeros and "movement" not in pruner.state_dict()
    train(model, opt, range(7, 9))
    assert pruner.steps == 7 and not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_tensor_without_a_gradient_keeps_its_scores_and_is_warned_of() -> None:
    model, opt, pruner = started("uniform")
    with pytest.warns(SecateurWarning, match=r"at step 4: no gradient has moved the scores of 4\.weight"):
        for t in range(4):
            opt.zero_grad()
            model[:3](batch(t)).square().mean().backward()  # type: ignore[index]
            opt.step()
    assert not pruner.state_dict()["movement"]["scores"]["4.weight"].any()
    mask = pruner.masks()["4.weight"].flatten()
    assert not mask[: int((~mask).sum())].any(), "of equal scores the lower index goes"


def test_a_layer_that_soft_movement_empties_is_warned_of_once() -> None:
    how = dynamic.soft_movement(schedules.constant(0.1), lr=1e4, strength=1.0, every=1, end=END)
    model, opt, pruner = started("soft", rewire=how)
    with pytest.warns(SecateurWarning, match=r"at step 1: left with nothing: .*weaken strength") as caught:
        train(model, opt, range(4))
    assert len(caught) == 1 and pruner.sparsity == 1.0


@pytest.mark.parametrize("way", ["global", "soft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_what_is_not_finite_is_refused_before_anything_is_touched(where: str, value: float, way: str) -> None:
    model, opt, pruner = started(way)
    train(model, opt, range(5))
    opt.zero_grad()
    loss_of(model, batch(0)).backward()
    weight = model.get_parameter("4.weight")
    live = tuple(pruner.masks()["4.weight"].nonzero()[0])
    grad = weight.grad
    assert grad is not None
    with torch.no_grad():
        (grad if where == "gradient" else weight)[live] = value
    before = everything(model, opt, pruner)
    what = "the gradient of " if where == "gradient" else ""
    with pytest.raises(BadTensor, match=rf"at step 6: {what}'4\.weight' \(shape \(8, 12\).* holds 1 NaN"):
        opt.step()
    assert str(everything(model, opt, pruner)) == str(before)
    with torch.no_grad():
        weight[live] = 0.5
    train(model, opt, range(5, LAST))
    assert pruner.steps == LAST


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, opt, CUBIC, rewire=HARD, include="0.weight")
    before = everything(model, opt, pruner)
    model(torch.arange(4)).square().mean().backward()
    with pytest.raises(BadTensor, match=r"gradient of '0\.weight' \(shape \(10, 8\).* is sparse"):
        opt.step()
    assert the_same(everything(model, opt, pruner), before)


def test_a_model_that_was_cast_is_named() -> None:
    model, opt, _ = started("global")
    train(model, opt, range(3))
    model.double()
    with pytest.raises(BadTensor, match=r"at step 4: '0\.weight' .* is torch\.float64 now"):
        model(batch(3).double()).square().mean().backward()
        opt.step()


class Own:
    """A schedule of the user's that prunes from the start."""

    def __call__(self, step: int) -> float:
        return 0.5


REFUSED: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no schedule": (NotDefined, "begins at 0", {"schedule": None}),
    "from the start": (NotDefined, "begins at 0", {"schedule": schedules.constant(0.5)}),
    "a function from the start": (NotDefined, "no scores before the first", {"schedule": Own()}),
    "dense phases": (NotDefined, "gives weights back", {"schedule": schedules.ac_dc(0.5, begin=1, end=7, sparse=2, dense=2)}),
    "too long": (BadInput, "end=11", {"schedule": schedules.cubic(0.5, begin=1, end=END + 1)}),
    "to nothing": (BadInput, "ends at 0", {"schedule": schedules.cubic(0.0, begin=1, end=5)}),
    "random": (NotDefined, "criterion", {"criterion": "random"}),
    "lamp": (NotDefined, "LAMP", {"allocation": "lamp"}),
    "N:M": (NotDefined, "2:4", {"pattern": "2:4", "schedule": schedules.cubic(0.5, begin=1, end=5)}),
    "channels": (NotDefined, "channel", {"pattern": "channel"}),
    "regrow": (NotDefined, "regrow", {"regrow": True}),
    "dense gradients": (NotDefined, "grad_mask", {"grad_mask": False}),
    "a cap": (Infeasible, "max_sparsity", {"max_sparsity": 0.5}),
    "a glob": (NothingChosen, "nowhere", {"allocation": {"nowhere": 0.5}}),
    "soft, a schedule": (NotDefined, "does not say how much", {"rewire": SOFT}),
    "soft, shares": (NotDefined, "does not say how much", {"rewire": SOFT, "schedule": None, "allocation": "uniform"}),
    "soft, a cap": (NotDefined, "max_sparsity", {"rewire": SOFT, "schedule": None, "max_sparsity": 0.9}),
    "soft, a least": (NotDefined, "min_keep", {"rewire": SOFT, "schedule": None, "min_keep": 1}),
    "soft, a criterion": (NotDefined, "criterion", {"rewire": SOFT, "schedule": None, "criterion": "random"}),
    "soft, blocks": (NotDefined, "4x4", {"rewire": SOFT, "schedule": None, "pattern": "4x4"}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_before_anything_is_touched(case: str) -> None:
    error, words, choice = REFUSED[case]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        Pruner(model, torch.optim.SGD(model.parameters()), **{"schedule": CUBIC, "rewire": HARD, **choice})
    assert the_same(model.state_dict(), before)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_less_than_is_zero_already_is_refused() -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() < p.abs().quantile(0.9)] = 0
    with pytest.raises(BadInput, match="are zero already"):
        Pruner(model, None, **WAYS["global"])


def test_optimizers_that_do_not_go_with_it_are_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    whole, part = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](model[2].parameters())
    for bad, error, words in [
        (torch.optim.LBFGS(model.parameters()), NotDefined, "LBFGS"),
        ([whole, part], NotDefined, "several"),
        (part, BadInput, r"not all .*0\.weight, 4\.weight"),
        (OPTIMIZERS["sgd"](net().parameters()), BadInput, "holds none"),
    ]:
        with pytest.raises(error, match=words):
            Pruner(model, bad, CUBIC, rewire=HARD)
        assert the_same(model.state_dict(), before)
    pruner = Pruner(model, None, CUBIC, rewire=HARD)
    with pytest.raises(NotDefined, match="attach"):
        pruner.step()
    pruner.attach(whole)
    train(model, whole, range(LAST))
    assert pruner.steps == LAST and pruner.sparsity == 0.75


def test_masks_of_anothers_are_refused_and_states_that_do_not_fit() -> None:
    model, opt, pruner = started("global")
    train(model, opt, range(5))
    before = everything(model, opt, pruner)
    with pytest.raises(NotDefined, match="scores"):
        pruner.hold(pruner.masks())
    _, _, plain = started("global", rewire=None)
    _, _, soft = started("soft")
    state = before[2]
    short = {**state["movement"], "values": {n: t for n, t in state["movement"]["values"].items() if n != "2.weight"}}
    halves = {n: t.half() for n, t in state["movement"]["values"].items()}
    for spoilt, words in [
        (plain.state_dict(), "scores"),
        ({**state, "movement": short}, "values"),
        ({**state, "movement": {**state["movement"], "values": halves}}, "values"),
        ({**state, "movement": {"scores": state["movement"]["scores"]}}, "values"),
        ({**state, "movement": [1, 2]}, "scores"),
        ({**state, "steps": END}, "no use"),
    ]:
        with pytest.raises(PlanMismatch, match=words):
            pruner.load_state_dict(spoilt)
        assert the_same(everything(model, opt, pruner), before)
    with pytest.raises(PlanMismatch, match="same rewire="):
        plain.load_state_dict(state)
    assert soft.state_dict().keys() == state.keys()


def test_float8_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.float8_e4m3fn)
    with pytest.raises(BadTensor, match=r"'0\.weight' .*float8"):
        Pruner(model, None, CUBIC, rewire=HARD)


def test_a_loop_that_never_steps_is_warned() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    Pruner(model, None, rewire=SOFT)
    with pytest.warns(SecateurWarning, match="100 backward passes"):
        for _ in range(100):
            model(torch.ones(1, 4)).sum().backward()
