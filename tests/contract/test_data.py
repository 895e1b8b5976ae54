"""The promises over criteria made of data and over solvers: exact, absolute, nested, zeros stay, ties of storage, left alone."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.core.combine import Choice, why_refused
from secateur.core.saliency import NAMED as SALIENCIES
from secateur.core.saliency import bind
from secateur.core.solve import NAMED as SOLVERS
from secateur.core.spelling import allocation_of
from tests.contract.nets import CHOSEN, is_zero, net
from tests.contract.table import ALLOCATIONS, CRITERIA, DTYPES, PATTERNS, Case, expected_warnings
from tests.contract.test_exact import pruned_rightly

SHAPES = {"conv.weight": (8, 4, 1, 3), "fc1.weight": (32, 8), "fc2.weight": (4, 32)}
FEATURES = {"conv.weight": 12, "fc1.weight": 8, "fc2.weight": 32}


def statistics() -> dict[str, dict[str, Tensor]]:
    """Numbers of every statistic that a criterion of single weights asks for, the same in every call."""
    g = torch.Generator().manual_seed(7)
    out: dict[str, dict[str, Tensor]] = {}
    for name, shape in SHAPES.items():
        signed = {s: torch.randn(shape, generator=g) for s in ("grad", "hessian_diag")}
        positive = {s: torch.rand(shape, generator=g) + 0.1 for s in ("fisher_diag", "fisher_inverse_diag")}
        out[name] = {"input_norm": torch.rand(FEATURES[name], generator=g) + 0.1, **signed, **positive}
    return out


OF_UNITS = {"mean_activation", "apoz", "batchnorm_scale", "taylor_channel", "head_importance"}
"""Scores of channels and heads, which tests of those run."""
BOUND = {
    name: bind(criterion, statistics(), dict.fromkeys(SHAPES, (0, 1)))
    for name, criterion in SALIENCIES.items()
    if name not in OF_UNITS
}


def cases() -> list[Case]:
    """Every defined pattern and allocation, each criterion with one in turn, so that each is run with most."""

    def refused(p: str, a: str) -> str | None:
        share = None if p == "2:4" else 0.4
        return why_refused(Choice(PATTERNS[p], allocation_of(ALLOCATIONS[a]), BOUND["wanda"], sparsity=share))

    found: list[Case] = []
    defined = [(p, a) for p, a in product(PATTERNS, ALLOCATIONS) if refused(p, a) is None]
    for i, (p, a) in enumerate(defined):
        names = sorted(BOUND)
        found += [Case(p, a, name) for name in {names[i % len(names)], names[(i + 3) % len(names)], "wanda"}]
    return sorted(found, key=str)


@pytest.fixture(autouse=True)
def _in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, criterion in BOUND.items():
        monkeypatch.setitem(CRITERIA, name, criterion)


def test_every_criterion_of_single_weights_is_here() -> None:
    assert set(BOUND) | OF_UNITS == set(SALIENCIES)
    assert {c.criterion for c in cases()} == set(BOUND)
    assert {c.pattern for c in cases()} == set(PATTERNS)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_exact(case: Case) -> None:
    """Against a full sort by the score, in two of the dtypes in turn, with ties and zeros in one."""
    kinds = list(DTYPES)
    at = cases().index(case)
    most = 0.7 if case.allocation == "uniform_plus" else 0.9
    pruned_rightly(case, kinds[at % len(kinds)], "plain", most)
    pruned_rightly(case, kinds[(at + 4) % len(kinds)], "ties", 0.4)


@pytest.mark.parametrize("criterion", BOUND)
@pytest.mark.parametrize("pattern", ["unstructured", "row"])
def test_absolute_and_nested(criterion: str, pattern: str) -> None:
    """Scores change with the weights alone, and those that are left do not: a sparser mask lies in a denser one."""
    how: dict[str, Any] = {"criterion": BOUND[criterion], "pattern": pattern, "allocation": "uniform"}
    one, two = net(), net()
    secateur.prune(one, 0.3, **how)
    before = {n: is_zero(one.get_parameter(n)) for n in CHOSEN}
    report = secateur.prune(one, 0.6, **how)
    secateur.prune(two, 0.6, **how)
    for n in CHOSEN:
        assert torch.equal(one.get_parameter(n), two.get_parameter(n))
        assert bool((before[n] <= is_zero(one.get_parameter(n))).all())
    bits = copy.deepcopy(one.state_dict())
    assert secateur.prune(one, 0.6, **how).zeros == report.zeros
    assert all(torch.equal(a, b) for a, b in zip(bits.values(), one.state_dict().values(), strict=True))


def images(dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(40, 4, 3, 5, generator=g).to(dtype) for _ in range(3)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def solved(model: nn.Module, solver: str, dtype: torch.dtype, **how: Any) -> secateur.Report:
    calibration = secateur.Calibration(images(dtype), blocks="layers", loss=loss)
    with expected_warnings():
        return secateur.prune(model, **{"sparsity": 0.5, "solver": solver, "calibration": calibration, **how})


def drawn(dtype: torch.dtype) -> nn.Module:
    return net().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_exact_and_leaves_the_model(solver: str, dtype: torch.dtype) -> None:
    model = drawn(dtype)
    fresh, held = copy.deepcopy(model), {n: (id(p), p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    report = solved(model, solver, dtype)
    assert report.zeros == sum(int(is_zero(model.get_parameter(n)).sum()) for n in CHOSEN) == 240
    assert {n: (id(p), p.data_ptr(), p.stride()) for n, p in model.named_parameters()} == held
    assert all(p.dtype == dtype for n, p in model.named_parameters())
    untouched = [n for n, _ in model.named_parameters() if n not in CHOSEN]
    assert all(torch.equal(model.get_parameter(n), fresh.get_parameter(n)) for n in untouched)
    assert not any(torch.signbit(model.get_parameter(n)[is_zero(model.get_parameter(n))]).any() for n in CHOSEN)
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.zero_grad()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_is_absolute_and_zeros_stay(solver: str) -> None:
    model = drawn(torch.float32)
    model.get_parameter("fc1.weight").data[:3] = 0
    held = {n: is_zero(model.get_parameter(n)) for n in CHOSEN}
    zeros = solved(model, solver, torch.float32, sparsity=0.3).zeros
    for n in CHOSEN:
        assert bool((held[n] <= is_zero(model.get_parameter(n))).all())
    after = {n: is_zero(model.get_parameter(n)) for n in CHOSEN}
    assert solved(model, solver, torch.float32, sparsity=0.3).zeros == zeros == 144
    assert all(torch.equal(after[n], is_zero(model.get_parameter(n))) for n in CHOSEN)
    assert solved(model, solver, torch.float32, sparsity=0.6).zeros in (288, 289)  # of all, or 58 + 154 + 77
    assert all(bool((after[n] <= is_zero(model.get_parameter(n))).all()) for n in CHOSEN)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "obs"])  # which removes single weights
def test_a_solver_keeps_two_of_four(solver: str) -> None:
    model = drawn(torch.float32)
    report = solved(model, solver, torch.float32, sparsity=None, pattern="2:4")
    assert report.sparsity == 0.5
    for n in CHOSEN:
        quads = is_zero(model.get_parameter(n)).movedim(1, -1).reshape(-1, 4).sum(1)
        assert quads.tolist() == [2] * len(quads), n


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_gives_the_same_bits_again(solver: str) -> None:
    one, two = drawn(torch.float32), drawn(torch.float32)
    solved(one, solver, torch.float32)
    torch.rand(5)
    solved(two, solver, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


class Tied(nn.Module):
    """Two layers that are one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("how", [{"criterion": "wanda"}, {"solver": "sparsegpt"}], ids=str)
@pytest.mark.parametrize("blocks", ["layers", "whole", ["a", "b", "c"]], ids=str)
def test_tied_storage_is_one_tensor(how: dict[str, Any], blocks: Any) -> None:
    """Counted once, pruned once, still tied; with "whole" it has the inputs of both."""
    model = Tied()
    data = [torch.randn(30, 8) for _ in range(2)]
    if blocks == ["a", "b", "c"]:
        model = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c)
        blocks = "auto"
    report = secateur.prune(model, 0.5, calibration=secateur.Calibration(data, blocks=blocks), **how)
    assert report.total == 96 and report.zeros == 48
    first, second = (model.a, model.b) if isinstance(model, Tied) else (model[0], model[2])
    assert first.weight is second.weight and int(is_zero(first.weight).sum()) == 32


def test_the_inputs_of_a_tied_weight_add_up() -> None:
    model, data = Tied(), [torch.randn(30, 8)]
    found = secateur.calibrate(model, data)["a.weight"]["input_norm"]
    with torch.no_grad():
        both = torch.cat([data[0], model.a(data[0]).relu()]).double()
    torch.testing.assert_close(found.double(), both.square().mean(0).sqrt(), rtol=1e-6, atol=1e-7)
