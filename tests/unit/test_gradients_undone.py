"""Measuring gradients leaves everything as it was, after an error too; what cannot be measured is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import BadInput, BadTensor
from secateur.evaluate.gradients import MEASURED, gradients
from tests.contract.training import the_same
from tests.unit.calibrating import whole_of
from tests.unit.test_gradients import NAMES, Batch, Net, batches, loss


class Stop(Exception):
    pass


def failing(at: int) -> Callable[[nn.Module, Any], Tensor]:
    seen = iter(range(100))

    def fails(model: nn.Module, batch: Any) -> Tensor:
        if next(seen) == at:
            raise Stop
        return loss(model, batch)

    return fails


@pytest.mark.parametrize("wanted", MEASURED)
def test_nothing_is_left_behind(wanted: str) -> None:
    model = Net()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = whole_of(model)
    data = batches()
    gradients(model, data, loss, None, {wanted})
    assert whole_of(model) == before
    with pytest.raises(Stop):
        gradients(model, data, failing(2), None, {wanted})
    assert whole_of(model) == before
    with pytest.raises(BadInput):
        gradients(model, data, lambda m, b: m.fc(torch.ones(6)).sum(), None, {wanted})
    assert whole_of(model) == before


def test_the_model_is_in_eval_mode_meanwhile_and_dropout_does_nothing() -> None:
    model, data = Net().train(), batches()

    def looking(m: nn.Module, batch: Any) -> Tensor:
        assert not any(x.training for x in m.modules()) and all(m.get_parameter(n).requires_grad for n in NAMES)
        return loss(m, batch)

    assert the_same(gradients(model, data, looking), gradients(model, data, looking))


# Refusals


def refused(match: str, *args: Any, error: type[Exception] = BadInput, **kwargs: Any) -> None:
    model = args[0]
    before = whole_of(model)
    with pytest.raises(error, match=match):
        gradients(*args, **kwargs)
    assert whole_of(model) == before


def generator(*items: Any) -> Iterator[Any]:
    yield from items


def test_batches_that_cannot_be_used_are_refused() -> None:
    model, data = Net(), batches()
    refused("there are no batches", model, [], loss)
    used = generator(*data)
    gradients(model, used, loss)
    refused("used up", model, used, loss)
    refused("For a single batch", model, data[0][0], loss)
    refused("For a single batch", model, {"x": data[0][0]}, loss)
    refused("batches is a int", model, 3, loss)
    refused("loss is a function", model, data, "cross_entropy")
    refused(
        "batch 2 cannot be cut.* 3 and 4 entries",
        model,
        [data[0], (data[0][0][:3], data[0][1][:4])],
        loss,
        per_sample=True,
    )
    refused("batch 1 cannot be cut.* no tensor", model, ["text"], loss, per_sample=True)


def test_losses_that_cannot_be_used_are_refused_by_the_batch() -> None:
    model, data = Net(), batches()
    bad = (torch.full_like(data[0][0], float("nan")), data[0][1])
    refused("loss of batch 3 is nan", model, [*data[:2], bad], loss)
    refused("loss of sample 1 of batch 1 is nan", model, [bad], loss, per_sample=True)
    refused(r"shape \(6,\), torch.float32", model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    refused("returned 1.5", model, data, lambda m, b: 1.5)
    refused("torch.int64", model, data, lambda m, b: m(b[0]).argmax())
    refused("loss of batch 1 has no graph", model, data, lambda m, b: loss(m, b).detach())
    refused("shape mismatch|out of bounds|Target 9", model, [(data[0][0], data[0][1] * 0 + 9)], loss, error=IndexError)


def test_tensors_that_cannot_be_measured_are_refused_by_name() -> None:
    model, data = Net(), batches()
    refused("no tensor 'nope'; it has", model, data, loss, ["nope"])
    refused("no tensor is to be measured", model, data, loss, [])
    refused("does not depend on 'conv.weight', 'hidden.weight'", model, data, lambda m, b: m.fc(torch.ones(6)).sum())
    refused("torch.float32.*NaN or infinite|'conv.weight'.*NaN or infinite", model, data, root_of_zero)
    masked = Net()
    nn.utils.parametrizations.weight_norm(masked.fc)
    refused("parametrize", masked, data, loss, ["fc.weight"], error=BadTensor)


def root_of_zero(model: nn.Module, batch: Any) -> Tensor:
    """Finite, with a gradient that is not."""
    w: Any = model.conv.weight  # type: ignore[union-attr]
    return loss(model, batch) + (w - w.detach()).square().sum().sqrt()


def test_options_out_of_range_are_refused() -> None:
    model, data = Net(), batches()
    for wanted in ("gradient", [], {"grad", "hessian"}):
        refused("wanted takes some of grad, fisher_diag", model, data, loss, None, wanted)
    for option in ("probes", "block", "memory"):
        for value in (0, -1, 2.0, True, "3"):
            refused(f"{option} is a whole number", model, data, loss, **{option: value})
    for damping in (0, -1e-5, float("nan"), float("inf"), True, "1e-5"):
        refused("damping is what is added", model, data, loss, None, "fisher_inverse", damping=damping)
    refused("per_sample is True or False", model, data, loss, per_sample=1)
    refused("takes an int", model, data, loss, seed=0.5)


def test_blocks_that_do_not_fit_are_refused_before_a_batch_is_asked_for() -> None:
    model = Net()

    def never() -> Iterator[Batch]:
        raise AssertionError("a batch was asked for")
        yield

    # 27, 24 and 162 weights in blocks of 100: 27² + 24² + 2 · 100² numbers of 8 bytes.
    needed = 8 * (27**2 + 24**2 + 2 * 100**2)
    refused("blocks of 100 for 213 weights take 0.0 GB.*Make block= smaller", model, never(), loss, None,
            "fisher_inverse_diag", block=100, memory=needed - 1)  # fmt: skip
    gradients(model, batches(), loss, None, "fisher_inverse_diag", block=100, memory=needed)
