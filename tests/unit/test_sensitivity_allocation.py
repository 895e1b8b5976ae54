"""From a scan to an allocation: exact totals, the best of all within the assumption, no further than was measured."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import BadInput, Infeasible, NotDefined
from secateur.evaluate.sensitivity import sensitivity
from secateur.evaluate.sensitivity_facts import Layer, Piece, Point, Sensitivity

ASKED = (0.5, 0.9)


def layer(name: str, numel: int, drops: tuple[float, ...], zeros: int = 0, size: int = 4) -> Layer:
    piece = Piece(name, (), (1, numel), "float32" if size == 4 else "bfloat16", "linear", numel, zeros, size)
    points = (Point(s, round(s * numel), {"accuracy": 90.0 - d}) for s, d in zip(ASKED, drops, strict=True))
    return Layer(name, (piece,), tuple(points))


def scan_of(*layers: Layer) -> Sensitivity:
    return Sensitivity("accuracy", True, {"accuracy": 90.0}, "magnitude", "unstructured", ASKED, layers)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def scanned(model: nn.Module, **more: Any) -> Sensitivity:
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    before = model(x).detach()
    return sensitivity(model, lambda m: {"mse": float((m(x) - before).square().mean())}, **more)


@pytest.mark.parametrize("sparsity", [0.0, 1e-4, 0.123, 0.5, 0.777, 0.9])
def test_prune_takes_it_and_the_total_is_exact(sparsity: float) -> None:
    model = convolutions()
    scan = scanned(model)
    found = scan.allocation(sparsity)
    total = sum(layer.numel for layer in scan)
    assert sum(found.counts.values()) == round(total * sparsity)
    for asked, way in ((found.sparsity, found), (sparsity, found), (sparsity, found.shares)):
        pruned = copy.deepcopy(model)
        report = secateur.prune(pruned, asked, allocation=way)
        assert {r.name: r.zeros for r in report.chosen} == found.counts
    assert all(scan.curve(x).at(found.counts[x.name]) <= scan.curve(x).loss[-1] for x in scan)
    assert secateur.plan(model, sparsity, allocation=found).allocation == "sensitivity"


def test_less_is_predicted_to_be_lost_than_by_the_same_share_everywhere() -> None:
    scan = scanned(convolutions())
    for s in (0.5, 0.7, 0.9):
        uniform = sum(scan.drop(x, s) or 0.0 for x in scan)
        assert scan.allocation(s).loss <= uniform


def test_no_other_counts_lose_less() -> None:
    scan = scan_of(layer("a", 10, (1.0, 8.0)), layer("b", 12, (4.0, 4.0)), layer("c", 8, (0.0, 9.0)))
    curves = [scan.curve(x) for x in scan]
    for total in range(28):
        found = scan.allocation(total / 30)
        ways = itertools.product(*(range(c.high + 1) for c in curves))
        best = min(sum(c.at(z) for c, z in zip(curves, w, strict=True)) for w in ways if sum(w) == total)
        assert sum(found.counts.values()) == total and found.loss == pytest.approx(best, abs=1e-4)


def test_no_layer_goes_further_than_it_was_measured() -> None:
    scan = scan_of(layer("a", 100, (1.0, math.inf)), layer("b", 100, (5.0, 80.0)))
    assert scan.allocation(0.7).counts == {"a": 50, "b": 90}
    with pytest.raises(Infeasible, match=r"141 of 200 weights .*140 at most, a share of 0\.7\."):
        scan.allocation(0.705)
    cannot = Layer("d", (Piece("d", (), (1, 7), "float32", "linear", 7, 0, 4),), why="cannot carry it")
    assert scan_of(*scan.layers, cannot).allocation(0.7).counts == {"a": 50, "b": 90}  # prune skips it too
    with pytest.raises(Infeasible, match="no layer can carry"):
        scan_of(cannot).allocation(0.5)


@pytest.mark.filterwarnings("ignore:wholly zero before pruning")
def test_zeros_that_are_there_stay_and_count() -> None:
    wholly = Layer(
        "z", (Piece("z", (), (1, 40), "float32", "linear", 40, 40, 4),), (Point(0.5, 40, why="wholly zero before"),)
    )
    scan = scan_of(layer("a", 100, (1.0, 9.0)), wholly)
    assert scan.allocation(0.5).counts == {"a": 30, "z": 40}
    assert scan.allocation(0.1).counts == {"a": 0, "z": 40}
    with pytest.raises(Infeasible, match=r"130 at most, a share of 0\.928571\."):
        scan.allocation(0.95)
    model = convolutions()
    with torch.no_grad():
        model[5].weight[:12] = 0
        model[7].weight.zero_()
    scan = sensitivity(model, lambda m: {"loss": -float(sum(p.abs().sum() for p in m.parameters()))})
    found = scan.allocation(0.7)
    assert found.counts["7.weight"] == 96 and found.counts["5.weight"] >= 1152
    for way in (found, found.shares):
        report = secateur.prune(copy.deepcopy(model), 0.7, allocation=way)
        assert {r.name: r.zeros for r in report.chosen} == found.counts


def test_a_group_loses_the_same_share_of_every_tensor() -> None:
    model = convolutions()
    scan = scanned(model, groups={"convolutions": ["0", "2"]})
    found = scan.allocation(0.8)
    assert sum(found.counts.values()) == round(0.8 * sum(x.numel for x in scan))
    shares = [found.counts[n] / model.get_parameter(n).numel() for n in ("0.weight", "2.weight")]
    assert abs(shares[0] - shares[1]) < 1 / 54
    assert secateur.prune(model, 0.8, allocation=found).zeros == sum(found.counts.values())


def test_flops_that_are_to_go_are_gone() -> None:
    model, x = convolutions(), torch.randn(1, 1, 8, 8)
    scan, flops = scanned(model), secateur.count_flops(model, x)
    for share in (0.3, 0.6, 0.85):
        found = scan.allocation(share, budget="flops", flops=flops)
        pruned = copy.deepcopy(model)
        secateur.prune(pruned, found.sparsity, allocation=found)
        left = secateur.count_flops(pruned, x)
        saved = left.total - left.effective
        most = max(flops.by_weight[n] / model.get_parameter(n).numel() for n in found.counts)
        assert share * flops.total <= saved < share * flops.total + most
    by_count = scan.allocation(0.6)
    assert scan.allocation(0.6, budget="flops", flops=flops).counts != by_count.counts
    with pytest.raises(Infeasible, match="FLOPs"):
        scan.allocation(0.96, budget="flops", flops=flops)


def test_bytes_count_the_wider_weights_for_more() -> None:
    scan = scan_of(layer("a", 100, (1.0, 2.0)), layer("b", 100, (1.0, 2.0), size=2))
    found = scan.allocation(0.3, budget="bytes")
    assert 4 * found.counts["a"] + 2 * found.counts["b"] == 180 and found.counts["a"] > found.counts["b"]
    assert found.sparsity == sum(found.counts.values()) / 200
    model = {"a.weight": torch.ones(10, 10), "b.weight": torch.ones(10, 10, dtype=torch.bfloat16)}
    refuse = scan_of(layer("a.weight", 100, (1.0, 2.0)), layer("b.weight", 100, (1.0, 2.0), size=2))
    made = refuse.allocation(0.3, budget="bytes")
    with pytest.raises(BadInput, match=r"budget of bytes, which it meets at sparsity=0\.\d+ only; got 0\.7"):
        secateur.prune(model, 0.7, allocation=made)
    assert secateur.prune(model, made.sparsity, allocation=made).zeros == sum(made.counts.values())


def test_it_answers_at_every_step_of_a_schedule() -> None:
    model = convolutions()
    found = scanned(model).allocation(0.8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    pruner = secateur.Pruner(
        model, optimizer, secateur.schedules.linear(0.8, begin=0, end=4, every=1), allocation=found
    )
    reached = []
    for _ in range(4):
        model(torch.randn(4, 1, 8, 8)).sum().backward()
        optimizer.step()
        reached.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
    assert reached == [round(total * s) for s in (0.2, 0.4, 0.6, 0.8)]
    pruner.close()


def test_other_tensors_are_refused() -> None:
    model = convolutions()
    found = scanned(model).allocation(0.5)
    with pytest.raises(BadInput, match=r"measured on other tensors: 7\.weight"):
        secateur.prune(model, 0.5, allocation=found, ignore="7")
    other = nn.Sequential(*list(convolutions())[:7], nn.Linear(24, 5))
    with pytest.raises(BadInput, match=r"measured on other tensors: 7\.weight"):
        secateur.prune(other, 0.5, allocation=found)
    assert not any((p == 0).any() for p in (*model.parameters(), *other.parameters()) if p.dim() > 1)


def test_slips_are_refused() -> None:
    scan = scan_of(layer("a", 100, (1.0, 9.0)))
    flops = secateur.Flops(100, {"": 100}, 100)
    for call, words in {
        (lambda: scan.allocation(50)): "Did you mean 0.5",
        (lambda: scan.allocation(0.5, budget="time")): "weights, flops, bytes; got 'time'",  # type: ignore[arg-type]
        (lambda: scan.allocation(0.5, budget="flops")): "flops= goes with",
        (lambda: scan.allocation(0.5, flops=flops)): "flops= goes with",
        (lambda: scan.allocation(0.5, budget="flops", flops=flops)): "does not tell what the products of 'a' take",
    }.items():
        with pytest.raises(BadInput) as e:
            call()
        assert words in str(e.value)
    groups = Sensitivity("loss", False, {"loss": 1.0}, "magnitude", "2:4", (0.5,), scan.layers)
    with pytest.raises(NotDefined, match="2:4 fixes"):
        groups.allocation(0.5)


def test_it_reads_like_a_table_and_says_what_is_assumed() -> None:
    scan = scan_of(layer("\x1b[31ma", 100, (1.0, 9.0)), layer("b", 300, (0.5, 2.0)))
    text = str(scan.allocation(0.8))
    assert "\x1b" not in text and r"\x1b[31ma" in text
    assert "320 weights, sparsity 80.0000%; accuracy is predicted to fall by" in text and "adds up" in " ".join(
        text.split()
    )


def test_channels_are_taken_whole() -> None:
    model = convolutions()
    scan = scanned(model, pattern="channel")
    found = scan.allocation(0.6)
    total = sum(x.numel for x in scan)
    assert sum(found.counts.values()) == round(0.6 * total)
    report = secateur.prune(model, 0.6, allocation=found, pattern="channel")
    sizes = {r.name: r.numel // r.shape[0] for r in report.chosen}
    assert all(found.counts[r.name] - sizes[r.name] < r.zeros <= found.counts[r.name] for r in report.chosen)  # type: ignore[operator]


def test_a_scan_that_was_read_back_gives_the_same_allocation() -> None:
    scan = scanned(convolutions())
    again = Sensitivity.from_json(scan.to_json())
    assert again == scan and json.loads(scan.to_json())["secateur_sensitivity"] == 1
    assert again.allocation(0.77).counts == scan.allocation(0.77).counts
