"""Promise 5: tied storage is one tensor: counted once, masked once, still tied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import secateur
from tests.contract.nets import bits, is_zero
from tests.contract.table import PATTERNS, PLAIN, Case, default_of, expected_warnings, ids


class Tied(nn.Module):
    """Two layers with one weight, a third of its own, and an embedding tied to an output layer."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.own = nn.Linear(8, 4, bias=False)
        self.emb = nn.Embedding(12, 8)
        self.out = nn.Linear(8, 12, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)
        self.second.weight = self.first.weight
        self.out.weight = self.emb.weight


NAMED = [c for c in PLAIN if c.allocation in ("global", "uniform", "erk", "lamp")]


@pytest.mark.parametrize("case", NAMED, ids=ids(NAMED))
def test_counted_once_masked_once_still_tied(case: Case) -> None:
    model = Tied()
    table = bits(model.emb.weight)
    with expected_warnings():
        report = secateur.prune(model, **case.asked(0.5))
    assert model.second.weight is model.first.weight
    assert model.out.weight is model.emb.weight
    assert bits(model.emb.weight) == table
    assert [r.name for r in report.chosen] == ["first.weight", "own.weight"]
    assert report["first.weight"].aliases == ("second.weight",)
    assert report["second.weight"] is report["first.weight"]
    assert report["emb.weight"].aliases == ("out.weight",)
    assert "embedding" in (report["emb.weight"].skip or "")
    assert report.total == 64 + 32
    assert report.model_total == 64 + 8 + 32 + 96
    zeros = int(is_zero(model.first.weight).sum()) + int(is_zero(model.own.weight).sum())
    assert report.zeros == zeros
    if case.pattern in ("unstructured", "2:4"):
        assert zeros == 48


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_dict_of_the_same_storage_is_pruned_alike(pattern: str) -> None:
    model, other = Tied(), Tied()
    case = Case(pattern, default_of(pattern), "magnitude")
    with expected_warnings():
        want = secateur.prune(model, **case.asked(0.5))
        found = secateur.prune(other.state_dict(), **case.asked(0.5))
    assert [(r.name, r.aliases, r.zeros) for r in found.chosen] == [(r.name, r.aliases, r.zeros) for r in want.chosen]
    assert bits(other.first.weight) == bits(model.first.weight) == bits(other.second.weight)


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_either_name_is_accepted(name: str) -> None:
    model = Tied()
    assert [r.name for r in secateur.prune(model, 0.5, include=name).chosen] == ["first.weight"]
    assert list(secateur.masks(model, include=name)) == ["first.weight"]
    other = Tied()
    assert [r.name for r in secateur.inspect(other, ignore=name).chosen] == ["own.weight"]
    secateur.apply({name: ~is_zero(model.first.weight)}, other)
    assert bits(other.second.weight) == bits(model.first.weight)
    capped = secateur.prune(Tied(), 0.4, max_sparsity={name: 0.25})
    assert capped["first.weight"].zeros == 16
    assert capped.zeros == 38


@pytest.mark.parametrize("name", ["emb.weight", "out.weight"])
def test_a_tied_table_is_pruned_when_asked_for_by_full_name(name: str) -> None:
    model = Tied()
    report = secateur.prune(model, 0.5, include=name)
    assert [r.name for r in report.chosen] == ["emb.weight"]
    assert report.zeros == int(is_zero(model.out.weight).sum()) == 48
    assert model.out.weight is model.emb.weight


def test_a_module_used_twice_is_one() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = secateur.prune(model, 0.5)
    assert (report.total, report.zeros) == (16, 8)
    assert report["0.weight"].aliases == ("2.weight",)


def test_what_shares_memory_but_is_no_tie_is_refused() -> None:
    """Zeros written to one view would appear elsewhere in the other."""
    base = torch.randn(8, 8)
    targets: list[dict[str, Any]] = [
        {"a.weight": base, "b.weight": base.t()},
        {"a.weight": base[:6], "b.weight": base[2:]},
        {"a.weight": base, "b.weight": base.view(4, 16)},
    ]
    for target in targets:
        before = bits(base)
        with pytest.raises(
            secateur.BadTensor, match=r"'[ab].weight' .*shares memory with '[ab].weight' .*t\.clone\(\)"
        ):
            secateur.prune(target, 0.5)
        assert bits(base) == before


def test_a_bias_shared_by_two_layers_is_not_lost() -> None:
    """A channel that stays keeps its bias, also where the other layer prunes that channel."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data = torch.diag(torch.tensor([1.0, 2.0, 30.0, 40.0]))
    model[1].weight.data = torch.diag(torch.tensor([10.0, 20.0, 3.0, 4.0]))
    model[0].bias = model[1].bias
    before = bits(model[0].bias)
    try:
        secateur.prune(model, 0.5, allocation="uniform", pattern="channel")
    except secateur.SecateurError as refused:
        assert "bias" in str(refused)
        assert bits(model[0].bias) == before
        assert not is_zero(model[0].weight.diagonal()).any()
    else:
        alive = ~is_zero(model[0].weight).all(1) | ~is_zero(model[1].weight).all(1)
        assert alive.all()
        assert not is_zero(model[0].bias).any()
