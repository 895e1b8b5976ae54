"""Optimizers, schedules and a small network to train, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur import Pruner, dynamic, schedules
from secateur.train.optimizers import STATE_KEYS

Make = Callable[[Any], Optimizer]
STEPS = 8


class Mixer(Optimizer):
    """Moves every weight by the mean gradient of its tensor, and keeps a momentum of its own name."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(0.1 * p.grad.mean() + 0.01)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam amsgrad foreach": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True, foreach=False),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
NO_ZERO_STATE = {"adamax", "rprop"}  # reset when a mask changes, not promised zero afterwards
MIXING: dict[str, Make] = {
    "muon": lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.1, weight_decay=0.1),
    "of the user's": Mixer,
}
SCHEDULES: dict[str, schedules.Schedule | None] = {
    "cubic": schedules.cubic(0.75, begin=1, end=6, every=2),
    "one-shot": schedules.one_shot(0.75, at=3),
    "from the start": schedules.constant(0.75),
    "a function": lambda t: 0.75 * min(t, 5) / 5,
    "none": None,
}
PATTERNS = ("unstructured", "2:4", "2x4", "channel")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


class Convolutional(nn.Module):
    """4-D weights, one of them of several groups, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.end = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x.view(-1, 2, 2, 2))).tanh()
        out: Tensor = self.end(self.second(h).flatten(1))
        return out


class Attention(nn.Module):
    """nn.MultiheadAttention over itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1).repeat(1, 3, 1)
        out: Tensor = self.attention(h, h, h)[0][:, 0]
        return out


class Recurrent(nn.Module):
    """nn.LSTM with a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.end = nn.LSTM(8, 6, num_layers=2, batch_first=True), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.lstm(x.unsqueeze(1).repeat(1, 3, 1))[0][:, -1])
        return out


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.end = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.up(self.down(x).tanh()).tanh())
        return out


class Halved(Convolutional):
    """bfloat16 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.bfloat16))


NETS = (Convolutional, Attention, Recurrent, Tied, Halved)


def batch(step: int) -> Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + step))


def train(
    model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], steps: range, each: Callable[[], None] | None = None
) -> None:
    several = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    for t in steps:
        for optimizer in several:
            optimizer.zero_grad()
        x = batch(t)
        (model(x) - x.flip(1)).square().mean().backward()
        for optimizer in several:
            optimizer.step()
        if each is not None:
            each()


def moved_by_hand(device: str) -> list[dict[str, Tensor]]:
    """Movement pruning by gradients that are set by hand: masks, scores and values after each step, on the CPU."""
    model = net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    how = dynamic.movement(every=2, end=7)
    pruner = Pruner(model, optimizer, schedules.cubic(0.75, begin=1, end=6), rewire=how)
    found = []
    for t in range(STEPS + 2):
        optimizer.zero_grad()
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(device)
        optimizer.step()
        check_held(model, pruner, optimizer)
        state = pruner.state_dict().get("movement", {"scores": {}, "values": {}})
        found.append(
            {f"{i} {n}": x.cpu() for i, part in enumerate((pruner.masks(), *state.values())) for n, x in part.items()}
        )
    return found


def check_held(model: nn.Module, pruner: Pruner, optimizer: Optimizer | None = None) -> int:
    """What is masked is zero, exactly and positive, and so is the known state of it; how many weights are masked."""
    found = 0
    for name, mask in pruner.masks().items():
        p = model.get_parameter(name)
        dead = p[~mask]
        assert not dead.count_nonzero() and not torch.signbit(dead).any(), name
        found += dead.numel()
        state = {} if optimizer is None else optimizer.state.get(p, {})
        for key, value in state.items():
            if key in STATE_KEYS and value.shape == p.shape:
                assert not value[~mask].count_nonzero(), (name, key)
    return found


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def the_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(the_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(the_same, a, b))
    return bool(a == b)
