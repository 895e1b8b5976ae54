"""Norms after pruned channels: which of them make a channel fire, which do not, and what is not known."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A convolution, a second one, a norm, and a way between them."""

    def __init__(self, forward: Forward, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = loud(norm or nn.BatchNorm2d(8))
        self.last, self.shift = nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(8, 1, 1))
        self.way = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, x))


def loud(norm: nn.Module) -> nn.Module:
    if isinstance(getattr(norm, "bias", None), Tensor):
        nn.init.constant_(norm.bias, 0.3)  # type: ignore[arg-type]
    return norm


def texts(model: nn.Module, include: str | list[str] = "conv", sparsity: float = 0.5) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = secateur.prune(model, sparsity, include=include, pattern="channel", allocation="uniform")
    assert tuple(str(w.message) for w in caught) == report.warnings
    return report.warnings


FIRING: dict[str, Forward] = {
    "straight": lambda m, x: m.bn(m.conv(x)),
    "method": lambda m, x: m.bn(m.conv(x).relu()),
    "leaky": lambda m, x: m.bn(F.leaky_relu(m.conv(x))),
    "pool": lambda m, x: m.bn(F.max_pool2d(m.conv(x), 2)),
    "tanh": lambda m, x: m.bn(torch.tanh(m.conv(x))),
    "gate": lambda m, x: m.bn(m.conv(x) * torch.sigmoid(m.other(x))),
    "swish": lambda m, x: m.bn((lambda y: y * torch.sigmoid(y))(m.conv(x))),
    "itself": lambda m, x: m.bn((lambda y: y + y)(m.conv(x))),
    "halved": lambda m, x: m.bn(m.conv(x) / 2),
    "depthwise": lambda m, x: m.bn(m.depth(m.conv(x))),
}


@pytest.mark.parametrize("way", FIRING)
def test_a_norm_that_fires_is_found(way: str) -> None:
    found = texts(Net(FIRING[way]))
    assert len(found) == 1
    assert "'bn' (BatchNorm2d) makes 4 of the 4 pruned channels of 'conv' fire with up to 0.3" in found[0]


@pytest.mark.parametrize(
    "between",
    [
        nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.LeakyReLU(), nn.Tanh(), nn.Hardswish(), nn.PReLU(),
        nn.Sequential(nn.ReLU(), nn.Dropout2d(), nn.MaxPool2d(2)),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_modules_that_keep_zeros_are_followed(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), between, loud(nn.BatchNorm2d(8)), nn.Conv2d(8, 4, 1))
    assert "'2' (BatchNorm2d) makes 4 of the 4" in " ".join(texts(model, "0"))
    zeros = torch.zeros(1, 8, 4, 4)
    assert not between.eval()(zeros).any()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(8, 8),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    ],
    ids=["batch", "instance", "group", "instance_tracking"],
)  # fmt: skip
def test_norms_of_every_kind(norm: nn.Module) -> None:
    model = Net(FIRING["straight"], norm)
    (found,) = texts(model)
    assert "makes 4 of the 4 pruned channels of 'conv' fire with up to 0.3" in found
    gone = model.conv.weight.abs().sum((1, 2, 3)) == 0
    out = model.bn.eval()(model.conv(torch.randn(2, 8, 5, 5)))
    assert torch.allclose(out[:, gone], torch.tensor(0.3))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm([8, 5, 5])])
def test_norms_across_channels(norm: nn.Module) -> None:
    (found,) = texts(Net(FIRING["straight"], norm))
    assert "normalises across channels" in found


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)])
def test_norms_without_a_bias_are_silent(norm: nn.Module) -> None:
    assert texts(Net(FIRING["straight"], norm)) == ()


SILENT: dict[str, Forward] = {
    "residual": lambda m, x: m.bn(m.conv(x) + x),
    "residual in place": lambda m, x: m.bn(m.conv(x).add_(x)),
    "a layer between": lambda m, x: m.bn(m.other(m.conv(x).relu())),
    "no norm after": lambda m, x: m.conv(m.bn(x)).clamp(min=-1),
    "shapes only": lambda m, x: m.bn(x).view(m.conv(x).size()),
}


@pytest.mark.parametrize("way", SILENT)
def test_channels_that_live_are_understood(way: str) -> None:
    assert texts(Net(SILENT[way])) == ()


def test_a_sum_of_zeros_is_zero() -> None:
    model = Net(lambda m, x: m.bn(m.conv(x) + m.other(x).relu()))
    with torch.no_grad():
        for layer in (model.conv, model.other):
            layer.weight[:3] = 0
    (found,) = texts(model, ["conv", "other"], 0.375)
    assert "makes 3 of the 3 pruned channels of 'conv' and 'other' fire" in found


def test_a_silent_norm_is_followed_too() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), loud(nn.BatchNorm2d(8)))
    (found,) = texts(model, "0")
    assert found.startswith("'3' (BatchNorm2d)")


UNKNOWN: dict[str, Forward] = {
    "operation": lambda m, x: m.bn(torch.special.expit(m.conv(x))),
    "method": lambda m, x: m.bn(m.conv(x).clamp(min=0)),
    "moved": lambda m, x: m.bn(m.conv(x).permute(0, 1, 3, 2)),
    "joined": lambda m, x: m.bn(torch.cat([m.conv(x)[:, :4], x[:, :4]], 1)),
    "functional norm": lambda m, x: F.batch_norm(m.conv(x), torch.zeros(8), torch.ones(8)),
    "shifted": lambda m, x: m.bn(m.conv(x) + m.shift),
    "divided by": lambda m, x: m.bn(1 / m.conv(x)),
    "by hand": lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)),
    "untraceable": lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else x,
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_is_not_understood_is_said(way: str) -> None:
    (found,) = texts(Net(UNKNOWN[way]))
    assert "not known" in found
    assert "'conv'" in found or way == "untraceable"


def test_a_norm_of_an_unknown_class_is_said() -> None:
    class FrozenBatchNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    (found,) = texts(Net(FIRING["straight"], FrozenBatchNorm()))
    assert "'conv' fire is not known" in found


def test_many_unknown_layers_are_one_line() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 16, batch_first=True) for _ in range(3)]
    found = [t for t in texts(nn.Sequential(*layers), "*") if "not known" in t]
    assert len(found) == 1
    assert " more fire is not known" in found[0]


def test_a_subclass_of_a_layer_is_a_layer() -> None:
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(Own(8, 8, 3), loud(nn.BatchNorm2d(8)))
    assert "'1' (BatchNorm2d) makes 4 of the 4 pruned channels of '0' fire" in " ".join(texts(model, "0"))


def test_wrapped_models_are_followed() -> None:
    for wrapped in (torch.optim.swa_utils.AveragedModel, nn.DataParallel):
        assert "makes 4 of the 4" in " ".join(texts(wrapped(Net(FIRING["straight"]))))


@pytest.mark.parametrize("verb", ["prune", "apply"])
def test_a_warning_made_an_error_comes_before_the_first_zero(verb: str) -> None:
    model = Net(FIRING["straight"])
    plan = secateur.plan(model, 0.5, include="conv", pattern="channel")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with warnings.catch_warnings(), pytest.raises(secateur.SecateurWarning, match="fire with up to"):
        warnings.simplefilter("error", secateur.SecateurWarning)
        if verb == "prune":
            secateur.prune(model, 0.5, include="conv", pattern="channel")
        else:
            secateur.apply(plan, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_warning_points_at_the_call() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        secateur.prune(Net(FIRING["straight"]), 0.5, include="conv", pattern="channel")
    assert [w.filename for w in caught] == [__file__]
