"""What is timed side by side: layers with one matrix, each called with the activations ``(rows, in)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.core.layouts import Layout, Parts

from .grid import ROUTES, Route
from .layers import PackedLinear, become
from .machine import cache_bytes
from .table import Table

Run = Callable[[Tensor], Tensor]
MOST_BYTES, MOST_COPIES = 1 << 30, 1024
"""Of copies of a matrix, at most, whatever the cache."""


def sparse(out_features: int, in_features: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A matrix of normal values, each there with a probability; no global random number is drawn."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn((out_features, in_features), generator=draw)
    weight[torch.rand((out_features, in_features), generator=draw) >= density] = 0
    return weight.to(dtype)


def activations(rows: int, in_features: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal values ``(rows, in)``."""
    return torch.randn((rows, in_features), generator=torch.Generator().manual_seed(seed)).to(dtype)


def copies_of(nbytes: int) -> int:
    """How many copies of so many bytes are too large for the last-level cache together: each is cold when its turn comes."""
    return 1 + min(-(-cache_bytes() * 5 // 4 // nbytes), MOST_BYTES // nbytes, MOST_COPIES)


def dense(weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """torch's own linear layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer


def packed(parts: Parts, layout: Layout, columns: int, bias: Tensor | None = None) -> nn.Module:
    """The packed layer; the table in use names its route, or one of `BY`."""
    shape = torch.empty((len(parts[2]) - 1, columns), dtype=parts[1].dtype, device="meta")
    return become(dense(shape, bias), PackedLinear, parts, layout)


BY: Mapping[Route, Table] = {way: Table((), always=way) for way in ROUTES}
"""Tables that are for measuring: one route for everything."""


def int8(weight: Tensor, bias: Tensor | None = None) -> nn.Module | None:
    """The layer in torch's int8, as `quantised`; takes and gives float32."""
    layer = quantised(nn.Sequential(dense(weight.float(), None if bias is None else bias.float())))
    return None if layer is None else layer[0]  # type: ignore[index]


def quantised(model: nn.Module) -> nn.Module | None:
    """A model with all linear layers in torch's dynamic quantisation, `torch.ao.quantization.quantize_dynamic`.

    Weights are int8, activations are quantised as they come. ``None`` where torch has no kernels for it.
    """
    if set(torch.backends.quantized.supported_engines) <= {"none"}:
        return None
    with warnings.catch_warnings():  # torch says that it will move to another package
        warnings.simplefilter("ignore")
        made: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return made
