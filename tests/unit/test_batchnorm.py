"""BatchNorm statistics against averages worked out by hand, and everything else as it was."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.errors import BadInput, SecateurWarning
from secateur.evaluate.batchnorm import recalibrate_batchnorm


def net() -> nn.Sequential:
    """Every kind of module that has a say: a convolution, norms with other momenta, dropout, a norm without
    statistics."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(27, 4),
        nn.BatchNorm1d(4, momentum=0.3),
        nn.BatchNorm1d(4, track_running_stats=False),
    )
    model[1].running_mean += 7  # statistics of another network
    model[5].running_var *= 9
    model[2].eval()  # flags of the user's own
    model[5].eval()
    return model


def batches(n: int = 3, size: int = 8) -> list[Tensor]:
    return [torch.randn(size, 2, 5, 5) * (i + 1) + i for i in range(n)]


def snapshot(model: nn.Module) -> dict[str, Any]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    return {"state": state, "flags": flags, "addresses": [t.data_ptr() for t in model.state_dict().values()]}


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["flags"] == before["flags"]
    assert after["addresses"] == before["addresses"]
    assert after["state"].keys() == before["state"].keys()
    for k, v in before["state"].items():
        assert torch.equal(after["state"][k], v), k


def test_statistics_are_equal_weight_averages() -> None:
    model, data = net(), batches()
    assert recalibrate_batchnorm(model, data) == 3
    means, variances, later = [], [], []
    with torch.no_grad():
        for x in data:
            y = model[0](x)
            m, v = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=True)
            means.append(m)
            variances.append(v)
            b = y.var((0, 2, 3), unbiased=False)
            normed = (y - m[:, None, None]) / (b[:, None, None] + model[1].eps).sqrt()  # by the batch; no dropout
            later.append(model[4](normed.flatten(1)))
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack(variances).mean(0))
    torch.testing.assert_close(model[5].running_mean, torch.stack([y.mean(0) for y in later]).mean(0))
    torch.testing.assert_close(model[5].running_var, torch.stack([y.var(0) for y in later]).mean(0))
    assert int(model[1].num_batches_tracked) == 3


def test_nothing_else_changes() -> None:
    model = net()
    before = snapshot(model)
    recalibrate_batchnorm(model, batches())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before["state"][k])}
    assert changed == {f"{i}.{s}" for i in (1, 5) for s in ("running_mean", "running_var", "num_batches_tracked")}
    assert snapshot(model)["flags"] == before["flags"]
    assert snapshot(model)["addresses"] == before["addresses"]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in model.buffers())


def test_deterministic() -> None:
    a, b = net(), net()
    b.load_state_dict(a.state_dict())
    data = batches()
    recalibrate_batchnorm(a, data)
    torch.rand(3)  # dropout would notice
    recalibrate_batchnorm(b, data)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_batch_weighs_the_same() -> None:
    norm = nn.BatchNorm1d(1)
    recalibrate_batchnorm(norm, [torch.tensor([[0.0], [0.0], [0.0], [0.0]]), torch.tensor([[3.0], [5.0]])])
    assert (float(norm.running_mean), float(norm.running_var)) == (2.0, 1.0)


def test_it_repairs_a_pruned_network() -> None:
    """Half the inputs of a norm gone: with the old statistics its output is off, with the new ones it is
    normal again."""
    model = nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10)).eval()
    data = [torch.randn(256, 20) + 1 for _ in range(8)]
    recalibrate_batchnorm(model, data)
    with torch.no_grad():
        model[0].weight[:, :10] = 0
        spread = model(data[0]).std(0).mean()
        recalibrate_batchnorm(model, data)
        repaired = model(data[0]).std(0).mean()
    assert spread < 0.85
    assert abs(repaired - 1) < 0.05


Pair = namedtuple("Pair", "image label")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "a label"],
        lambda x: Pair(x, 3),
        lambda x: {"input": x},
        lambda x: UserDict(input=x),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "dict", "mapping"],
)
def test_kinds_of_batches(wrap: Any) -> None:
    model, expected, data = net(), net(), batches()
    expected.load_state_dict(model.state_dict())
    recalibrate_batchnorm(expected, data)
    assert recalibrate_batchnorm(model, map(wrap, data)) == 3
    assert torch.equal(model[5].running_var, expected[5].running_var)


def test_forward_of_the_users_own() -> None:
    model, expected, data = net(), net(), batches()
    expected.load_state_dict(model.state_dict())
    recalibrate_batchnorm(expected, data)
    seen = []

    def forward(m: nn.Module, batch: Any) -> None:
        assert m is model and not torch.is_grad_enabled()
        seen.append(batch["more"])
        m(batch["image"][0])

    loader = [{"image": [x], "more": Pair(x, "text")} for x in data]
    assert recalibrate_batchnorm(model, loader, forward=forward) == 3
    assert [type(s) for s in seen] == [Pair] * 3
    assert torch.equal(model[5].running_mean, expected[5].running_mean)


def test_inputs_move_to_the_models_device() -> None:
    class Elsewhere:
        moved: torch.device

        def to(self, device: torch.device) -> Tensor:
            self.moved = device
            return torch.randn(4, 2)

    first, second, third = Elsewhere(), Elsewhere(), Elsewhere()
    recalibrate_batchnorm(nn.BatchNorm1d(2), [first, (second, "label"), {"input": third}])
    assert first.moved == second.moved == third.moved == torch.device("cpu")


def test_batches_bounds_an_endless_loader() -> None:
    taken = []

    def endless() -> Iterator[Tensor]:
        for i in count():
            taken.append(i)
            yield torch.randn(4, 2)

    norm = nn.BatchNorm1d(2)
    assert recalibrate_batchnorm(norm, endless(), batches=5) == 5
    assert taken == [0, 1, 2, 3, 4]
    assert recalibrate_batchnorm(norm, [torch.randn(4, 2)] * 3, batches=100) == 3


def test_with_a_data_loader() -> None:
    data = DataLoader(TensorDataset(torch.randn(20, 2), torch.zeros(20)), batch_size=8)
    assert recalibrate_batchnorm(nn.BatchNorm1d(2), data) == 3


# --- errors
# -----------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str, loader: Any, error: type[BaseException] = BadInput, **kwargs: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        recalibrate_batchnorm(model, loader, **kwargs)
    assert_same(model, before)


def test_nothing_is_lost_on_an_error() -> None:
    def loader() -> Iterator[Tensor]:
        yield from batches(2)
        raise OSError("disk gone")

    def interrupted(model: nn.Module, batch: Any) -> None:
        model(batch)
        raise KeyboardInterrupt("stopped")

    refused(net(), "disk gone", loader(), OSError)
    refused(net(), "stopped", batches(), KeyboardInterrupt, forward=interrupted)
    refused(net(), "expected input", [*batches(), torch.zeros(4, 1, 5, 5)], RuntimeError)


def test_one_value_per_channel() -> None:
    refused(
        net(),
        r"batch 2 leaves a BatchNorm one value per channel .*drop_last",
        [*batches(1), batches(1, size=1)[0]],
    )


def test_other_value_errors_pass_unchanged() -> None:
    refused(nn.BatchNorm1d(2), "expected 2D or 3D input", [torch.randn(2, 2, 2, 2)], ValueError)


def test_empty_loader() -> None:
    refused(net(), "the loader is empty", [])
    used_up = iter(batches())
    list(used_up)
    refused(net(), "the loader is empty", used_up)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2)],
    ids=str,
)
def test_no_batchnorm(model: nn.Module) -> None:
    refused(model, "no BatchNorm that tracks running statistics", [torch.randn(4, 2)])


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, "3"])
def test_bad_number_of_batches(bad: Any) -> None:
    refused(net(), "batches=", batches(), batches=bad)


@pytest.mark.parametrize("loader", [torch.randn(8, 2, 5, 5), {"input": torch.randn(8, 2, 5, 5)}])
def test_a_batch_is_not_a_loader(loader: Any) -> None:
    refused(net(), r"pass \[batch\]", loader)


@pytest.mark.parametrize("batch", ["text", 3, None, ()])
def test_unknown_batches(batch: Any) -> None:
    refused(net(), "give forward=", [batch])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_inputs(value: float) -> None:
    data = batches()
    data[1][0, 0, 0, 0] = value
    refused(net(), "running_mean of '1' would hold 3 NaN or infinite values", data)


def test_lazy() -> None:
    with pytest.raises(BadInput, match="'0' is lazy"):
        recalibrate_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()), batches())


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.unused.running_mean += 5

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branch()
    with pytest.warns(SecateurWarning, match="no batch reached 'unused'") as caught:
        recalibrate_batchnorm(model, [torch.randn(8, 2)])
    assert caught[0].filename == __file__
    assert model.unused.running_mean.tolist() == [5, 5]
    assert int(model.used.num_batches_tracked) == 1
