"""Sensitivity over every pattern, criterion and dtype, and layers of every kind: each mask is that of prune, every bit comes
back, and counts that are allocated are met."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.evaluate.sensitivity import sensitivity
from tests.contract.nets import Kind, is_zero, net, snapshot
from tests.contract.table import CRITERIA, DTYPES, PATTERNS, expected_warnings

CASES = [
    (pattern, criterion, dtype)
    for i, (pattern, criterion) in enumerate(product(PATTERNS, CRITERIA))
    for j, dtype in enumerate(DTYPES)
    if j == i % len(DTYPES) or (criterion == "magnitude" and dtype in ("float32", "bfloat16"))
]
ASKED = {"2:4": (0.5,)}


class Kinds(nn.Module):
    """A transposed and a grouped convolution, a recurrent layer, attention, and a tied pair of linear layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(4, 8, 3, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, h, w) -> (batch, h * w, 8)."""
        h = self.groups(self.up(x).relu()).flatten(2).transpose(1, 2)
        h = self.lstm(h)[0]
        h = self.attention(h, h, h, need_weights=False)[0] + h
        out: Tensor = self.second(self.first(h).relu())
        return out


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {n: is_zero(p) for n, p in model.named_parameters()}


def follow(model: nn.Module, pattern: str, criterion: str) -> None:
    """Scans a model and compares every state that ``evaluate`` saw with what prune makes of a copy."""
    before, seen = snapshot(model), []
    asked = ASKED.get(pattern, (0.3, 0.6))
    choice: dict[str, Any] = {"pattern": PATTERNS[pattern], "criterion": CRITERIA[criterion]}

    def evaluate(m: nn.Module) -> dict[str, float]:
        seen.append(masks(m))
        return {"loss": sum(float(z.sum()) for z in seen[-1].values())}

    scan = sensitivity(model, evaluate, asked, **choice)
    assert snapshot(model) == before
    states = iter(seen)
    dense = next(states)
    uniform = {} if pattern == "2:4" else {"allocation": "uniform"}
    for layer in scan:
        for point in layer.points:
            if point.why is not None:
                continue
            other, found = copy.deepcopy(model), next(states)
            with expected_warnings():
                report = secateur.prune(other, point.asked, include=layer.name, **uniform, **choice)
            assert report.zeros == point.zeros == int(found[layer.name].sum()) > layer.zeros
            want = masks(other)
            assert all(torch.equal(found[n], want[n]) for n in want)
            assert scan.drop(layer, point.asked) == sum(int((found[n] & ~dense[n]).sum()) for n in dense)
    assert next(states, None) is None and all(layer.measured for layer in scan if layer.why is None)
    if pattern == "unstructured":
        found_counts = scan.allocation(0.45)
        report = secateur.prune(copy.deepcopy(model), 0.45, allocation=found_counts, **choice)
        total = sum(layer.numel for layer in scan)
        assert report.zeros == sum(found_counts.counts.values()) == max(round(0.45 * total), sum(x.zeros for x in scan))


@pytest.mark.parametrize(("pattern", "criterion", "dtype"), CASES)
def test_every_choice(pattern: str, criterion: str, dtype: str) -> None:
    kind: Kind = "ties" if dtype in ("float32", "bfloat16") else "plain"
    follow(net(dtype, kind), pattern, criterion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4", "channel"])
def test_every_kind_of_layer(pattern: str, dtype: torch.dtype) -> None:
    follow(Kinds(dtype), pattern, "magnitude")


def test_a_network_of_every_kind_is_run_and_measured() -> None:
    model = Kinds()
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    before, bits = model(x).detach(), snapshot(model)
    scan = sensitivity(model, lambda m: {"mse": float((m(x) - before).square().mean())}, (0.5, 0.9))
    assert [layer.name for layer in scan] == [
        "up.weight", "groups.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight",
        "attention.out_proj.weight", "first.weight",
    ]  # fmt: skip
    assert all((scan.drop(layer, 0.9) or 0) > 0 for layer in scan) and snapshot(model) == bits
    found = scan.allocation(0.7, budget="flops", flops=secateur.count_flops(model, x))
    secateur.prune(model, found.sparsity, allocation=found)
    left = secateur.count_flops(model, x)
    assert left.total - left.effective >= 0.7 * left.total
    assert model.second.weight is model.first.weight
