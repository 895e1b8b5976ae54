"""The networks that are pruned: 110 linear layers in the proportions of a transformer encoder, of any width."""

from __future__ import annotations

import math

import torch
from torch import nn

BLOCKS = 18
FULL_WIDTH, QUICK_WIDTH = 728, 232
"""115 M and 12 M weights in 110 tensors."""


def weights_of(width: int) -> int:
    """Number of weights (without biases) of `encoder`."""
    return BLOCKS * 12 * width**2 + 2 * width * (width // 2)


def width_for(weights: int) -> int:
    """The width, a multiple of 8, at which `encoder` has about so many weights."""
    return max(8, round(math.sqrt(weights / (BLOCKS * 12 + 1)) / 8) * 8)


def encoder(width: int, dtype: torch.dtype) -> nn.Module:
    """18 blocks of six linear layers and one before and after: 110 weights and as many biases, normal values."""
    with torch.device("meta"):  # values are written once, in place, so that building leaves no peak of its own
        model = nn.ModuleDict({"first": nn.Linear(width // 2, width, dtype=dtype)})
        for i in range(BLOCKS):
            block = {name: nn.Linear(width, width, dtype=dtype) for name in ("query", "key", "value", "output")}
            block |= {
                "up": nn.Linear(width, 4 * width, dtype=dtype),
                "down": nn.Linear(4 * width, width, dtype=dtype),
            }
            model[f"block{i}"] = nn.ModuleDict(block)
        model["last"] = nn.Linear(width, width // 2, dtype=dtype)
    return fill(model.to_empty(device="cpu"))


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every weight its dense value again, in place: normal, as spread as its number of inputs asks for."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.normal_(0.0, p.shape[-1] ** -0.5, generator=generator)
    return model
