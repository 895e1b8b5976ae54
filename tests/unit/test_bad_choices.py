"""Criteria, filters, caps and allocations that cannot be meant are refused before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import BadInput, BadTensor, Infeasible, NothingChosen
from tests.unit.refusals import net, refused, state

# ----------------------------------------------------------------------------------------- criteria


CRITERIA: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "another shape": (lambda weight: weight.sum(0), BadTensor, r"tensor of the weight's shape for '0.weight' \(shape \(6, 4\)"),
    "a number": (lambda weight: 1.0, BadTensor, "tensor of the weight's shape for '0.weight'.*got float"),
    "nothing": (lambda weight: None, BadTensor, "got NoneType"),
    "an array": (lambda weight: weight.numpy(), BadTensor, "got ndarray"),
    "NaN": (lambda weight: weight * math.nan, BadTensor, "NaN .*'0.weight' "),
    "one NaN": (lambda weight: weight.flatten().index_fill(0, torch.tensor([3]), math.nan).view_as(weight), BadTensor,
                "NaN .*'0.weight' "),
    "complex": (lambda weight: weight + 1j, BadTensor, "returned torch.complex64 scores for '0.weight'.*return real"),
    "bool": (lambda weight: weight > 0, BadTensor, "returned torch.bool scores"),
    "huge integers": (lambda weight: weight.long() + (1 << 60), BadTensor, r"integers beyond 2\*\*53"),
    "an unknown argument": (lambda weight, gradient: weight, BadInput, "asks for 'gradient', which is not provided.*name, index"),
    "no argument": (lambda: None, BadInput, "takes no arguments; it must take the weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", CRITERIA)
def test_criteria_that_do_not_score(what: str) -> None:
    criterion, error, text = CRITERIA[what]
    for options in ({}, {"pattern": "2x2"}, {"pattern": "1:2"}, {"allocation": "uniform"}):
        s = None if options.get("pattern") == "1:2" else 0.5
        refused(error, text, lambda m, s=s, options=options: secateur.prune(m, s, criterion=criterion, **options))  # type: ignore[misc]


def test_a_criterion_that_writes_into_its_argument_does_not_touch_the_model() -> None:
    def greedy(weight: Tensor) -> Tensor:
        score = weight.abs()
        weight.zero_()
        return score

    model, want = net(), net()
    assert secateur.prune(model, 0.5, criterion=greedy).zeros == 18
    secateur.prune(want, 0.5)
    assert state(model) == state(want)
    refused(BadTensor, "NaN", lambda m: secateur.prune(m, 0.5, criterion=lambda weight: weight.zero_() / 0))


def test_a_criterion_may_be_any_function() -> None:
    want = net()
    secateur.prune(want, 0.5)
    functions: list[Any] = [
        torch.abs, torch.Tensor.abs, lambda w: w.abs(), lambda weight, **rest: weight.abs(),
        lambda weight, *, index, name="x": weight.abs(), Scored(), lambda weight: weight.abs().requires_grad_(),
        lambda weight: weight.abs().to(torch.float64), lambda weight: (weight.abs() * 1e4).to(torch.int32),
    ]  # fmt: skip
    for criterion in functions:
        model = net()
        assert secateur.prune(model, 0.5, criterion=criterion).zeros == 18
        assert state(model) == state(want)


class Scored(nn.Module):
    """A module as a criterion."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def test_a_random_function_still_gives_an_exact_count_and_is_called_once_a_tensor() -> None:
    calls: list[str] = []

    def chance(weight: Tensor, *, name: str) -> Tensor:
        calls.append(name)
        return torch.rand(weight.shape)

    assert secateur.prune(net(), 0.5, criterion=chance).zeros == 18
    assert calls == ["0.weight", "2.weight"]


def test_what_a_criterion_raises_goes_through() -> None:
    def fails(weight: Tensor) -> Tensor:
        raise KeyError("mine")

    model = net()
    before = state(model)
    with pytest.raises(KeyError, match="mine"):
        secateur.prune(model, 0.5, criterion=fails)
    assert state(model) == before


def test_infinite_scores_have_an_order() -> None:
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    secateur.prune(w, 0.5, criterion=lambda weight: torch.tensor([math.inf, -math.inf, 0.0, 1.0]))
    assert w.tolist() == [1.0, 0.0, 0.0, 4.0]


# ----------------------------------------------------------------------- filters, caps, allocations


def test_filters_that_match_nothing() -> None:
    has = "The target has: 0.bias, 0.weight, 1.bias"
    refused(NothingChosen, f"include='fc' matches nothing.*{has}", lambda m: secateur.prune(m, 0.5, include="fc"))
    refused(NothingChosen, "ignore='fc' matches nothing", lambda m: secateur.prune(m, 0.5, ignore="fc"))
    refused(NothingChosen, "ignore='3' matches nothing", lambda m: secateur.plan(m, 0.5, ignore=["0", "3"]))
    refused(NothingChosen, "include='' matches nothing", lambda m: secateur.masks(m, include=""))
    refused(NothingChosen, "include='x' matches nothing", lambda m: secateur.inspect(m, include="x"))


def test_filters_that_leave_nothing() -> None:
    text = r"nothing to prune: no tensor is chosen \(0.bias: .*Name a tensor in full in include="
    refused(NothingChosen, text, lambda m: secateur.prune(m, 0.5, ignore="*"))
    refused(NothingChosen, text, lambda m: secateur.prune(m, 0.5, include="1"))
    refused(NothingChosen, text, lambda m: secateur.prune(m, 0.5, include="0", ignore="0.weight"))
    refused(NothingChosen, "a bias", lambda m: secateur.prune(m, 0.5), nn.Sequential(nn.LayerNorm(3)))


@pytest.mark.parametrize("value", [3, [3], b"0", 0.5, [b"0"], [["0"]], {"0": 1}, nn.Linear(2, 2)], ids=repr)
def test_filters_of_another_kind(value: Any) -> None:
    refused(BadInput, "include", lambda m: secateur.prune(m, 0.5, include=value))
    refused(BadInput, "ignore", lambda m: secateur.prune(m, 0.5, ignore=value))


def test_only_a_full_name_adds_a_bias_or_norm() -> None:
    assert secateur.prune(net(), 0.5, include=["0", "0.bias"]).total == 30
    assert secateur.prune(net(), 0.5, include=["0", "0.b*"]).total == 24
    assert secateur.prune(net(), 0.5, include="1.weight").total == 6


def test_mappings_whose_globs_match_nothing_or_contradict() -> None:
    none = r"matches none of the chosen tensors \(0.weight, 2.weight"
    refused(NothingChosen, f"allocation: 'fc' {none}", lambda m: secateur.prune(m, 0.5, allocation={"fc": 0.5}))
    refused(NothingChosen, f"max_sparsity: '1' {none}", lambda m: secateur.prune(m, 0.5, max_sparsity={"1": 0.5}))
    both = r"is ambiguous for '0.weight': '\*': 0.5, '0': 0.25. Use globs that do not overlap, or its full name"
    refused(BadInput, f"allocation {both}", lambda m: secateur.prune(m, 0.5, allocation={"*": 0.5, "0": 0.25}))
    refused(BadInput, f"max_sparsity {both}", lambda m: secateur.prune(m, 0.5, max_sparsity={"*": 0.5, "0": 0.25}))
    assert (
        secateur.prune(net(), allocation={"*": 0.5, "0.weight": 0.25}).zeros == 6 + 6
    )  # a full name goes before a glob
    assert secateur.prune(net(), 0.5, allocation={"*": 0.5, "0": 0.5}).zeros == 18  # the same value is no contradiction
    refused(BadInput, "allocation", lambda m: secateur.prune(m, 0.5, allocation={3: 0.5}))  # type: ignore[dict-item]
    refused(BadInput, "max_sparsity", lambda m: secateur.prune(m, 0.5, max_sparsity={3: 0.5}))  # type: ignore[dict-item]


def test_caps_that_leave_too_little() -> None:
    text = (
        r"32 of 36 weights are to go, but max_sparsity and min_keep allow only 18 .*lower sparsity, or loosen the caps"
    )
    refused(Infeasible, text, lambda m: secateur.prune(m, 0.9, max_sparsity=0.5))
    for allocation in ("global", "uniform", "er", "erk", "lamp", "uniform_plus"):
        refused(
            Infeasible,
            "allow only",
            lambda m, a=allocation: secateur.prune(m, 0.9, max_sparsity={"*": 0.5}, allocation=a),
        )  # type: ignore[misc]
        refused(Infeasible, "allow only", lambda m, a=allocation: secateur.prune(m, 0.9, min_keep=20, allocation=a))  # type: ignore[misc]


def test_a_cap_of_zero_keeps_a_layer_dense() -> None:
    report = secateur.prune(net(), 0.25, max_sparsity={"0": 0})
    assert [r.zeros for r in report.chosen] == [0, 9]
    refused(Infeasible, "18 of 36 .* allow only 12", lambda m: secateur.prune(m, 0.5, max_sparsity={"0": 0}))


ALLOCATIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "list": (lambda rows, s: [1, 2], r"must return \{name: count\}, got list"),
    "nothing": (lambda rows, s: None, "got NoneType"),
    "missing": (lambda rows, s: {"0.weight": 1}, r"one count for each row; missing or unknown: \['2.weight'\]"),
    "unknown": (lambda rows, s: {"0.weight": 1, "2.weight": 1, "x": 1}, r"missing or unknown: \['x'\]"),
    "share": (lambda rows, s: {r.name: 0.5 for r in rows},
              r"gave 0.5 for '0.weight' \(shape \(6, 4\), float32\): .*int, 0 <= count <= 24"),
    "negative": (lambda rows, s: {r.name: -1 for r in rows}, "gave -1 for '0.weight'"),
    "too many": (lambda rows, s: {r.name: 13 for r in rows}, "gave 13 for '2.weight' .*0 <= count <= 12"),
    "bool": (lambda rows, s: {r.name: True for r in rows}, "gave True"),
    "numpy": (lambda rows, s: {r.name: np.int64(1) for r in rows}, r"gave np.int64\(1\)"),
    "string": (lambda rows, s: {r.name: "1" for r in rows}, "gave '1'"),
}  # fmt: skip


@pytest.mark.parametrize("what", ALLOCATIONS)
def test_allocation_functions_that_return_nonsense(what: str) -> None:
    function, text = ALLOCATIONS[what]
    refused(BadInput, text, lambda m: secateur.prune(m, 0.5, allocation=function))
    refused(BadInput, text, lambda m: secateur.plan(m, 0.5, allocation=function, pattern="2x2"))


class Odd:
    def __call__(self, rows: Any) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    "function",
    [lambda rows: {}, lambda: {"a": 1}, lambda rows, sparsity, more: {}, lambda *, rows, sparsity: {}, Odd()],
)
def test_allocation_functions_that_take_something_else(function: Any) -> None:
    text = r"an allocation function must take \(rows, sparsity\) and return \{name: count\}; .* does not: "
    refused(BadInput, text, lambda m: secateur.prune(m, 0.5, allocation=function))
