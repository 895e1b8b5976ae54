"""What cannot be meant is refused with what was asked, what was found and what to do, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import BadInput, BadTensor, Infeasible, NotDefined, NothingChosen, PlanMismatch

Call = Callable[[nn.Module], Any]


def net() -> nn.Sequential:
    """Two layers of 24 and 12 weights and a norm, the same in every call."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    return model


def state(model: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


def refused(error: type[Exception], text: str, call: Call, model: nn.Module | None = None) -> None:
    """The call raises, by name, and every byte of the model is as it was."""
    model = net() if model is None else model
    before = state(model)
    with pytest.raises(error, match=text) as e:
        call(model)
    assert type(e.value) is error
    assert isinstance(e.value, secateur.SecateurError)
    assert isinstance(e.value, ValueError)
    assert state(model) == before


# ---------------------------------------------------------------------------------------- numbers

NOT_A_SPARSITY: dict[str, tuple[Any, str]] = {
    "one weight": (1, "0 <= sparsity < 1; got 1. 1 would prune every weight; a count of weights is not a sparsity"),
    "all": (1.0, "got 1.0. 1 would prune every weight"),
    "per cent": (90, r"got 90. Did you mean 0.9\?"),
    "half a per cent off": (99.5, r"got 99.5. Did you mean 0.995\?"),
    "hundred": (100, "0 <= sparsity < 1; got 100"),
    "too much": (1.1, r"0 <= sparsity < 1; got 1.1"),
    "a count": (5000, "0 <= sparsity < 1; got 5000"),
    "negative": (-0.1, "0 <= sparsity < 1; got -0.1"),
    "NaN": (math.nan, "0 <= sparsity < 1; got nan"),
    "infinity": (math.inf, "0 <= sparsity < 1; got inf"),
    "bool": (True, r"Python number with 0 <= sparsity < 1, got True \(bool\)"),
    "string": ("0.5", r"Python number with 0 <= sparsity < 1, got '0.5' \(str\)"),
    "complex": (0.5 + 0j, r"got \(0.5\+0j\) \(complex\)"),
    "decimal": (Decimal("0.5"), r"got Decimal\('0.5'\)"),
    "list": ([0.5], r"got \[0.5\] \(list\)"),
    "numpy float64": (np.float64(0.5), "got a numpy float64 .*: write sparsity=0.5"),
    "numpy float32": (np.float32(0.5), "got a numpy float32 .*: write sparsity=0.5"),
    "numpy int": (np.int64(0), "got a numpy int64 .*: write sparsity=0"),
    "numpy bool": (np.bool_(True), "got a numpy bool"),
    "numpy array": (np.array(0.25), "got a numpy ndarray .*: write sparsity=0.25"),
    "numpy vector": (np.array([0.25, 0.5]), "got a numpy ndarray .*: give one number"),
    "torch scalar": (torch.tensor(0.5), r"got a torch Tensor .*: write sparsity=0.5"),
    "torch vector": (torch.tensor([0.5, 0.5]), r"got a torch Tensor .*: give one number"),
}


@pytest.mark.parametrize("what", NOT_A_SPARSITY)
def test_what_is_no_sparsity(what: str) -> None:
    value, text = NOT_A_SPARSITY[what]
    refused(BadInput, text, lambda m: secateur.prune(m, value))
    refused(BadInput, text, lambda m: secateur.plan(m, value, allocation="erk"))
    refused(BadInput, text, lambda m: secateur.prune(m, value, pattern="channel"))
    cap = text.replace("sparsity", "max_sparsity", 1) if text.startswith("0 <=") else None
    refused(BadInput, cap or "max_sparsity", lambda m: secateur.prune(m, 0.5, max_sparsity=value))
    refused(BadInput, "max_sparsity", lambda m: secateur.prune(m, 0.5, max_sparsity={"0": value}))
    refused(BadInput, r"allocation\['0'\]", lambda m: secateur.prune(m, 0.5, allocation={"0": value}))


def test_every_share_from_zero_up_is_allowed() -> None:
    for value, zeros in ((0, 0), (0.0, 0), (0.5, 18), (Fraction(1, 3), 12), (0.9, 32), (1e-12, 0)):
        assert secateur.prune(net(), value).zeros == zeros


def test_counts_are_rounded_half_to_even() -> None:
    """As `round` does, of the decimal number that was written: 0.35 of 10 is 3.5, not 3.4999…"""
    wanted = {
        (3, 0.5): 2,
        (5, 0.5): 2,
        (7, 0.5): 4,
        (10, 0.25): 2,
        (10, 0.35): 4,
        (10, 0.15): 2,
        (20, 0.125): 2,
        (1, 0.5): 0,
    }
    for (n, s), zeros in wanted.items():
        w = torch.arange(1.0, n + 1)
        assert secateur.prune(w, s).zeros == int((w == 0).sum()) == zeros, (n, s)


NOT_A_THRESHOLD: dict[str, tuple[Any, str]] = {
    "zero": (0, r"0 < threshold < inf: weights with \|w\| < threshold go; got 0"),
    "negative": (-1.0, "0 < threshold < inf.*got -1.0"),
    "NaN": (math.nan, "0 < threshold < inf.*got nan"),
    "infinity": (math.inf, "0 < threshold < inf.*got inf"),
    "bool": (True, r"threshold must be a Python number > 0, got True \(bool\)"),
    "string": ("1e-3", r"got '1e-3' \(str\)"),
    "numpy": (np.float64(0.1), r"threshold must be a Python number > 0, got np.float64\(0.1\)"),
    "torch": (torch.tensor(0.1), r"threshold must be a Python number > 0, got tensor\(0.1"),
}


@pytest.mark.parametrize("what", NOT_A_THRESHOLD)
def test_what_is_no_threshold(what: str) -> None:
    value, text = NOT_A_THRESHOLD[what]
    refused(BadInput, text, lambda m: secateur.prune(m, threshold=value))


def test_a_threshold_takes_what_is_below_it_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        w = torch.tensor([0.0, 0.25, -0.5, 0.5, 1.0, -4.0]).to(dtype)
        everything = w.clone()
        with pytest.warns(secateur.SecateurWarning, match="left with nothing"):
            assert secateur.prune(everything, threshold=1e30).zeros == 6
        for t, zeros in ((0.5, 2), (0.50001, 4), (0.25, 1), (1e-30, 1), (4, 5)):
            pruned = w.clone()
            assert secateur.prune(pruned, threshold=t).zeros == int((pruned.double() == 0).sum()) == zeros, (dtype, t)


def test_how_much_is_said_once() -> None:
    refused(NotDefined, "two answers to one question: give one", lambda m: secateur.prune(m, 0.5, threshold=0.1))
    refused(BadInput, r"say how much to prune: sparsity=0.9 .* or threshold=1e-3", lambda m: secateur.prune(m))


NOT_A_COUNT = [-1, 1.5, True, "3", None, np.int64(3)]


@pytest.mark.parametrize("value", NOT_A_COUNT, ids=repr)
def test_what_is_no_min_keep(value: Any) -> None:
    refused(
        BadInput, "min_keep is a count of weights, an int >= 0; got", lambda m: secateur.prune(m, 0.5, min_keep=value)
    )


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "value", ["4:2", "4:4", "0:4", "2:4:8", "unstructed", "", "0x4", "4x", "2,4", None, 4, (2, 4), ["2:4"], nn.Linear]
)
def test_unknown_patterns(value: Any) -> None:
    text = r"N of every M|pattern must be .*unstructured.*\"N:M\"|two ints >= 1"
    refused(BadInput, text, lambda m: secateur.prune(m, 0.5, pattern=value))


@pytest.mark.parametrize("value", ["globl", "layer", "", None, 0.5, [0.5], ("global",)])
def test_unknown_allocations(value: Any) -> None:
    text = r"allocation must be one of global, uniform.*lamp.*mapping.*function.*got"
    refused(BadInput, text, lambda m: secateur.prune(m, 0.5, allocation=value))


@pytest.mark.parametrize("value", ["l1", "Magnitude", "", None, 3, [secateur.magnitude], torch.ones(3)])
def test_unknown_criteria(value: Any) -> None:
    refused(BadInput, r"criterion must be .*function.*got", lambda m: secateur.prune(m, 0.5, criterion=value))


@pytest.mark.parametrize("value", ["drop", None, True, "KEEP"])
def test_unknown_ways_with_nonfinite_values(value: Any) -> None:
    refused(
        BadInput, "nonfinite must be one of error, keep, prune; got", lambda m: secateur.prune(m, 0.5, nonfinite=value)
    )


def test_patterns_check_themselves() -> None:
    made: list[Callable[[], Any]] = [
        lambda: secateur.NM(keep=4, of=2), lambda: secateur.NM(keep=0, of=4), lambda: secateur.NM(keep=True, of=4),
        lambda: secateur.NM(keep=2.0, of=4),  # type: ignore[arg-type]
        lambda: secateur.Block((4, 0)), lambda: secateur.Block(4),  # type: ignore[arg-type]
        lambda: secateur.Block((4, 4, 4)), lambda: secateur.Block((2.0, 2)),  # type: ignore[arg-type]
        lambda: secateur.Block((4, 4), reduce="median"), lambda: secateur.Channel("both"),  # type: ignore[arg-type]
        lambda: secateur.Channel("out", reduce="sum"), lambda: secateur.random("0"),  # type: ignore[arg-type]
        lambda: secateur.random(True), lambda: secateur.random(0.5),  # type: ignore[arg-type]
    ]  # fmt: skip
    for make in made:
        with pytest.raises(BadInput, match=r"got|takes|must be"):
            make()


# --------------------------------------------------------------------------------------- criteria

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


# ---------------------------------------------------------------------------------------- filters


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


# ---------------------------------------------------------------------------------------- targets

TARGETS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "list": (lambda: [torch.ones(2, 2)], BadInput, "cannot prune a list. Pass an nn.Module, a dict of tensors"),
    "parameters": (lambda: nn.Linear(2, 2).parameters(), BadInput, r"cannot prune a generator.*state_dict\(\)"),
    "array": (lambda: np.ones((2, 2)), BadInput, r"numpy.ndarray. Wrap it with torch.from_numpy\(array\)"),
    "optimizer": (lambda: torch.optim.SGD(nn.Linear(2, 2).parameters()), BadInput, "Pass the model that it trains"),
    "none": (lambda: None, BadInput, "cannot prune a NoneType"),
    "number": (lambda: 0.5, BadInput, "cannot prune a float"),
    "bytes": (lambda: b"model.safetensors", BadInput, "cannot prune a bytes"),
    "class": (lambda: nn.Linear, BadInput, "cannot prune a type"),
    "report": (lambda: secateur.inspect(nn.Linear(2, 2)), BadInput, "works in place and returns a report"),
    "no module": (lambda: nn.ReLU(), NothingChosen, "this ReLU has no parameters: there is nothing to prune"),
    "no dict": (dict, NothingChosen, "the mapping has no tensors"),
    "checkpoint": (lambda: {"model": {"w": torch.ones(2)}}, BadInput, r"'model' is a dict.*pass target\['model'\]"),
    "module in a dict": (lambda: {"m": nn.Linear(2, 2)}, BadInput, r"Pass target\['m'\] itself"),
    "array in a dict": (lambda: {"w": np.ones(2)}, BadInput, "torch.from_numpy"),
    "number in a dict": (lambda: {"w": torch.ones(2, 2), "epoch": 3}, BadInput, "'epoch' is an int. Leave it out"),
    "numbered dict": (lambda: {0: torch.ones(2, 2)}, BadInput, "names of tensors; found 0, an int"),
}  # fmt: skip


@pytest.mark.parametrize("what", TARGETS)
def test_targets_of_another_kind(what: str) -> None:
    make, error, text = TARGETS[what]
    target = make()
    calls: list[Call] = [
        lambda m: secateur.prune(target, 0.5), lambda m: secateur.plan(target, 0.5), lambda m: secateur.masks(target),
        lambda m: secateur.inspect(target), lambda m: secateur.apply({"w": torch.ones(2, dtype=torch.bool)}, target),
    ]  # fmt: skip
    for call in calls:
        refused(error, text, call)


def test_paths_and_out(tmp_path: Path) -> None:
    missing = tmp_path / "no.safetensors"
    refused(
        BadInput,
        r"no.safetensors' is a path: say where the result goes with out=",
        lambda m: secateur.prune(missing, 0.5),
    )
    refused(
        BadInput, "is a path: say where", lambda m: secateur.apply({"w": torch.ones(1, dtype=torch.bool)}, str(missing))
    )
    refused(
        BadInput,
        "no.safetensors does not exist",
        lambda m: secateur.prune(missing, 0.5, out=tmp_path / "o.safetensors"),
    )
    refused(BadInput, "does not exist", lambda m: secateur.inspect(missing))
    for target in (net(), dict(net().state_dict()), torch.ones(2, 2)):
        text = r"out= goes with a path; a \w+ is pruned in place.*save_pretrained"
        refused(BadInput, text, lambda m, t=target: secateur.prune(t, 0.5, out=tmp_path / "o"))  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


def test_a_report_is_not_a_model() -> None:
    model: Any = secateur.prune(net(), 0.5)
    text = r"works in place and returns a report. Write `report = secateur.prune\(model, 0.9\)` and go on with `model`"
    uses: list[Callable[[], Any]] = [
        lambda: model(torch.ones(1, 4)), lambda: model.eval(), lambda: model.parameters(), lambda: model.state_dict(),
        lambda: model.to("cpu"), lambda: model.train(), lambda: model.named_parameters(), lambda: model.generate(),
        lambda: torch.optim.SGD(model.parameters()),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises((TypeError, AttributeError), match=text):
            use()
    with pytest.raises(AttributeError, match="a Report has no attribute 'sparsty'"):
        _ = model.sparsty
    assert not hasattr(model, "weight")


# ---------------------------------------------------------------------------- NaN and infinities


def with_bad(*values: float) -> dict[str, Tensor]:
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0]])
    w.view(-1)[: len(values)] = torch.tensor(values)
    return {"a.weight": torch.tensor([[0.5, 1.5, 2.5, 3.5], [9.0, 10.0, 11.0, 12.0]]), "b.weight": w}


BAD_VALUES = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_nonfinite_values_are_refused_by_default(value: float) -> None:
    for options in ({}, {"pattern": "2:4"}, {"pattern": "2x2"}, {"pattern": "channel"}, {"allocation": "lamp"},
                    {"allocation": "erk"}, {"criterion": "random"}, {"criterion": lambda weight: -weight}):  # fmt: skip
        target = with_bad(value, value)
        s = None if options.get("pattern") == "2:4" else 0.5
        text = r"'b.weight' \(shape \(2, 4\), float32\) holds 2 NaN or infinite weights"
        with pytest.raises(BadTensor, match=text):
            secateur.prune(target, s, **options)  # type: ignore[arg-type]
        assert target["b.weight"].view(-1)[2:].tolist() == [3, -4, 5, -6, 7, -8]
        assert torch.equal(target["a.weight"], with_bad()["a.weight"])
    with pytest.raises(BadTensor, match="holds 2 NaN"):
        secateur.prune(with_bad(value, value), threshold=2.0)
    report = secateur.inspect(with_bad(value, value))
    assert (report["b.weight"].nonfinite, report["a.weight"].nonfinite) == (2, 0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_nonfinite_values_of_every_dtype(dtype: torch.dtype) -> None:
    w = torch.tensor([1.0, math.nan, 2.0, 3.0]).to(dtype)
    with pytest.raises(BadTensor, match="holds 1 NaN or infinite weight, which"):
        secateur.prune(w, 0.5)
    kept, gone = w.clone(), w.clone()
    assert secateur.prune(kept, 0.5, nonfinite="keep").zeros == 2
    assert kept.double().isnan().tolist() == [False, True, False, False]
    assert secateur.prune(gone, 0.5, nonfinite="prune").zeros == 2
    assert gone.double().tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize(
    "criterion", ["magnitude", "random", lambda weight: weight.abs()], ids=["magnitude", "random", "own"]
)
def test_keep_keeps_them_and_prune_prunes_them_first(value: float, criterion: Any) -> None:
    for allocation in ("global", "uniform", {"*": 0.5}):
        kept, gone = with_bad(value, value), with_bad(value, value)
        how: dict[str, Any] = {"criterion": criterion, "allocation": allocation}
        assert secateur.prune(kept, 0.5, nonfinite="keep", **how).zeros == 8
        assert (~torch.isfinite(kept["b.weight"])).view(-1).tolist() == [True, True] + [False] * 6
        assert secateur.prune(gone, 0.5, nonfinite="prune", **how).zeros == 8
        assert gone["b.weight"].view(-1)[:2].tolist() == [0, 0]
        few = with_bad(value, value)
        assert secateur.prune(few, 0.125, nonfinite="prune", criterion=criterion).zeros == 2
        assert few["b.weight"].view(-1).tolist() == [0, 0, 3, -4, 5, -6, 7, -8]


@pytest.mark.parametrize("pattern", ["2:4", "1x2", "2x2", "channel", "channel:in"])
def test_keep_and_prune_with_patterns(pattern: str) -> None:
    s = None if pattern == "2:4" else 0.5
    kept, gone = with_bad(math.nan, math.inf), with_bad(math.nan, math.inf)
    secateur.prune(kept, s, pattern=pattern, nonfinite="keep", allocation="global")
    assert (~torch.isfinite(kept["b.weight"])).sum() == 2
    report = secateur.prune(gone, s, pattern=pattern, nonfinite="prune")
    assert gone["b.weight"].view(-1)[:2].tolist() == [0, 0]
    assert report["b.weight"].nonfinite == 0


def test_kept_values_are_counted_in_the_report() -> None:
    target = with_bad(math.nan, math.inf, -math.inf)
    report = secateur.prune(target, 0.25, nonfinite="keep")
    assert (report["b.weight"].nonfinite, report["a.weight"].nonfinite) == (3, 0)
    assert report["b.weight"].threshold == min(abs(float(x)) for x in target["b.weight"].view(-1)[3:] if x != 0)


INFEASIBLE: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "tensor": ({"sparsity": 0.5, "allocation": "uniform"}, (math.nan,) * 5),
    "all": ({"sparsity": 0.9}, (math.nan,) * 4),
    "groups": ({"pattern": "2:4"}, (math.nan, math.inf, math.nan)),
    "blocks": ({"sparsity": 0.9, "pattern": "1x2"}, (math.nan, 1, math.nan, 1, math.nan, 1, math.nan, 1)),
    "channels": ({"sparsity": 0.5, "pattern": "channel", "allocation": "uniform"}, (math.nan, 1, 1, 1, math.nan)),
    "mapping": ({"allocation": {"b": 0.75, "a": 0}}, (math.nan,) * 3),
    "random": ({"sparsity": 0.5, "allocation": "uniform", "criterion": "random"}, (math.inf,) * 5),
    "caps": ({"sparsity": 0.4, "max_sparsity": {"a": 0}}, (math.nan,) * 3),
}


@pytest.mark.parametrize("what", INFEASIBLE)
def test_keep_refuses_what_would_reach_into_them(what: str) -> None:
    asked, values = INFEASIBLE[what]
    target = with_bad(*values)
    before = {n: t.numpy().tobytes() for n, t in target.items()}
    with pytest.raises(Infeasible, match=r"Ask for|loosen the caps"):
        secateur.prune(target, nonfinite="keep", **asked)
    assert {n: t.numpy().tobytes() for n, t in target.items()} == before


def test_a_threshold_leaves_or_takes_them() -> None:
    kept, gone = with_bad(math.nan, math.inf), with_bad(math.nan, math.inf)
    assert secateur.prune(kept, threshold=4.5, nonfinite="keep").zeros == 6
    assert kept["b.weight"].isnan().sum() == 1
    assert secateur.prune(gone, threshold=4.5, nonfinite="prune").zeros == 8
    assert bool(torch.isfinite(gone["b.weight"]).all())


# ------------------------------------------------------------------------------- masks and plans


def test_masks_that_do_not_fit() -> None:
    good = torch.ones(6, 4, dtype=torch.bool)
    table: list[tuple[Any, type[Exception], str]] = [
        ({"fc.weight": good}, PlanMismatch, "mask for 'fc.weight', but the target has no such tensor; it has 0.bias, 0.weight"),
        ({"0.weight": good.t()}, PlanMismatch, r"mask of '0.weight' \(shape \(6, 4\), float32\).*got \(4, 6\), torch.bool"),
        ({"0.weight": good.float()}, PlanMismatch, r"bool tensor of its shape, True = keep; got \(6, 4\), torch.float32"),
        ({"0.weight": good.numpy()}, PlanMismatch, "got ndarray"),
        ({"0.weight": good.tolist()}, PlanMismatch, "got list"),
        ({"0.weight": good.to("meta")}, PlanMismatch, "0.weight.*meta"),
        ({"2.weight": torch.ones(2, 6, dtype=torch.bool), "0.weight": good[:5]}, PlanMismatch, r"got \(5, 4\)"),
        ({}, BadInput, "apply takes a Plan or a dict of bool masks, got dict"),
        (good, BadInput, "got Tensor"),
        (secateur.inspect(net()), BadInput, "got Report"),
        (None, BadInput, "got NoneType"),
    ]  # fmt: skip
    for masks, error, text in table:
        refused(error, text, lambda m, masks=masks: secateur.apply(masks, m))  # type: ignore[misc]


def test_two_masks_for_one_tensor() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    mask = torch.ones(2, 2, dtype=torch.bool)
    refused(PlanMismatch, "another name of '0.weight', which has a mask already",
            lambda m: secateur.apply({"0.weight": mask, "1.weight": mask}, m), model)  # fmt: skip


def test_a_plan_whose_values_have_changed() -> None:
    model = net()
    plan = secateur.plan(model, 0.5)
    model[2].weight.data *= 0.01
    text = r"at the plan's cut \d+ weights of '2.weight' \(shape \(2, 6\), float32\) would be zero, where the plan says \d+"
    refused(PlanMismatch, text, lambda m: secateur.apply(plan, m), model)
    for pattern in ("2x2", "channel"):
        again = net()
        made = secateur.plan(again, 0.5, pattern=pattern, allocation="uniform")
        again[2].weight.data *= 40
        refused(PlanMismatch, "where the plan says", lambda m, made=made: secateur.apply(made, m), again)  # type: ignore[misc]


def test_a_plan_that_meets_nan_later() -> None:
    model = net()
    plan = secateur.plan(model, 0.5)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(BadTensor, match=r"'2.weight' .*holds 1 NaN"):
        secateur.apply(plan, model)
    assert not bool((model[0].weight == 0).any())


NOT_A_PLAN = [
    "", "[]", "{}", "null", "nonsense", '{"secateur_plan": 1}', '{"secateur_plan": "1"}',
    '{"secateur_plan": 1, "rows": [1]}', '{"secateur_plan": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_A_PLAN)
def test_texts_that_are_no_plan(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a plan of secateur"):
        secateur.Plan.from_json(text)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput, match="not a plan of secateur"):
        secateur.load_plan(tmp_path / "plan.json")


def changed(key: str, value: Any) -> str:
    import json

    head = json.loads(secateur.plan(net(), 0.5).to_json())
    part = head
    *path, last = key.split("/")
    for step in path:
        part = part[int(step) if step.isdigit() else step]
    part[last] = value
    return json.dumps(head)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("secateur_plan", 2), ("pattern", "diagonal"), ("pattern", 3), ("reduce", "median"), ("rows", None), ("rows", {"a": 1}),
        ("rows/1/shape", "ab"), ("rows/1/dtype", "float33"), ("rows/1/dtype", "save"), ("rows/1/cut", {"key": 1}),
        ("rows/1/cut", None), ("rows/1/unknown", 1), ("rows/1/prune", "many"), ("criterion", "l1"), ("nonfinite", "maybe"),
        ("warnings", None), ("carries_masks", True),
    ],
)  # fmt: skip
def test_plans_that_were_changed_by_hand(key: str, value: Any) -> None:
    """Whether the text or the plan is refused, nothing is written, and the error is one of ours."""
    model = net()
    before = state(model)
    with pytest.raises((BadInput, PlanMismatch)):
        secateur.apply(secateur.Plan.from_json(changed(key, value)), model)
    assert state(model) == before


def test_plans_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(BadInput, match="no plan at"):
        secateur.load_plan(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput):
        secateur.load_plan(path)
    path.unlink()
    plan = secateur.plan(net(), 0.5, criterion=lambda weight: -weight)
    secateur.save_plan(plan, path)
    with pytest.raises(secateur.OutputExists, match="already there"):
        secateur.save_plan(plan, path)
    masks = tmp_path / "plan.json.masks.safetensors"
    whole = masks.read_bytes()
    masks.write_bytes(whole[:-3])
    with pytest.raises(BadInput):
        secateur.load_plan(path)
    masks.unlink()
    with pytest.raises(BadInput, match="carries its masks in a safetensors file beside"):
        secateur.load_plan(path)


def test_a_plan_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    with pytest.raises(secateur.OutputExists):
        secateur.save_plan(secateur.plan(net(), 0.5, criterion=lambda weight: -weight), path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("plan.json", "mine")]


# ---------------------------------------------------------------------------- what is no mistake


def test_harmless_oddities() -> None:
    """Rows of the table of bad input that are to be supported."""
    assert secateur.prune(nn.Linear(4, 4, bias=False), 0.5).zeros == 8
    assert secateur.prune(torch.empty(0), 0.5).total == 0
    assert secateur.prune(torch.empty(3, 0), pattern="2:4").total == 0
    assert secateur.prune(torch.tensor(2.0), 0.4).zeros == 0
    assert secateur.prune(torch.ones(4, 6).t(), 0.5).zeros == 12
    assert secateur.prune(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), 0.5).zeros == 60
    assert secateur.prune({"w.weight": torch.ones(2, 2, requires_grad=True)}, 0.5).zeros == 2
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert secateur.prune(frozen, 0.5).zeros == 8
    double = nn.Linear(4, 4).double()
    assert secateur.prune(double, 0.5).zeros == 8
    assert double.weight.dtype == torch.float64


def test_tensors_that_cannot_carry_the_pattern() -> None:
    """Chosen by default: skipped with one warning. Named by the user: refused."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1))
    with pytest.warns(
        secateur.SecateurWarning, match="cannot carry 2:4 and stay dense: 0.weight .its 3 inputs"
    ) as seen:
        report = secateur.prune(model, pattern="2:4")
    assert len(seen) == 1
    assert report.zeros == (8 * 8 * 9 + 6 * 8) // 2
    assert "its 3 inputs do not divide into groups of 4" in (report["0.weight"].skip or "")
    text = (
        r"'0.weight' \(shape \(8, 3, 3, 3\), float32\) cannot be pruned in the pattern 2:4: its 3 inputs do not divide"
    )
    refused(
        NotDefined,
        text,
        lambda m: secateur.prune(m, pattern="2:4", include="0.weight"),
        nn.Sequential(nn.Conv2d(3, 8, 3)),
    )
    refused(NothingChosen, "no tensor can carry the pattern 2:4: 0.weight",
            lambda m: secateur.prune(m, pattern="2:4"), nn.Sequential(nn.Conv2d(3, 8, 3)))  # fmt: skip
    refused(NothingChosen, "no tensor can carry the pattern 2:4: tensor .*input dimension",
            lambda m: secateur.prune(torch.ones(8), pattern="2:4"))  # fmt: skip


def test_roles_that_cannot_be_meant() -> None:
    target = {"emb": torch.ones(4, 4), "v": torch.ones(4)}
    with pytest.raises(BadInput, match=r"roles=\{'emb': 'layer'\}: a glob gets one of these roles: linear"):
        secateur.prune(target, 0.5, roles={"emb": "layer"})
    with pytest.raises(BadInput, match=r"'v' \(shape \(4,\), float32\) cannot be that"):
        secateur.prune(target, 0.5, roles={"v": "linear"})
    with pytest.raises(NothingChosen, match="matches no tensor"):
        secateur.prune(target, 0.5, roles={"w": "linear"})
    assert secateur.prune(target, 0.5, roles={"emb": "linear"}).zeros == 8
