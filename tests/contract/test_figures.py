"""Promise 12: the figures of a report are counted from what was written, and an independent count agrees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from tests.contract.disk import load, save_one, save_shards
from tests.contract.nets import CHOSEN, Kind, is_zero, net, tensors
from tests.contract.table import DEFINED, DTYPES, Case, expected_warnings, ids

PARAMETERS = [n for n, _ in net().named_parameters()]
TOTAL = 96 + 8 + 8 + 8 + 40 + 256 + 32 + 128
"""conv and its bias, the norm's two, the embedding, fc1 and its bias, fc2."""


def smallest_left(t: Tensor) -> float | None:
    """The smallest magnitude that is not zero; NaN and infinities are none."""
    wide = t.detach().double().abs().flatten()
    live = wide[(wide != 0) & torch.isfinite(wide)]
    return float(live.min()) if live.numel() else None


def agrees(report: secateur.Report, state: dict[str, Tensor], parameters: list[str]) -> None:
    """Every figure of a report against a count of the tensors as they are now."""
    assert [r.name for r in report.rows if r.zeros is not None] == sorted(parameters)
    for row in report.rows:
        t = state[row.name]
        assert (row.shape, row.numel, row.dtype) == (tuple(t.shape), t.numel(), str(t.dtype)[6:])
        if row.zeros is None:
            continue
        assert row.zeros == int(is_zero(t).sum()), row.name
        assert row.sparsity == (row.zeros / t.numel() if t.numel() else None)
        assert row.threshold == smallest_left(t), row.name
        assert row.nonfinite == int((~torch.isfinite(t.double())).sum()), row.name
    chosen = [state[n] for n in CHOSEN]
    zeros, total = sum(int(is_zero(t).sum()) for t in chosen), sum(t.numel() for t in chosen)
    assert (report.zeros, report.total, report.sparsity) == (zeros, total, zeros / total)
    everything = [state[n] for n in parameters]
    all_zeros, all_numel = sum(int(is_zero(t).sum()) for t in everything), sum(t.numel() for t in everything)
    assert (report.model_zeros, report.model_total) == (all_zeros, all_numel)
    assert report.model_sparsity == all_zeros / all_numel
    assert report.compression_ratio == all_numel / (all_numel - all_zeros)


@pytest.mark.parametrize("case", DEFINED[::4], ids=ids(DEFINED))
def test_a_count_agrees(case: Case) -> None:
    kind: Kind = "ties" if case.nonfinite == "error" else "bad"
    model = net("bfloat16", kind)
    with expected_warnings():
        report = secateur.prune(model, **case.asked())
    agrees(report, model.state_dict(), PARAMETERS)
    again = secateur.inspect(model)
    agrees(again, model.state_dict(), PARAMETERS)
    assert (again.zeros, again.model_zeros) == (report.zeros, report.model_zeros)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_count_agrees_in_every_dtype(dtype: str, tmp_path: Path) -> None:
    model = net(dtype, "ties")
    dense = tensors(model)
    agrees(secateur.inspect(model), dense, PARAMETERS)
    agrees(secateur.prune(model, 0.5), model.state_dict(), PARAMETERS)
    for source in (save_one(dense, tmp_path), save_shards(dense, tmp_path / "in")):
        out = tmp_path / f"out-{dtype}.safetensors" if source.is_file() else tmp_path / f"out-{dtype}"
        report = secateur.prune(source, 0.5, out=out)
        on_disk = load(out)
        assert report.out == str(out)
        agrees(report, on_disk, PARAMETERS)
        agrees(secateur.inspect(out), on_disk, PARAMETERS)


def test_by_hand() -> None:
    """ShrinkBench's ratio, and sparsities of the chosen weights and of all."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    for p in model.parameters():
        p.data = torch.arange(1.0, p.numel() + 1).view(p.shape)
    report = secateur.prune(model, 0.5)
    # chosen: 20 + 10; the others: 5 of a bias, 5 + 5 of a norm. LayerNorm's bias is not zero here.
    assert (report.total, report.zeros, report.sparsity) == (30, 15, 0.5)
    assert (report.model_total, report.model_zeros) == (45, 15)
    assert report.model_sparsity == 15 / 45
    assert report.compression_ratio == 45 / 30 == 1.5
    # 1 to 20 and 1 to 10 in one pool: below 7.5 there are 7 of each, and of two eights "0.weight" comes first
    assert [(r.name, r.zeros, r.threshold) for r in report.chosen] == [("0.weight", 8, 9.0), ("2.weight", 7, 8.0)]
    assert {r.name: (r.role, r.skip) for r in report.rows if r.skip} == {
        "0.bias": ("bias", "a bias"), "1.bias": ("bias", "a bias"),
        "1.weight": ("norm", "a norm or another per-channel scale"),
    }  # fmt: skip


def test_what_there_is_nothing_of() -> None:
    report = secateur.prune({"a.weight": torch.empty(0, 4), "b.weight": torch.tensor([[1.0, 2.0]])}, 0.5)
    assert (report["a.weight"].sparsity, report["a.weight"].threshold, report.sparsity) == (None, None, 0.5)
    assert "n/a" in str(report)
    nothing = secateur.prune(torch.empty(0, 4), 0.5)
    assert (nothing.total, nothing.zeros, nothing.sparsity) == (0, 0, 0.0)


def test_nothing_left() -> None:
    target = {"a.weight": torch.ones(1, 2), "b.weight": torch.full((10, 2), 5.0)}
    with pytest.warns(
        secateur.SecateurWarning, match=r"left with nothing: a\.weight; cap them with max_sparsity"
    ) as caught:
        secateur.plan(target, 0.5)
        report = secateur.prune(target, 0.5)
    assert [w.filename for w in caught] == [__file__] * 2, "a warning points at the call"
    assert any("left with nothing: a.weight" in w for w in report.warnings)
    assert (report["a.weight"].threshold, report["a.weight"].sparsity) == (None, 1.0)
    wholly = torch.zeros(4, 4)
    with pytest.warns(secateur.SecateurWarning, match="wholly zero before pruning"):
        report = secateur.prune({"lora.weight": wholly}, 0.5)
    assert report.compression_ratio == math.inf
    assert json.loads(report.to_json())["compression_ratio"] is None


def test_json_says_the_same() -> None:
    model = net("mixed", "ties")
    report = secateur.prune(model, 0.5, allocation="erk", ignore="fc2")
    facts: dict[str, Any] = json.loads(report.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    for key in ("sparsity", "zeros", "total", "model_sparsity", "model_zeros", "model_total", "compression_ratio"):
        assert facts[key] == getattr(report, key)
    assert facts["asked"] == {
        "sparsity": 0.5, "threshold": None, "criterion": "magnitude", "allocation": "erk", "pattern": "unstructured",
    }  # fmt: skip
    rows = {r["name"]: r for r in facts["rows"]}
    assert list(rows) == [r.name for r in report.rows]
    assert rows["fc2.weight"]["skip"] == "ignored by the filter"
    assert rows["fc1.weight"]["shape"] == [32, 8]
    for name, row in rows.items():
        assert (row["zeros"], row["threshold"], row["sparsity"]) == (
            report[name].zeros, report[name].threshold, report[name].sparsity,
        )  # fmt: skip


@pytest.mark.parametrize("case", DEFINED[::5], ids=ids(DEFINED))
def test_a_plan_says_before_what_the_report_says_after(case: Case) -> None:
    kind: Kind = "ties" if case.nonfinite == "error" else "bad"
    model = net("float32", kind)
    with expected_warnings():
        plan = secateur.plan(model, **case.asked())
        report = secateur.prune(model, **case.asked())
    assert (plan.prune, plan.total) == (report.zeros, report.total)
    for row in plan.chosen:
        after = report[row.name]
        assert (row.prune, row.numel, row.sparsity, row.asked) == (
            after.zeros,
            after.numel,
            after.sparsity,
            after.asked,
        )
        assert row.threshold == after.threshold
