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
from torch import nn

import secateur
from secateur.errors import BadInput, NotDefined, NothingChosen
from tests.unit.refusals import Call, net, refused

# ------------------------------------------------------------------------------------------ numbers


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


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "value", ["4:2", "4:4", "0:4", "2:4:8", "unstructed", "", "0x4", "4x", "2,4", 4, (2, 4), ["2:4"], nn.Linear]
)
def test_unknown_patterns(value: Any) -> None:
    text = r"N of every M|pattern must be .*unstructured.*\"N:M\"|two ints >= 1"
    refused(BadInput, text, lambda m: secateur.prune(m, 0.5, pattern=value))


@pytest.mark.parametrize("value", ["globl", "layer", "", 0.5, [0.5], ("global",)])
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


# ------------------------------------------------------------------------------------------ targets


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


# ------------------------------------------------------------------------------- what is no mistake


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
