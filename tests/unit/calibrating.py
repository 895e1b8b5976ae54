"""What tests of pruning with data share: inputs that hang together, oracles in NumPy, solvers, and what a model is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurWarning
from tests.contract.nets import outside, snapshot
from tests.contract.oracle import Bools, Floats, rows, wide


def correlated(count: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs whose features have different sizes and hang together."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=g, dtype=torch.float64)
    x = torch.randn(count, features, generator=g, dtype=torch.float64) @ mix * torch.linspace(0.2, 3, features)
    return x.to(dtype)


def first_of_rows(score: Floats, dead: Bools, count: int) -> Bools:
    """Where the ``count`` first of a matrix lie, rank by rank inside its rows; zeros before all else."""
    return rows(np.where(dead, -np.inf, score), 0, count)


def wanda(weight: Tensor, norm: Tensor, count: int) -> Bools:
    """Which weights of a matrix (out, in) go by |w| · ‖x‖, compared inside output rows."""
    w = wide(weight)
    return first_of_rows(np.abs(w) * wide(norm), w == 0, count)


def norms_of(x: Tensor) -> Tensor:
    """Root mean square of every feature, over all tokens, as it is measured: float32."""
    tokens = x.detach().reshape(-1, x.shape[-1]).to(torch.float64)
    return tokens.square().mean(0).sqrt().float()


def hessian_of(x: Tensor) -> Tensor:
    """2/n Σ x xᵀ, float64."""
    tokens = x.detach().reshape(-1, x.shape[-1]).to(torch.float64)
    return 2 / len(tokens) * tokens.T @ tokens


def inputs_of(model: nn.Module, names: Sequence[str], run: Any) -> dict[str, Tensor]:
    """What goes into some modules while ``run()`` runs the model, all tokens in order; by hooks of the test's own."""
    caught: dict[str, list[Tensor]] = {n: [] for n in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda module, args, n=n: caught[n].append(args[0].detach().clone().reshape(-1, args[0].shape[-1]))
        )
        for n in names
    ]
    with torch.no_grad():
        run()
    for h in handles:
        h.remove()
    return {n: torch.cat(found) for n, found in caught.items() if found}


def mlp() -> nn.Sequential:
    """Four layers, one activation for all of them, which writes to what it gets."""
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True)
    layers = [nn.Linear(12, 20), act, nn.Linear(20, 16), act, nn.Linear(16, 16), act, nn.Linear(16, 5)]
    return nn.Sequential(*layers).double()


def batches(sizes: tuple[int, ...] = (30, 17, 41), features: int = 12) -> list[Tensor]:
    """Inputs of `mlp`, batches of different lengths."""
    return [correlated(n, features, seed=i, dtype=torch.float64) for i, n in enumerate(sizes)]


def choosing(
    weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str
) -> tuple[Tensor, Tensor, float, float]:
    """A solver that chooses by the Hessian's diagonal, and halves what stays."""
    score = weight.double().abs() * hessian.diagonal().double().sqrt()
    score = torch.where(weight == 0, -1.0, score)
    keep = torch.ones(weight.numel(), dtype=torch.bool)
    if hasattr(pattern, "of"):
        ranks = torch.argsort(torch.argsort(score.view(-1, pattern.of), dim=1, stable=True), dim=1, stable=True)
        keep = (ranks >= pattern.of - pattern.keep).view(-1)
    else:
        keep[torch.argsort(score.reshape(-1), stable=True)[:count]] = False
    keep = keep.view(weight.shape)
    return weight / 2 * keep, keep, float(hessian.diagonal().sum()), 0.25


def moving(weight: Tensor, *, hessian: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor, float, float]:
    """A solver that moves what a criterion leaves."""
    return weight * 2, mask, 1.0, 0.5


def facts_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model but the values of its weights, and of torch what a forward pass might change."""
    return {
        **outside(model),
        "forwards": ["forward" in vars(m) for m in model.modules()],
        "caches": {
            n: m.config.use_cache for n, m in model.named_modules() if hasattr(getattr(m, "config", None), "use_cache")
        },
        "random": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "settings": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled),
    }


def whole_of(model: nn.Module) -> dict[str, Any]:
    """All that `facts_of` tells, and every bit of the weights."""
    return {**facts_of(model), "bits": snapshot(model)}


def refused(error: type[Exception], text: str, model: nn.Module, **how: Any) -> None:
    """The call raises, by name, and leaves all as it was."""
    before = whole_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\d tensors? stays? dense", SecateurWarning)  # what lies outside the blocks
        with pytest.raises(error, match=text) as e:
            secateur.prune(model, **{"sparsity": 0.5, "criterion": "wanda", **how})
    assert type(e.value) is error
    assert whole_of(model) == before
