"""A packed layer gives what the layer gave, to the accuracy of its dtype, and comes back to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.core.layouts import Layout
from secateur.runtime.layers import PackedLayer
from secateur.runtime.modules import pack, unpack
from tests.contract.nets import bits
from tests.unit.packed_nets import DTYPES, LAYOUTS, near, sparse_

transformers = pytest.importorskip("transformers")


def conv1d(out: int, columns: int) -> nn.Module:
    layer: nn.Module = transformers.pytorch_utils.Conv1D(out, columns)
    torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    return layer


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda out, columns: nn.Linear(columns, out),
    "linear without bias": lambda out, columns: nn.Linear(columns, out, bias=False),
    "Conv1D": conv1d,
    "convolution": lambda out, columns: nn.Conv2d(columns, out, 1),
    "convolution in steps": lambda out, columns: nn.Conv2d(columns, out, 1, stride=(2, 3), bias=False),
    "convolution of a row": lambda out, columns: nn.Conv1d(columns, out, 1, stride=2, padding="valid"),
}
SHAPES = {"odd": (37, 101), "one row": (1, 70), "one column": (9, 1), "one weight": (1, 1), "words": (64, 128)}
DENSITIES = {"sparse": 0.1, "half": 0.5, "empty": 0.0, "full": 1.0}


def inputs(layer: nn.Module, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of every rank that the layer takes, with and without rows."""
    if isinstance(layer, nn.Conv2d):
        shapes = [(2, columns, 5, 7), (columns, 5, 7), (0, columns, 5, 7)]
    elif isinstance(layer, nn.Conv1d):
        shapes = [(2, columns, 5), (columns, 5)]
    elif isinstance(layer, nn.Linear):
        shapes = [(columns,), (3, columns), (2, 3, columns), (0, columns), (2, 0, columns), (1, 1, 2, columns)]
    else:
        shapes = [(3, columns), (2, 3, columns)]
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g).to(dtype) for s in shapes]


def right(layer: nn.Module, x: Tensor, got: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether an output is right, by the product that the layer stands for."""
    dims = weight.dim() - 2
    if not dims:
        return near(got, x, weight.t() if type(layer).__name__ == "Conv1D" else weight, bias)
    steps: Any = (..., *(slice(None, None, s) for s in layer.stride))  # type: ignore[union-attr]
    channel = -1 - dims
    return near(got.movedim(channel, -1), x[steps].movedim(channel, -1), weight.flatten(1), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_gives_what_the_layer_gave(kind: str, layout: Layout, dtype: torch.dtype) -> None:
    for name, (out, columns) in SHAPES.items():
        for how, density in DENSITIES.items():
            layer = sparse_(LAYERS[kind](out, columns), density).to(dtype).eval()
            dense = copy.deepcopy(layer)
            weight, bias = dense.weight.detach(), dense._parameters["bias"]
            bias = None if bias is None else bias.detach()
            assert isinstance(pack(layer, layout=layout), PackedLayer)
            for x in inputs(dense, columns, dtype):
                with torch.inference_mode():
                    got, want = layer(x), dense(x)
                case = f"{name}, {how}, input {tuple(x.shape)}"
                assert (got.shape, got.dtype, got.is_contiguous()) == (want.shape, want.dtype, want.is_contiguous()), (
                    case
                )
                assert right(dense, x, got, weight, bias), case
            assert torch.equal(layer.weight, weight)  # type: ignore[arg-type]
            unpack(layer)
            assert layer.weight.stride() == dense.weight.stride()
            assert type(layer) is type(dense)
            assert {k: bits(t) for k, t in layer.state_dict().items()} == {
                k: bits(t) for k, t in dense.state_dict().items()
            }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_in_activations(layout: Layout, dtype: torch.dtype) -> None:
    layer = sparse_(nn.Linear(70, 33), 0.2).to(dtype)
    dense = copy.deepcopy(layer)
    pack(layer, layout=layout)
    x = torch.randn(4, 70).to(dtype)
    x[0, 3], x[1, 5], x[2, 69] = float("nan"), float("inf"), -float("inf")
    with torch.inference_mode():
        got, want = layer(x), dense(x)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isfinite()].nan_to_num(0), want[~want.isfinite()].nan_to_num(0))
    assert got[0].isnan().all()  # a NaN meets every row, where the weight is zero too
    assert torch.allclose(got[3].float(), want[3].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_of_a_weight_comes_back(layout: Layout) -> None:
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, :6] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -1e-45, 3.0])
    before = bits(layer.weight)
    pack(layer, layout=layout)
    assert layer.packed_values.numel() == 6 + 64  # type: ignore[union-attr, operator]
    assert bits(unpack(layer).weight) == before  # type: ignore[arg-type]
