"""A small model, and the proof that a call refuses it by name and leaves every byte as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import secateur

Call = Callable[[nn.Module], Any]


def net() -> nn.Sequential:
    """Two layers of 24 and 12 weights and a norm, the same in every call."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g)
    return model


def state(model: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


def refused(error: type[Exception], text: str, call: Call, model: nn.Module | None = None) -> None:
    """The call raises, by name, and every byte of the model is as it was."""
    model = net() if model is None else model
    before = state(model)
    with pytest.raises(error, match=text) as e:
        call(model)
    assert type(e.value) is error
    assert isinstance(e.value, secateur.SecateurError)
    assert isinstance(e.value, ValueError)
    assert state(model) == before
