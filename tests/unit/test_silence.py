"""Norms silenced behind pruned channels: the network computes what it would without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur
from secateur.errors import BadInput, SecateurWarning
from secateur.evaluate.norms import silence_norms


def normed(n: int, seed: int = 0) -> nn.BatchNorm2d:
    g = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(n)
    for t in (norm.weight, norm.bias, norm.running_mean):
        t.data = torch.randn(n, generator=g)  # type: ignore[union-attr]
    norm.bias.data = norm.bias.data.abs() + 0.5  # which a ReLU lets through
    return norm


class Net(nn.Module):
    """A convolution, a norm, a depthwise convolution, another norm, and a layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 6, 3, bias=False), normed(6)
        self.depth, self.bn2 = nn.Conv2d(6, 6, 3, groups=6, bias=False), normed(6, 1)
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        out: Tensor = self.last(F.relu(self.bn2(self.depth(x))))
        return out


def without(model: Net, dead: Tensor) -> Net:
    """The network with the dead channels cut out for real."""
    small, keep = copy.deepcopy(model), ~dead
    for name in ("conv", "depth"):
        layer = small.get_submodule(name)
        layer.weight.data = layer.weight.data[keep]
    small.depth.groups = int(keep.sum())
    for name in ("bn", "bn2"):
        norm = small.get_submodule(name)
        for t in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, t).data = getattr(norm, t).data[keep]
    small.last.weight.data = small.last.weight.data[:, keep]
    return small


@pytest.mark.parametrize("training", [False, True])
def test_the_network_computes_what_the_smaller_one_does(training: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    with pytest.warns(SecateurWarning, match="fire"):
        secateur.prune(model, 0.5, pattern="channel", include="conv")
    dead = (model.conv.weight == 0).flatten(1).all(1)
    assert int(dead.sum()) == 3
    small, x = without(model, dead).train(training), torch.randn(4, 2, 9, 9)
    loud = copy.deepcopy(model).train(training)
    assert silence_norms(model) == {"bn": 3, "bn2": 3}
    model.train(training)
    assert torch.allclose(model(x), small(x), atol=1e-6)
    assert not torch.allclose(loud(x), small(x), atol=1e-3)
    for norm in (model.bn, model.bn2):
        assert torch.equal(norm.weight == 0, dead) and torch.equal(norm.bias == 0, dead)
    assert silence_norms(model) == {}


def test_a_norm_without_factors() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, affine=False))
    model[1].running_mean = torch.tensor([1.0, 2.0, 3.0])
    model[0].weight.data[1], model[0].bias.data[1] = 0, 0
    model.eval()
    assert silence_norms(model) == {"1": 1} and model[1].running_mean.tolist() == [1, 0, 3]
    assert not bool(model(torch.randn(2, 1, 3, 3))[:, 1].any())


def test_a_channel_with_a_bias_lives() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), normed(3))
    model[0].weight.data[:2] = 0
    model[0].bias.data[:] = torch.tensor([0.0, 0.5, 0.5])
    assert silence_norms(model) == {"1": 1} and (model[1].bias == 0).tolist() == [True, False, False]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(1, 3, 1, bias=False), normed(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.a(x)) + self.bn(self.b(x))
        return out


def test_what_cannot_be_silenced_is_said_and_left_alone() -> None:
    twice = Twice()
    twice.a.weight.data[0] = 0
    across = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.GroupNorm(2, 4))
    across[0].weight.data[0] = 0
    nn.init.ones_(across[1].bias)
    for model, text in ((twice, "'bn' .* makes 1 of the 1 pruned"), (across, "normalises across channels")):
        before = [t.clone() for t in model.state_dict().values()]
        with pytest.warns(SecateurWarning, match=text):
            assert silence_norms(model) == {}
        assert all(torch.equal(t, b) for t, b in zip(model.state_dict().values(), before, strict=True))


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    model = Branching()
    assert silence_norms(model) == {}
    model.conv.weight.data[0] = 0
    with pytest.raises(BadInput, match=r"norms cannot be silenced: .* cannot be traced"):
        silence_norms(model)
