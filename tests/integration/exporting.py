"""Networks that are exported, and everything about a model that an export leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur


def mlp(sparsity: float = 0.9) -> nn.Module:
    """Two products whose sizes are multiples of 64, and a small one without a bias."""
    model = nn.Sequential(
        nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10, bias=False)
    )
    secateur.prune(model, sparsity, allocation="uniform")
    return model


def cnn() -> nn.Module:
    """Convolutions, one of them in groups, a norm with statistics of its own, dropout, and an output layer."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 16, 3, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    model(torch.randn(8, 3, 12, 12))
    secateur.prune(model, 0.5, allocation="uniform")
    return model


def bert() -> nn.Module:
    """A small encoder of transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=99
    )
    model: nn.Module = transformers.BertModel(config)
    secateur.prune(model, 0.9, allocation="uniform")
    return model


def tokens(batch: int, length: int, draw: torch.Generator) -> dict[str, Tensor]:
    """A batch of `bert`'s, its arguments not in the order of ``forward``."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 :] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(0, 99, (batch, length), generator=draw)}


def _inputs(batch: int, length: int, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "mlp": torch.randn(batch, 128, generator=draw),
        "cnn": (torch.randn(batch, 3, 12, 12, generator=draw),),
        "bert": tokens(batch, length, draw),
    }


EXAMPLES, OTHERS, MANY = _inputs(4, 9, 0), _inputs(7, 6, 1), [_inputs(64, 9, seed) for seed in range(2, 6)]
"""Examples; others of another batch size, and for tokens of another length; and some batches to calibrate with."""
NETS = {"mlp": mlp, "cnn": cnn, "bert": bert}


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What a model gives in evaluation mode."""
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    was = [m.training for m in model.modules()]
    with torch.no_grad():
        out = model.eval()(*args, **kwargs)
    for m, training in zip(model.modules(), was, strict=True):
        m.training = training
    return [out] if isinstance(out, Tensor) else list(out.values())


def close(found: Any, wanted: list[Tensor], share: float) -> bool:
    """Whether outputs agree to a share of their largest magnitude."""
    pairs = zip(found, wanted, strict=True)
    return all(float((torch.as_tensor(f) - w).abs().max()) <= share * float(w.abs().max()) for f, w in pairs)


def everything(model: nn.Module) -> list[Any]:
    """Parameters and buffers with where they lie and their bits, gradients, flags, hooks."""
    found: list[Any] = []
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        grad = None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes())
        found.append((name, id(t), t.data_ptr(), t.detach().numpy().tobytes(), t.requires_grad, grad))
    for name, m in model.named_modules():
        hooks = [list(getattr(m, k)) for k in vars(m) if k.endswith("_hooks")]
        found.append((name, type(m), m.training, m.forward.__func__, hooks))
    return found


class Counts(nn.Module):
    """Gives something else each time: what a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.layer(x) * float(self.calls[0])


class Plain(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Divides(Plain):
    """Gives Inf."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / (x - x)


class Draws(Plain):
    """Adds random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x)


class Branches(Plain):
    """Does what its input's values say."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Tied(nn.Module):
    """A table that is also the output head, a buffer, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight
        self.unused = nn.Linear(3, 3)
        self.register_buffer("shift", torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.words(x) + self.shift)
        return out
