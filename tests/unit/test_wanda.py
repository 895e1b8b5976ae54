"""Wanda against |W| · ‖x‖ and a stable sort of every row, for every kind of layer; against magnitude where norms are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import secateur
from tests.contract.oracle import wide
from tests.unit.calibrating import correlated, first_of_rows, norms_of, wanda

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def pruned(layer: nn.Module, batches: list[Tensor], sparsity: float = 0.5, **how: Any) -> secateur.Report:
    """A single layer as a network of one block."""
    return secateur.prune(nn.Sequential(layer), sparsity, criterion="wanda", calibration=batches, **how)


@dtypes
@pytest.mark.parametrize(
    ("rows", "columns", "sparsity"), [(7, 13, 0.5), (5, 8, 0.3), (1, 9, 0.5), (6, 1, 0.5), (4, 6, 0.99)]
)
def test_linear(dtype: torch.dtype, rows: int, columns: int, sparsity: float) -> None:
    layer = nn.Linear(columns, rows).to(dtype)
    batches = [correlated(20, columns, seed=s, dtype=dtype) for s in range(3)]
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    count = round(sparsity * rows * columns)
    with (
        pytest.warns(secateur.SecateurWarning, match="left with nothing") if count == rows * columns else nullcontext()
    ):
        report = pruned(layer, batches, sparsity)
    gone = wanda(before, norms_of(torch.cat(batches)), count)
    assert np.array_equal(wide(layer.weight), np.where(gone, 0, wide(before)))
    assert report.zeros == gone.sum() == count
    assert gone.sum(1).max() - gone.sum(1).min() <= 1
    assert torch.equal(layer.bias, bias)
    assert report.asked["criterion"] == "wanda" and report.asked["pattern"] == "row"


def test_transposed_conv1d() -> None:
    layer = Conv1D(9, 6)  # 6 inputs, 9 outputs, stored (in, out)
    before = layer.weight.detach().clone()
    batches = [correlated(30, 6, seed=s).view(2, 15, 6) for s in range(2)]
    report = pruned(layer, batches, 0.4)
    gone = wanda(before.T, norms_of(torch.cat(batches)), round(0.4 * 54)).T
    assert np.array_equal(wide(layer.weight), np.where(gone, 0, wide(before)))
    assert report.zeros == 22


class PadsItself(nn.Conv2d):
    """Pads by hand, as TensorFlow does, and then does not pad."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 1, 2)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "kernel of one": lambda: nn.Conv2d(4, 6, 1),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "two strides": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0)),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same"),
    "same, dilated": lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2)),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "pads itself": lambda: PadsItself(4, 6, 3),
    "one-dimensional": lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2),
    "one-dimensional, same, groups": lambda: nn.Conv1d(4, 6, 4, padding="same", groups=2),
}


def columns_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What a convolution multiplies its weight with, (groups, features, positions), found by probing: for every feature the
    output of a convolution whose only weight is one."""
    probe = copy.deepcopy(layer).double()
    groups, (out, *rest) = probe.groups, probe.weight.shape
    features = int(np.prod(rest))
    found = []
    with torch.no_grad():
        for j in range(features):
            probe.weight.zero_()
            probe.bias.zero_()
            probe.weight.view(groups, out // groups, features)[:, 0, j] = 1
            y = probe(x.double())
            found.append(y.view(len(y), groups, out // groups, -1)[:, :, 0].transpose(0, 1).reshape(groups, -1))
    return torch.stack(found, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str) -> None:
    layer = CONVOLUTIONS[kind]()
    shape = (5, 4, 9) if isinstance(layer, nn.Conv1d) else (5, 4, 7, 8)
    batches = [torch.randn(*shape, generator=torch.Generator().manual_seed(s)) * (s + 1) for s in range(2)]
    batches = [x * torch.linspace(0.5, 2, 4).view(1, 4, *[1] * (x.dim() - 2)) for x in batches]
    before, n = layer.weight.detach().clone(), layer.weight.numel()
    columns = torch.cat([columns_of(layer, x) for x in batches], 2)
    norm = columns.square().mean(2).sqrt().float()  # (groups, features)
    report = pruned(layer, batches, 0.45)
    flat = before.view(layer.groups, len(before) // layer.groups, -1)
    score = np.abs(wide(flat)) * wide(norm)[:, None]
    gone = first_of_rows(score.reshape(len(before), -1), np.zeros((len(before), score.shape[2]), bool), round(0.45 * n))
    assert np.array_equal(
        wide(layer.weight).reshape(len(before), -1), np.where(gone, 0, wide(before).reshape(len(before), -1))
    )
    assert report.zeros == round(0.45 * n)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_what_goes_into_a_convolution(kind: str) -> None:
    """Norms and Hessians against the columns found by probing; a picture alone, without a batch, counts as one."""
    layer = CONVOLUTIONS[kind]()
    shape = (3, 4, 9) if isinstance(layer, nn.Conv1d) else (3, 4, 7, 8)
    x = torch.randn(shape)
    found = secateur.calibrate(layer, [x[:2], x[2]], ["input_norm", "hessian"])["weight"]
    columns = columns_of(layer, x)
    hessian = 2 / columns.shape[2] * columns @ columns.mT
    torch.testing.assert_close(found["hessian"].double().view_as(hessian), hessian, rtol=1e-4, atol=1e-5)
    norm = columns.square().mean(2).sqrt()
    torch.testing.assert_close(found["input_norm"].double().view_as(norm), norm, rtol=1e-5, atol=1e-6)


@dtypes
def test_equal_norms_are_magnitude_by_rows(dtype: torch.dtype) -> None:
    """Inputs of +1 and -1 have the norm 1: the mask is that of magnitude, bit for bit, with ties."""
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64, 37), generator=g) * 2 - 1
    layer = nn.Linear(37, 23, bias=False)
    layer.weight.data = (torch.randn(23, 37, generator=g) * 4).round_().div_(4).to(dtype)
    other = copy.deepcopy(layer)
    pruned(layer.to(dtype), [signs.to(dtype)], 0.6)
    secateur.prune(other, 0.6, pattern="row")
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_norms_of_any_size_are_magnitude(dtype: torch.dtype) -> None:
    """A product of two float32 numbers is exact in float64, so a norm takes no two neighbouring weights for equal."""
    w = torch.tensor([[1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.5, 2.0, 3.0]]).repeat(50, 1).to(dtype)
    w = w * torch.randn(50, 6).sign().to(dtype)
    for norm in (0.1, 1 / 3, 0.7, 12345.678):
        a, b = w.clone(), w.clone()
        secateur.prune(
            {"fc.weight": a}, 1 / 3, criterion="wanda", statistics={"fc.weight": {"input_norm": torch.full((6,), norm)}}
        )
        secateur.prune({"fc.weight": b}, 1 / 3, pattern="row")
        assert torch.equal(a, b)


def test_two_of_four_takes_the_two_smallest_of_each_four() -> None:
    layer, x = nn.Linear(16, 6, bias=False), correlated(64, 16)
    before = layer.weight.detach().clone()
    report = pruned(layer, [x], None, pattern="2:4")
    score = np.abs(wide(before)) * wide(norms_of(x))
    order = np.argsort(score.reshape(-1, 4), axis=1, kind="stable")
    gone = np.zeros((24, 4), dtype=bool)
    np.put_along_axis(gone, order[:, :2], True, axis=1)
    assert np.array_equal(wide(layer.weight) == 0, gone.reshape(6, 16))
    assert report.sparsity == 0.5


def test_two_of_four_in_a_convolution_groups_channels() -> None:
    layer = nn.Conv2d(8, 4, (2, 3), bias=False)
    x = torch.randn(4, 8, 6, 7) * torch.linspace(0.3, 3, 8).view(1, 8, 1, 1)
    before = layer.weight.detach().clone()
    norm = columns_of(_with_bias(layer), x).square().mean(2).sqrt().view(8, 2, 3)
    pruned(layer, [x], None, pattern="2:4")
    score = np.moveaxis(np.abs(wide(before)) * wide(norm), 1, -1).reshape(-1, 4)
    gone = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(gone, np.argsort(score, axis=1, kind="stable")[:, :2], True, axis=1)
    assert np.array_equal(np.moveaxis(wide(layer.weight) == 0, 1, -1).reshape(-1, 4), gone)


def _with_bias(layer: nn.Conv2d) -> nn.Conv2d:
    made = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)  # type: ignore[arg-type]
    made.weight.data = layer.weight.data.clone()
    return made


@pytest.mark.parametrize("sizes", [(7, 13), (11, 3), (31, 17)], ids=str)
def test_counts_are_exact_and_rows_alike(sizes: tuple[int, int]) -> None:
    for s in (0.1, 0.37, 0.5, 0.81):
        layer = nn.Linear(sizes[1], sizes[0])
        report = pruned(layer, [correlated(40, sizes[1])], s)
        zeros = (layer.weight == 0).sum(1)
        assert report.zeros == round(s * sizes[0] * sizes[1])
        assert int(zeros.max() - zeros.min()) <= 1


def test_absolute_and_nested() -> None:
    """0.3 and then 0.5 is 0.5; twice 0.5 is 0.5; and the sparser lies inside the denser."""
    first, batches = nn.Linear(24, 17), [correlated(60, 24)]
    second = copy.deepcopy(first)
    pruned(first, batches, 0.3)
    at = first.weight.detach().clone()
    pruned(first, batches, 0.5)
    pruned(second, batches, 0.5)
    assert torch.equal(first.weight, second.weight)
    assert bool(((at == 0) <= (first.weight == 0)).all())
    before = first.weight.detach().clone()
    assert pruned(first, batches, 0.5).zeros == round(0.5 * 24 * 17)
    assert torch.equal(first.weight, before)


def test_zeros_come_first_whatever_their_row() -> None:
    """More is zero than asked: nothing more goes. Zeros in one row leave the others their weights."""
    layer = nn.Linear(10, 4, bias=False)
    layer.weight.data[0] = 0
    layer.weight.data[1, :5] = -0.0
    before = layer.weight.detach().clone()
    assert pruned(layer, [correlated(30, 10)], 0.3).zeros == 15
    assert torch.equal(layer.weight, before)
    assert pruned(layer, [correlated(30, 10)], 0.5).zeros == 20
    assert (layer.weight == 0).sum(1).tolist() == [10, 5, 3, 2]


def test_a_dead_input_goes_first() -> None:
    layer, x = nn.Linear(6, 5), correlated(40, 6)
    x[:, 2] = 0
    pruned(layer, [x], 1 / 6)
    assert bool((layer.weight[:, 2] == 0).all()) and int((layer.weight == 0).sum()) == 5


def test_a_layer_without_an_input_that_lives_is_told() -> None:
    """A norm of zero everywhere tells its weights apart no more."""
    with pytest.warns(secateur.SecateurWarning, match=r"wanda gives all weights of a tensor one value.*0\.weight"):
        report = pruned(nn.Linear(6, 5), [torch.zeros(4, 6)], 0.5)
    assert report.zeros == 15 and any("one value" in w for w in report.warnings)


def test_float64_weights_keep_their_order() -> None:
    """Weights that float32 takes for equal, in an order that is not that of their index."""
    w = 1 + torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64) * 1e-12
    layer = nn.Linear(4, 1, bias=False).double()
    layer.weight.data = w[None]
    pruned(layer, [torch.ones(8, 4, dtype=torch.float64)], 0.5)
    assert (layer.weight == 0).tolist() == [[False, False, True, True]]
