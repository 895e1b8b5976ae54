"""What is timed side by side: products with one matrix, each a function of the activations ``(rows, in)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.core.expand import expanded
from secateur.core.layouts import PAD, Layout, Parts
from secateur.core.products import product

from .machine import cache_bytes
from .table import Route, Table, route

Run = Callable[[Tensor], Tensor]
MOST_BYTES, MOST_COPIES = 1 << 30, 1024
"""Of copies of a matrix, at most, whatever the cache."""
PRODUCTS = {"kernel": product, "expand": expanded}


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


def dense(weight: Tensor, bias: Tensor | None = None) -> Run:
    """torch's own product."""
    return lambda x: nn.functional.linear(x, weight, bias)


def packed(parts: Parts, layout: Layout, columns: int, route: Route = "kernel", bias: Tensor | None = None) -> Run:
    """The product with the matrix packed, by one route."""
    run = PRODUCTS[route]
    return lambda x: run(x, parts, layout, columns, bias)


def routed(parts: Parts, layout: Layout, columns: int, table: Table | None = None, bias: Tensor | None = None) -> Run:
    """The product with the matrix packed, by the route that the table names for the rows that come."""
    _, values, starts = parts
    out = len(starts) - 1
    density = (len(values) - PAD) / (out * columns)

    def run(x: Tensor) -> Tensor:
        way = route(layout, len(x), density, out, columns, x.dtype, table)
        return PRODUCTS[way](x, parts, layout, columns, bias)

    return run


def int8(weight: Tensor, bias: Tensor | None = None) -> Run | None:
    """torch's dynamic quantisation, `torch.ao.quantization.quantize_dynamic`: int8 weights, activations quantised as they come.

    ``None`` where torch has no kernels for it. Takes and gives float32.
    """
    if set(torch.backends.quantized.supported_engines) <= {"none"}:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.float(), requires_grad=False)
    with warnings.catch_warnings():  # torch says that it will move to another package
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
    run: Run = quantised[0]
    return run
