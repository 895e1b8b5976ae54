"""Statistics of gradients against loops and Hessians written out."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F

import secateur
from secateur.errors import SecateurWarning
from secateur.evaluate.gradients import MEASURED, gradients
from tests.contract.training import the_same

Batch = tuple[Tensor, Tensor]
FIRST_ORDER = {"grad", "fisher_diag"}


class Net(nn.Module):
    """A convolution, a norm, dropout and two linear layers, one of which is frozen; flags of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.drop, self.hidden, self.fc = nn.Dropout(0.5), nn.Linear(27, 6), nn.Linear(6, 4)
        self.hidden.weight.requires_grad_(False)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x)))
        out: Tensor = self.fc(torch.tanh(self.hidden(self.drop(x).flatten(1))))
        return out


NAMES = ("conv.weight", "fc.weight", "hidden.weight")


def batches(*sizes: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 5, 5, generator=g), torch.randint(0, 4, (n,), generator=g)) for n in sizes or (6, 4, 5)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def by_hand(model: nn.Module, data: list[Batch], names: tuple[str, ...] = NAMES) -> list[dict[str, Tensor]]:
    """The gradient of each batch, by backward on a copy."""
    out = []
    for batch in data:
        m = copy.deepcopy(model).eval().requires_grad_(True)
        loss(m, batch).backward()
        out.append({n: m.get_parameter(n).grad for n in names})
    return out


def singles(data: list[Batch]) -> list[Batch]:
    return [(x[None], y[None]) for batch in data for x, y in zip(*batch, strict=True)]


# First order


@pytest.mark.parametrize("per_sample", [False, True])
def test_means_of_gradients_and_of_their_squares(per_sample: bool) -> None:
    model, data = Net(), batches()
    found = gradients(model, data, loss, None, FIRST_ORDER, per_sample=per_sample)
    assert tuple(found) == NAMES
    hand = by_hand(model, singles(data) if per_sample else data)
    for n in NAMES:
        each = torch.stack([h[n] for h in hand])
        torch.testing.assert_close(found[n]["grad"], each.mean(0))
        torch.testing.assert_close(found[n]["fisher_diag"], each.square().mean(0))
        assert found[n]["grad"].dtype == torch.float32 and not found[n]["grad"].requires_grad


def test_samples_squared_are_more_than_batches_squared() -> None:
    model, data = Net(), batches(16, 16)
    whole, each = (gradients(model, data, loss, wanted="fisher_diag", per_sample=p) for p in (False, True))
    assert all(each[n]["fisher_diag"].mean() > 2 * whole[n]["fisher_diag"].mean() for n in NAMES)


Pair = namedtuple("Pair", "image label")
KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y, "a name"],
    "namedtuple": Pair,
    "dict": lambda x, y: {"image": x, "label": y, "weight": torch.tensor(1.0)},
    "tokenizer's": lambda x, y: UserDict(image=x, label=y),
    "nested": lambda x, y: {"image": [x], "label": (y, None)},
}


def loss_of_kind(model: nn.Module, batch: Any) -> Tensor:
    named = isinstance(batch, dict | UserDict)
    x, y = (batch["image"], batch["label"]) if named else batch[:2]
    return F.cross_entropy(model(x[0] if isinstance(x, list) else x), y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_cut_into_samples(kind: str) -> None:
    model, data = Net(), batches()
    made = [KINDS[kind](*b) for b in data]
    types: list[type] = []

    def looking(m: nn.Module, batch: Any) -> Tensor:
        types.append(type(batch))
        return loss_of_kind(m, batch)

    found = gradients(model, made, looking, wanted=FIRST_ORDER, per_sample=True)
    assert the_same(found, gradients(model, data, loss, wanted=FIRST_ORDER, per_sample=True))
    assert len(types) == 15
    assert kind == "tokenizer's" or set(types) == {type(made[0])}
    assert len(made[0]["image"] if kind == "dict" else made[0]) >= 2  # the user's own batches stay whole


def test_some_tensors_by_any_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    data = [torch.ones(2, 3)]
    found = gradients(model, data, lambda m, x: m(x).square().sum(), ["1.weight", "0.weight"])
    assert list(found) == ["0.weight"]
    biased = Net()
    assert list(gradients(biased, batches(), loss, ["fc.bias"])) == ["fc.bias"]


@pytest.mark.parametrize("how", ["one parameter", "two parameters of one memory"])
def test_tied_weights_are_one(how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight if how == "one parameter" else nn.Parameter(model[0].weight.data)
    x = torch.randn(4, 3)

    def of(w: Tensor) -> Tensor:
        return (torch.tanh(x @ w.T) @ w.T).pow(2).mean()

    w = model[0].weight.detach().clone().requires_grad_(True)
    found = gradients(
        model, [x], lambda m, b: m(b).pow(2).mean(), wanted={"grad", "fisher_diag", "hessian_diag"}, probes=600
    )
    (grad,) = torch.autograd.grad(of(w), w)
    assert list(found) == ["0.weight"]
    torch.testing.assert_close(found["0.weight"]["grad"], grad)
    torch.testing.assert_close(found["0.weight"]["fisher_diag"], grad.square())
    full = hessian(of, w.detach()).reshape(9, 9)
    close_to_diagonal(found["0.weight"]["hessian_diag"], full, 600)


def test_a_part_that_a_batch_does_not_use_has_no_gradient_there() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

        def forward(self, batch: tuple[Tensor, int]) -> Tensor:
            out: Tensor = (self.one, self.two)[batch[1]](batch[0])
            return out

    model, x = Routed(), torch.tensor([[2.0, 4.0]])
    found = gradients(
        model, [(x, 0), (x, 1), (3 * x, 1), (x, 1)], lambda m, b: m(b).sum(), wanted={*FIRST_ORDER, "hessian_diag"}
    )
    assert found["one.weight"]["grad"].tolist() == [[0.5, 1.0]]
    assert found["two.weight"]["fisher_diag"].tolist() == [[11.0, 44.0]]
    assert not found["one.weight"]["hessian_diag"].any()  # the loss is linear: there is nothing to differentiate again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_add_up_in_float32_at_least(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 1, bias=False).to(dtype)
    data = [torch.full((1, 8), 2.0**-k).to(dtype) for k in range(10)]
    found = gradients(
        model, data, lambda m, x: m(x).sum(), wanted={*FIRST_ORDER, "fisher_inverse_diag"}, block=4, damping=1.0
    )
    g = np.array([2.0**-k for k in range(10)])
    w = found["weight"]
    assert w["grad"].dtype == w["fisher_diag"].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    np.testing.assert_allclose(w["grad"].numpy(), np.full((1, 8), g.mean()), rtol=1e-6)
    np.testing.assert_allclose(w["fisher_diag"].numpy(), np.full((1, 8), (g**2).mean()), rtol=1e-6)
    inverse = np.linalg.inv((g**2).mean() * np.ones((4, 4)) + np.eye(4))
    np.testing.assert_allclose(w["fisher_inverse_diag"].numpy(), np.full((1, 8), inverse[0, 0]), rtol=1e-6)


# The Hessian's diagonal


def close_to_diagonal(found: Tensor, full: Tensor, draws: int) -> None:
    """Within five standard deviations of what is unbiased with a variance of the squares beside the diagonal."""
    exact = full.diagonal().reshape(found.shape)
    spread = (full.square().sum(1) - full.diagonal().square()).sqrt().reshape(found.shape) / draws**0.5
    assert bool(((found - exact).abs() <= 5 * spread + 1e-6).all())
    assert float(((found - exact).abs() / (spread + 1e-9)).mean()) < 1.6  # 0.8 if the variance is what is said


def test_the_diagonal_of_the_hessian() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    g = torch.Generator().manual_seed(2)
    data = [
        (torch.randn(5, 4, generator=g, dtype=torch.float64), torch.randint(0, 2, (5,), generator=g)) for _ in range(3)
    ]
    found = gradients(model, data, loss, wanted="hessian_diag", probes=500)
    state = {n: p.detach() for n, p in model.named_parameters()}
    joint = torch.cat([state[n].reshape(-1) for n in found])
    each = [hessian(lambda w, b=b: loss_at(model, state, list(found), w, b), joint) for b in data]
    exact = torch.stack([h.diagonal() for h in each]).mean(0)
    variance = torch.stack([h.square().sum(1) - h.diagonal().square() for h in each]).sum(0) / len(data) ** 2 / 500
    flat = torch.cat([f["hessian_diag"].reshape(-1) for f in found.values()])
    assert bool(((flat - exact).abs() <= 5 * variance.sqrt() + 1e-9).all())
    assert float((flat - exact).abs().max()) < 0.2 * float(exact.abs().max())


def loss_at(model: nn.Module, state: dict[str, Tensor], names: list[str], flat: Tensor, batch: Batch) -> Tensor:
    parts = dict(zip(names, flat.split([state[n].numel() for n in names]), strict=True))
    now = {**state, **{n: v.view(state[n].shape) for n, v in parts.items()}}
    return F.cross_entropy(functional_call(model, now, (batch[0],)), batch[1])


def test_every_draw_is_exact_where_the_hessian_is_diagonal() -> None:
    model = nn.Linear(50, 2, bias=False)
    scales = torch.rand(2, 50)
    found = gradients(model, [1.0, 3.0], lambda m, b: b * (scales * m.weight.pow(4)).sum(), wanted="hessian_diag")
    torch.testing.assert_close(found["weight"]["hessian_diag"], 2 * 12 * scales * model.weight.detach().square())


def test_the_mean_of_draws_is_what_it_is_said_to_be() -> None:
    """Draws of one batch, whose Hessian is known: a quadratic."""
    a = torch.randn(12, 12, dtype=torch.float64)
    a = a @ a.T
    model = nn.Linear(12, 1, bias=False).double()

    def quadratic(m: nn.Module, batch: Tensor) -> Tensor:
        w: Any = m.weight
        return 0.5 * (w @ a @ w.T).sum()

    x = torch.ones(1)
    close_to_diagonal(
        gradients(model, [x], quadratic, wanted="hessian_diag", probes=400)["weight"]["hessian_diag"], a, 400
    )
    # Draws of other batches are other draws: 400 batches of one are as good as one batch of 400.
    close_to_diagonal(gradients(model, [x] * 400, quadratic, wanted="hessian_diag")["weight"]["hessian_diag"], a, 400)


def test_a_seed_draws_the_signs() -> None:
    model, data = Net(), batches()
    one = gradients(model, data, loss, wanted="hessian_diag")
    torch.rand(5)
    assert the_same(one, gradients(model, data, loss, wanted="hessian_diag", seed=0))
    assert not the_same(one, gradients(model, data, loss, wanted="hessian_diag", seed=1))
    alone = gradients(model, data, loss, wanted="hessian_diag", names=["fc.weight"])
    assert not the_same(alone["fc.weight"], one["fc.weight"])  # signs of other tensors are left out of it


def test_attention_and_recurrence_can_be_differentiated_twice() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.rnn = nn.Linear(8, 24, bias=False), nn.LSTM(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            out: Tensor = self.rnn(F.scaled_dot_product_attention(q, k, v))[0]
            return out

    model = Attends()
    found = gradients(model, [torch.randn(2, 5, 8)], lambda m, x: m(x).square().mean(), wanted={"grad", "hessian_diag"})
    assert list(found) == ["qkv.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0"]
    assert all(bool(f["hessian_diag"].abs().sum() > 0) for f in found.values())


# Blocks of the Fisher matrix


@pytest.mark.parametrize(("block", "per_sample"), [(5, False), (50, True), (1000, True)])
def test_inverse_blocks_are_those_of_numpy(block: int, per_sample: bool) -> None:
    model, data = Net(), batches(20, 20)
    found = gradients(
        model,
        data,
        loss,
        None,
        {"fisher_inverse", "fisher_inverse_diag"},
        per_sample=per_sample,
        block=block,
        damping=1e-3,
    )
    hand = by_hand(model, singles(data) if per_sample else data)
    for n in NAMES:
        g = np.stack([h[n].double().flatten().numpy() for h in hand])
        diagonal = []
        size = min(block, g.shape[1])
        for b, start in enumerate(range(0, g.shape[1], size)):
            part = g[:, start : start + size]
            expected = np.linalg.inv(part.T @ part / len(g) + 1e-3 * np.eye(part.shape[1]))
            diagonal.append(expected.diagonal())
            width = part.shape[1]
            np.testing.assert_allclose(found[n]["fisher_inverse"][b, :width, :width], expected, rtol=1e-5, atol=1e-4)
        flat = found[n]["fisher_inverse_diag"].flatten()
        np.testing.assert_allclose(flat, np.concatenate(diagonal), rtol=1e-5)
        assert found[n]["fisher_inverse_diag"].dtype == torch.float64


def test_a_pruned_weight_has_no_part_in_the_fisher_matrix() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.0, 2.0]])
    data = [torch.tensor([[1.0, 1.0, 1.0]])]
    found = gradients(model, data, lambda m, x: m(x).sum(), wanted={*FIRST_ORDER, "fisher_inverse"}, damping=1.0)[
        "weight"
    ]
    expected = np.linalg.inv(np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]]))
    np.testing.assert_allclose(found["fisher_inverse"][0], expected)
    assert found["grad"].tolist() == [[1.0, 1.0, 1.0]]  # what would grow is told by the gradient itself


def test_damping_is_raised_where_rounding_needs_it() -> None:
    model = nn.Linear(30, 1, bias=False)
    g = torch.Generator().manual_seed(0)
    data = [1e6 * torch.randn(1, 30, generator=g) for _ in range(3)]
    with pytest.warns(SecateurWarning, match="'weight'.* raised from 1e-07 to") as told:
        found = gradients(model, data, lambda m, x: m(x).sum(), wanted="fisher_inverse", damping=1e-7)
    assert len(told) == 1
    assert bool(torch.isfinite(found["weight"]["fisher_inverse"]).all())


# Under any mode


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_also_where_they_are_switched_off(mode: Any) -> None:
    model, data = Net(), batches()
    with mode():
        found = gradients(model, data, loss, wanted={"grad", "hessian_diag"})
    assert the_same(found, gradients(model, data, loss, wanted={"grad", "hessian_diag"}))


def test_the_same_bits_again() -> None:
    model, data = Net(), batches()
    one, two = (gradients(model, data, loss, None, MEASURED, per_sample=True) for _ in range(2))
    assert the_same(one, two)


# On a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu() -> None:
    model, data = Net(), batches()
    here = gradients(model, data, loss, None, MEASURED, damping=1e-2)
    there = gradients(copy.deepcopy(model).cuda(), data, loss, None, MEASURED, damping=1e-2)
    for n in NAMES:
        for s in MEASURED:
            assert there[n][s].is_cuda
            torch.testing.assert_close(there[n][s].cpu(), here[n][s], rtol=1e-2, atol=1e-4)
    rnn = nn.LSTM(4, 3).cuda()
    found = gradients(
        rnn, [torch.randn(5, 2, 4)], lambda m, x: m(x)[0].square().mean(), wanted={"grad", "hessian_diag"}
    )
    assert all(f["grad"].is_cuda for f in found.values())


def test_through_the_verb() -> None:
    """What `secateur.calibrate` measures is this."""
    model, data = Net(), batches()
    calibration = secateur.Calibration(data, loss=loss, per_sample=True, probes=2, seed=3, block=7, damping=1e-3)
    found = secateur.calibrate(model, calibration, MEASURED)
    direct = gradients(model, data, loss, None, MEASURED, per_sample=True, probes=2, seed=3, block=7, damping=1e-3)
    assert the_same({n: dict(f) for n, f in found.items()}, direct)
