"""Keys of scores are kept between passes only up to a budget, and beyond it the answer is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.core import select, source

NAMES = [f"{i}.weight" for i in range(6)]


def world() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(16, 32, generator=g) for n in NAMES}


@secateur.elementwise
def rough(weight: Tensor) -> Tensor:
    """Full of ties."""
    return (weight * 4).round()


CASES: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "random, uniform": {"criterion": "random", "allocation": "uniform"},
    "random, 2:4": {"criterion": "random", "pattern": "2:4", "sparsity": None},
    "ties": {"criterion": rough},
    "once": {"criterion": lambda weight: weight.square()},
}


@pytest.mark.parametrize("what", CASES)
def test_no_more_keys_are_kept_than_the_budget(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"sparsity": 0.4, **CASES[what]}
    want = world()
    secateur.prune(want, **asked)
    kept = []
    keyed = source.Source.keyed

    def spy(self: source.Source, *args: Any) -> object:
        out = keyed(self, *args)
        kept.append(sum(k.numel() for keys in self._keys.values() for k in keys))
        return out

    monkeypatch.setattr(source.Source, "keyed", spy)
    monkeypatch.setattr(source, "KEPT", 1200)
    got = world()
    secateur.prune(got, **asked)
    assert all(torch.equal(got[n], want[n]) for n in NAMES)
    assert max(kept) == (6 * 512 if what == "once" else 1024)


@pytest.mark.parametrize("few", [0, 30, 1 << 20])
@pytest.mark.parametrize("criterion", ["random", rough, lambda weight: weight.square()])
def test_collecting_the_last_keys_changes_nothing(criterion: Any, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    want, got = world(), world()
    secateur.prune(want, 0.4, criterion=criterion)
    monkeypatch.setattr(select, "FEW", few)
    secateur.prune(got, 0.4, criterion=criterion)
    assert all(torch.equal(got[n], want[n]) for n in NAMES)
    assert sum(int((t == 0).sum()) for t in got.values()) == 1229
