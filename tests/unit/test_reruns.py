"""Layers one after another in a network of any form: as a walk through blocks, where both are possible."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur


class Backwards(nn.Module):
    """Registers its layers in another order than they run, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(12, 5), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


@pytest.fixture
def both() -> tuple[Backwards, nn.Sequential]:
    torch.manual_seed(0)
    one = Backwards()
    other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    other[0].load_state_dict(one.first.state_dict())
    other[2].load_state_dict(one.last.state_dict())
    return one, other


@pytest.mark.parametrize("how", [{"criterion": "wanda"}, {"solver": "sparsegpt"}], ids=str)
def test_as_a_walk_through_blocks(both: tuple[Backwards, nn.Sequential], how: dict[str, str]) -> None:
    one, other = both
    batches = [torch.randn(40, 8) for _ in range(3)]
    order: list[str] = []
    told = secateur.Calibration(batches, blocks="layers", progress=lambda step: order.append(step.block))
    secateur.prune(one, 0.5, calibration=told, **how)
    secateur.prune(other, 0.5, calibration=batches, **how)
    assert order == ["first", "last"]
    assert torch.equal(one.first.weight, other[0].weight)
    assert torch.equal(one.last.weight, other[2].weight)


def test_a_loader_that_can_be_used_once_does(both: tuple[Backwards, nn.Sequential]) -> None:
    one, _ = both
    batches = [torch.randn(40, 8) for _ in range(3)]
    report = secateur.prune(
        one, 0.5, solver="sparsegpt", calibration=secateur.Calibration(iter(batches), blocks="layers")
    )
    assert report.zeros == report.total // 2


def test_no_batch_is_refused(both: tuple[Backwards, nn.Sequential]) -> None:
    one, _ = both
    before = one.first.weight.clone()
    with pytest.raises(secateur.BadInput, match="empty"):
        secateur.prune(one, 0.5, criterion="wanda", calibration=secateur.Calibration([], blocks="layers"))
    assert torch.equal(one.first.weight, before)
