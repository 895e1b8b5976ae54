"""Block by block against a loop written out: observe a block in the whole network, prune it, go on to the next."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.evaluate.calibrate import Step
from tests.contract.nets import snapshot
from tests.contract.oracle import wide
from tests.unit.calibrating import (
    batches,
    choosing,
    first_of_rows,
    hessian_of,
    inputs_of,
    mlp,
    moving,
    norms_of,
    wanda,
)

LAYERS = ("0", "2", "4", "6")


def by_hand(model: nn.Module, names: tuple[str, ...], run: Callable[[], Any], sparsity: float = 0.5) -> None:
    """Layer after layer by Wanda, each with the inputs that it has once those before it are pruned."""
    for name in names:
        weight = model.get_submodule(name).weight
        norm = norms_of(inputs_of(model, [name], run)[name])
        gone = wanda(weight, norm, round(sparsity * weight.numel()))
        weight.data[torch.from_numpy(gone)] = 0


def test_a_sequential() -> None:
    model, data = mlp(), batches()
    other = copy.deepcopy(model)
    by_hand(other, LAYERS, lambda: [other(x.clone()) for x in data])
    report = secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert snapshot(model) == snapshot(other)
    assert report.sparsity == 0.5


def test_that_blocks_feed_forward_what_they_have_become() -> None:
    """Statistics of the dense network give another mask: the blocks before do matter."""
    model, data = mlp(), batches()
    dense, whole = copy.deepcopy(model), copy.deepcopy(model)
    caught = inputs_of(dense, list(LAYERS), lambda: [dense(x.clone()) for x in data])
    for name in LAYERS:
        weight = dense.get_submodule(name).weight
        gone = wanda(weight, norms_of(caught[name]), weight.numel() // 2)
        weight.data[torch.from_numpy(gone)] = 0
    secateur.prune(whole, 0.5, criterion="wanda", calibration=secateur.Calibration(data, blocks="whole"))
    secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert snapshot(whole) == snapshot(dense)
    assert snapshot(whole) != snapshot(model)


def test_named_blocks_hold_several_layers() -> None:
    """Layers of one block are observed together, before one of them is pruned."""
    model, data = nn.Sequential(mlp()[:3], nn.ReLU(), mlp()[4:]), batches()
    other = copy.deepcopy(model)
    for names in (("0.0", "0.2"), ("2.4", "2.6")):
        caught = inputs_of(other, list(names), lambda: [other(x.clone()) for x in data])
        for name in names:
            weight = other.get_submodule(name).weight
            weight.data[torch.from_numpy(wanda(weight, norms_of(caught[name]), weight.numel() // 2))] = 0
    for blocks in ("auto", ["0", "1", "2"]):
        pruned = copy.deepcopy(model)
        secateur.prune(pruned, 0.5, criterion="wanda", calibration=secateur.Calibration(data, blocks=blocks))
        assert snapshot(pruned) == snapshot(other)


class Encoder(nn.Module):
    """A list of layers, with a stem and a head that are no blocks."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(12, 16), nn.ModuleList(layers), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class Residual(nn.Module):
    """Adds to what it gets, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.down(self.up(x).relu()))


def test_blocks_that_write_to_what_they_get() -> None:
    torch.manual_seed(0)
    model, data = Encoder([Residual() for _ in range(3)]).double(), batches()
    other, before = copy.deepcopy(model), [x.clone() for x in data]
    for i in range(3):
        names = [f"layers.{i}.up", f"layers.{i}.down"]
        caught = inputs_of(other, names, lambda: [other(x) for x in data])
        for name in names:
            weight = other.get_submodule(name).weight
            weight.data[torch.from_numpy(wanda(weight, norms_of(caught[name]), weight.numel() // 2))] = 0
    with pytest.warns(
        secateur.SecateurWarning, match=r"2 tensors stay dense: head\.weight, stem\.weight \(2\): outside"
    ):
        report = secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert snapshot(model) == snapshot(other)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))
    assert report.sparsity == 0.5 and report.total == 6 * 16 * 24
    assert {r.name for r in report if r.skip and "outside the blocks" in r.skip} == {"head.weight", "stem.weight"}


class PreNorm(nn.Module):
    """Hands a residual stream on beside its hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, residual: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
        residual = x if residual is None else residual + x
        return self.fc(residual).tanh() * scale, residual


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PreNorm() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, scale=1.0 + i)
        return x + residual


def test_blocks_that_hand_on_more_than_their_hidden_states() -> None:
    torch.manual_seed(0)
    model, data = Streams().double(), batches(features=16)
    other = copy.deepcopy(model)
    by_hand(other, ("layers.0.fc", "layers.1.fc", "layers.2.fc"), lambda: [other(x) for x in data])
    secateur.prune(model, 0.5, criterion="wanda", calibration=data)
    assert snapshot(model) == snapshot(other)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_solver_gets_the_pruned_networks_hessian(pattern: str | None) -> None:
    model, data = mlp(), batches()
    other = copy.deepcopy(model)
    for name in LAYERS:
        layer = other.get_submodule(name)
        hessian = hessian_of(inputs_of(other, [name], lambda: [other(x.clone()) for x in data])[name])
        n = layer.weight.numel()
        asked = secateur.NM(2, 4) if pattern else secateur.Unstructured()
        new, _, _, _ = choosing(layer.weight.data, hessian=hessian, pattern=asked, count=n // 2, name=name)
        layer.weight.data = new
    report = secateur.prune(model, 0.5, solver=choosing, calibration=data, pattern=pattern)
    for name in LAYERS:
        a, b = model.get_submodule(name).weight, other.get_submodule(name).weight
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b)
    assert report.sparsity == 0.5 and report.asked["criterion"] == "choosing"


@pytest.mark.parametrize(
    "how", [{"criterion": "wanda"}, {"allocation": "uniform"}, {}], ids=["wanda", "uniform", "global"]
)
def test_a_solver_that_moves_what_a_criterion_leaves(how: dict[str, Any]) -> None:
    model, data = mlp(), batches()
    chosen = copy.deepcopy(model)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in LAYERS}
    report = secateur.prune(model, 0.5, solver=moving, calibration=data, **how)
    if "criterion" not in how:  # magnitude looks at nothing that a solver has moved
        secateur.prune(chosen, 0.5, **how)
        for n in LAYERS:
            assert torch.equal(model.get_submodule(n).weight, chosen.get_submodule(n).weight * 2)
    for n in LAYERS:
        w = model.get_submodule(n).weight
        assert torch.equal(w, before[n] * 2 * (w != 0))
    assert report.zeros == report.total // 2


def test_a_solver_on_groups_of_a_convolution_and_a_transposed_layer() -> None:
    """Each group of a convolution is a matrix of its own; counts add up to the tensor's; a transposed weight goes in upright."""
    from transformers.pytorch_utils import Conv1D

    seen: list[tuple[tuple[int, ...], int]] = []

    def counting(
        weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str
    ) -> tuple[Tensor, Tensor, float, float]:
        assert hessian.shape == (weight.shape[1],) * 2
        seen.append((tuple(weight.shape), count))
        return choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)

    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 10), Conv1D(7, 10)).double()
    data = [torch.randn(8, 4, 4, 4, dtype=torch.float64) for _ in range(3)]
    report = secateur.prune(model, 0.35, solver=counting, calibration=data)
    assert [s for s, _ in seen] == [(3, 18), (3, 18), (10, 24), (7, 10)]
    assert [c for _, c in seen][2:] == [84, round(0.35 * 70)] and sum(c for _, c in seen[:2]) == round(0.35 * 108)
    assert report.zeros == round(0.35 * 108) + 84 + round(0.35 * 70)
    assert int((model[3].weight == 0).sum()) == round(0.35 * 70)


def test_groups_of_four_in_a_convolution_lie_along_channels() -> None:
    model, data = nn.Sequential(nn.Conv2d(8, 4, (2, 3))).double(), [torch.randn(6, 8, 5, 6, dtype=torch.float64)]
    before = model[0].weight.detach().clone()
    found = secateur.calibrate(model, data, "hessian")["0.weight"]["hessian"].double()
    report = secateur.prune(model, solver=choosing, pattern="2:4", calibration=data)
    score = np.abs(wide(before)) * np.sqrt(wide(found.diagonal())).reshape(8, 2, 3)
    quads = np.moveaxis(score, 1, -1).reshape(-1, 4)
    gone = np.zeros(quads.shape, dtype=bool)
    np.put_along_axis(gone, np.argsort(quads, axis=1, kind="stable")[:, :2], True, axis=1)
    got = np.moveaxis(wide(model[0].weight) == 0, 1, -1).reshape(-1, 4)
    assert np.array_equal(got, gone)
    assert report.sparsity == 0.5
    left = model[0].weight != 0
    assert torch.equal(model[0].weight[left], before[left] / 2)


def test_one_blocks_statistics_are_in_memory_at_a_time() -> None:
    alive: list[int] = []
    held: list[weakref.ref[Tensor]] = []

    def watching(
        weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str
    ) -> tuple[Tensor, Tensor, float, float]:
        alive.append(sum(r() is not None for r in held))
        base = hessian if hessian._base is None else hessian._base
        held.append(weakref.ref(base))
        return choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)

    secateur.prune(mlp(), 0.5, solver=watching, calibration=batches())
    assert alive == [0, 0, 0, 0] and len(held) == 4
    assert not [r for r in held if r() is not None]


def test_progress_is_told_block_by_block() -> None:
    steps: list[Step] = []
    model = mlp()
    report = secateur.prune(
        model, 0.5, solver=choosing, calibration=secateur.Calibration(batches(), progress=steps.append)
    )
    assert [(s.block, s.number, s.blocks) for s in steps] == [("0", 1, 4), ("2", 2, 4), ("4", 3, 4), ("6", 4, 4)]
    for step in steps:
        (layer,) = step.layers
        assert layer.name == f"{step.block}.weight"
        assert (layer.zeros, layer.numel) == (report[layer.name].zeros, report[layer.name].numel)
        assert layer.loss is not None and layer.damping == 0.25 and step.seconds >= layer.seconds > 0


def test_an_allocation_is_kept_exactly() -> None:
    """Counts come from the whole network before the first block is pruned."""
    for allocation in ("uniform", "er", "erk", {"0.weight": 0.2, "*": 0.6}, "uniform_plus"):
        model, other = mlp(), mlp()
        report = secateur.prune(model, 0.5, criterion="wanda", allocation=allocation, calibration=batches())
        asked = secateur.plan(other, 0.5, allocation=allocation)
        assert {r.name: r.zeros for r in report.chosen} == {r.name: r.asked for r in asked.chosen}
    report = secateur.prune(mlp(), 0.5, criterion="wanda", calibration=batches(), max_sparsity={"6": 0.25})
    assert report["6.weight"].zeros == 20
    assert report.zeros == report.total // 2


def test_what_lies_outside_the_blocks_has_no_share() -> None:
    """ERK's total is that of the tensors that are pruned."""
    torch.manual_seed(0)
    model = Encoder([Residual() for _ in range(2)]).double()
    with pytest.warns(secateur.SecateurWarning, match="2 tensors stay dense"):
        report = secateur.prune(model, 0.6, criterion="wanda", allocation="erk", calibration=batches())
    assert report.total == 4 * 16 * 24 and report.zeros == round(0.6 * report.total)


def test_global_takes_statistics_of_the_dense_network() -> None:
    model, data = mlp(), batches()
    other = copy.deepcopy(model)
    norms = secateur.calibrate(other, data)
    report = secateur.prune(
        model, 0.5, criterion="wanda", pattern="unstructured", allocation="global", calibration=data
    )
    scores = [np.abs(wide(other.get_submodule(n).weight)) * wide(norms[f"{n}.weight"]["input_norm"]) for n in LAYERS]
    order = np.argsort(np.concatenate([s.ravel() for s in scores]), kind="stable")[: report.total // 2]
    gone = np.zeros(report.total, dtype=bool)
    gone[order] = True
    got = np.concatenate([wide(model.get_submodule(n).weight).ravel() == 0 for n in LAYERS])
    assert np.array_equal(got, gone)


def test_units_by_a_score_of_data() -> None:
    """Of channels: the mean of Wanda's score over each."""
    model, data = mlp(), batches()
    score = np.abs(wide(model[0].weight)) * wide(norms_of(torch.cat(data)))
    rows = np.argsort(score.mean(1), kind="stable")[:10]
    report = secateur.prune(
        model, 0.5, criterion="wanda", pattern="channel", allocation="uniform", include="0", calibration=data
    )
    assert np.array_equal(np.flatnonzero(~wide(model[0].weight).any(1)), np.sort(rows))
    assert not wide(model[0].bias)[rows].any()
    assert report.zeros == 120


def test_batches_of_any_kind() -> None:
    """A tensor, a tuple, a mapping, or anything that ``forward`` can run."""

    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    x = batches()
    kinds = {
        "tensors": (x, None),
        "tuples": ([(b, "label") for b in x], None),
        "mappings": ([{"x": b} for b in x], None),
        "objects": ([[b, b] for b in x], lambda model, batch: model(batch[1])),
        "a loader": (torch.utils.data.DataLoader(torch.cat(x), batch_size=20), None),
    }
    masks = []
    for data, forward in kinds.values():
        model = Named(*mlp())
        secateur.prune(model, 0.5, criterion="wanda", calibration=secateur.Calibration(data, forward=forward))
        masks.append(snapshot(model))
    assert all(m == masks[0] for m in masks[1:])


def test_rows_by_their_first() -> None:
    """The oracle itself: two rows, the smaller score of each first, the smallest of the second rank then."""
    score = np.array([[3.0, 1.0], [2.0, 9.0]])
    gone = first_of_rows(score, np.zeros((2, 2), dtype=bool), 3)
    assert gone.tolist() == [[True, True], [True, False]]
