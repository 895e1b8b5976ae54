"""One small network, in every dtype, with plain values, with ties and zeros, or with NaN and Inf among them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.contract.table import DTYPES

Kind = Literal["plain", "ties", "bad"]

CHOSEN = ("conv.weight", "fc1.weight", "fc2.weight")
"""What is prunable, in the order of names, which here is the order of the layers too."""

BIASES = {"conv.weight": "conv.bias", "fc1.weight": "fc1.bias"}


class Net(nn.Module):
    """A convolution, a norm, an embedding and two linear layers, one without bias; 480 prunable weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, (1, 3))
        self.norm = nn.BatchNorm2d(8)
        self.emb = nn.Embedding(5, 8)
        self.fc1 = nn.Linear(8, 32)
        self.fc2 = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, h, w) -> (batch, 4)."""
        h = self.norm(self.conv(x)).relu().mean((2, 3)) + self.emb.weight[0]
        out: Tensor = self.fc2(self.fc1(h).relu())
        return out


def net(dtype: str = "float32", kind: Kind = "plain", seed: int = 0) -> Net:
    """The network with weights and their biases in a dtype (the norm stays fp32), the same in every call."""
    g = torch.Generator().manual_seed(seed)
    model = Net()
    model.emb.weight.data = torch.randn(5, 8, generator=g)
    kinds = DTYPES[dtype]
    for i, name in enumerate(CHOSEN):
        own = kinds[i] if isinstance(kinds, tuple) else kinds
        weight = model.get_parameter(name)
        weight.data = values(tuple(weight.shape), kind, g).to(own)
        if name in BIASES:
            bias = model.get_parameter(BIASES[name])
            bias.data = torch.rand(bias.shape, generator=g).add(0.5).to(own)
    return model


def values(shape: tuple[int, ...], kind: Kind, g: torch.Generator) -> Tensor:
    """Normal fp64 values; "ties" has few distinct ones, with zeros of both signs; "bad" a NaN and an infinity."""
    w = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "ties":
        return torch.round(w * 2) / 2  # exact in every dtype; -0.0 where a negative value is rounded
    if kind == "bad":
        row = w[0].view(w.shape[1], -1)  # one output channel, two input channels, one block, one group of four
        row[0, 0], row[1, 0] = math.nan, math.copysign(math.inf, w.shape[0] - 10)
    return w


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state, as a dict."""
    return {n: t.clone() for n, t in model.state_dict().items()}


def bits(t: Tensor) -> bytes:
    """The bytes of a tensor, in row-major order; equal for NaNs of equal bits, unequal for 0.0 and -0.0."""
    flat = t.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b""


def snapshot(target: nn.Module | dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of everything in a module's state or a dict."""
    state = target.state_dict() if isinstance(target, nn.Module) else target
    return {n: bits(t) for n, t in state.items() if isinstance(t, Tensor)}


def outside(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but the values of its parameters and buffers."""
    return {
        "keys": list(model.state_dict()),
        "modules": [(n, id(m), type(m), m.training) for n, m in model.named_modules()],
        "parameters": [
            (n, id(p), p.data_ptr(), p.shape, p.dtype, p.stride(), p.requires_grad, p.is_leaf, id(p.grad))
            for n, p in model.named_parameters()
        ],
        "gradients": [None if p.grad is None else bits(p.grad) for p in model.parameters()],
        "buffers": [(n, id(b), b.data_ptr(), bits(b)) for n, b in model.named_buffers()],
        "hooks": [
            {k: list(v) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)} for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "backward hooks": [list(p._backward_hooks or ()) for p in model.parameters()],
    }


def is_zero(t: Tensor) -> Tensor:
    """Where a tensor is zero, counted apart from the package: every dtype widens to fp64 exactly."""
    return t.detach().to(torch.float64) == 0
