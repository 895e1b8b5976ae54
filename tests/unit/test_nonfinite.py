"""NaN and infinities are refused by default; ``nonfinite=`` keeps them, or prunes them first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.errors import BadTensor, Infeasible


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
