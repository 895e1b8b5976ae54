"""Models with zeros in them, and how near the product of a packed layer has to be."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
LAYOUTS = ("bitmask", "csr")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse_(model: M, density: float = 0.2, seed: int = 0) -> M:
    """The model, with that share of the elements of its matrices left, the same in every call."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data[torch.rand(p.shape, generator=g) >= density] = 0
    return model


def net() -> nn.Sequential:
    """Two linear layers and what lies between them."""
    torch.manual_seed(0)
    return sparse_(nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.LayerNorm(80), nn.Linear(80, 50, bias=False)))


def bits(t: Tensor) -> bytes:
    """The bytes of a tensor."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, bytes]:
    """The bytes of everything in a state, in its order."""
    return {name: bits(t) for name, t in model.state_dict().items()}


def near(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product is right: against float64, within what sums in float32 and one rounding to the dtype may lose."""
    wide, matrix = x.double(), weight.double()
    want, size = wide @ matrix.t(), wide.abs() @ matrix.abs().t()
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    allowed = 2 * torch.finfo(got.dtype).eps * want.abs() + matrix.shape[1] * torch.finfo(torch.float32).eps * size
    return got.shape == want.shape and bool(((got.double() - want).abs() <= allowed + 1e-30).all())
