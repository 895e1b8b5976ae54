"""After pruning with data a model is what it was but for its weights; after an error at any stage wholly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.evaluate.calibrate import Step
from tests.contract.nets import snapshot
from tests.unit.calibrating import batches, choosing, facts_of, mlp, moving, whole_of

HOWS: dict[str, dict[str, Any]] = {
    "wanda": {"criterion": "wanda"},
    "2:4": {"criterion": "wanda", "pattern": "2:4", "sparsity": None},
    "in one go": {"criterion": "wanda", "pattern": "unstructured", "allocation": "global"},
    "a solver": {"solver": choosing},
    "a solver with a mask": {"criterion": "wanda", "solver": moving},
    "outliers": {"criterion": "wanda", "allocation": secateur.OWL(outlier=1.5)},
    "gradients": {"criterion": "taylor"},
    "a solver of gradients": {"solver": "woodfisher"},
}
AT_ONCE = ("in one go", "gradients", "a solver of gradients")
"""Those that run the model once a batch."""


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.clone()).square().mean()


def data() -> secateur.Calibration:
    return secateur.Calibration(batches(), loss=loss)


hows = pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)


def with_flags(model: nn.Module) -> nn.Module:
    """Some of it frozen, some in eval mode, hooks and gradients of the user's own."""
    model.train()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[6].register_forward_hook(lambda module, args, output: None)
    model[4].register_forward_pre_hook(lambda module, args: None)
    return model


@hows
def test_the_model_is_what_it_was(how: dict[str, Any]) -> None:
    model = with_flags(mlp())
    before = facts_of(model)
    secateur.prune(model, **{"sparsity": 0.5, **how}, calibration=data())
    assert facts_of(model) == before


@hows
def test_the_same_again(how: dict[str, Any]) -> None:
    """Same input, same bits; whatever stands in the random state."""
    one, other = mlp(), mlp()
    secateur.prune(one, **{"sparsity": 0.5, **how}, calibration=data())
    torch.rand(7)
    secateur.prune(other, **{"sparsity": 0.5, **how}, calibration=data())
    assert snapshot(one) == snapshot(other)


class Stumbles(nn.Module):
    """Passes on what it gets, until it has been called so often."""

    def __init__(self, error: BaseException, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return x


def broken(kind: str, how: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], type[BaseException]]:
    """A network and arguments under which something goes wrong at the given stage, and the error that must come out."""
    model, found, more = with_flags(mlp()), batches(), {}
    error: type[BaseException] = RuntimeError
    if kind == "a batch with NaN":
        found[1][3, 4] = torch.nan
        error = secateur.BadInput
    elif kind == "a loader that fails":
        found, error = _failing(found), KeyError
    elif kind.startswith("a block"):
        error = KeyboardInterrupt if "interrupt" in kind else RuntimeError
        model[5] = Stumbles(error("enough"), {"at once": 0, "later": 5, "interrupted": 4}[kind.split(", ")[1]])
    elif kind == "progress":
        more["progress"] = _raising(2)
    calibration = secateur.Calibration(found, loss=loss, **more)
    return model, {"sparsity": 0.5, **how, "calibration": calibration}, error


def _failing(data: list[Tensor]) -> Any:
    yield data[0]
    raise KeyError("the disk is gone")


def _raising(at: int) -> Callable[[Step], None]:
    def told(step: Step) -> None:
        if step.number == min(at, step.blocks):
            raise RuntimeError("enough")

    return told


KINDS = (
    "a batch with NaN",
    "a loader that fails",
    "a block, at once",
    "a block, later",
    "a block, interrupted",
    "progress",
)


@pytest.mark.parametrize("kind", KINDS)
@hows
def test_after_an_error_all_is_as_before(how: dict[str, Any], kind: str) -> None:
    model, arguments, error = broken(kind, how)
    before = whole_of(model)
    if kind in ("a block, later", "a block, interrupted") and any(how is HOWS[h] for h in AT_ONCE):
        model[5].left = 2  # type: ignore[union-attr]
    with pytest.raises(error):
        secateur.prune(model, **arguments)
    assert whole_of(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["criterion", "solver", "solver with a mask"])
def test_a_method_that_fails_at_the_second_block(what: str, error: type[BaseException]) -> None:
    calls: list[str] = []

    def fail(name: str) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise error("enough")

    def criterion(weight: Tensor, *, input_norm: Tensor, name: str) -> Tensor:
        fail(name)
        return weight.abs() * input_norm

    def solver(
        weight: Tensor, *, hessian: Tensor, pattern: Any, count: int, name: str
    ) -> tuple[Tensor, Tensor, float, float]:
        fail(name)
        return choosing(weight, hessian=hessian, pattern=pattern, count=count, name=name)

    def mover(weight: Tensor, *, hessian: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor, float, float]:
        fail(name)
        return moving(weight, hessian=hessian, mask=mask, name=name)

    how: dict[str, Any] = {"criterion": {"criterion": criterion, "allocation": "uniform"}, "solver": {"solver": solver},
                           "solver with a mask": {"criterion": "wanda", "solver": mover}}[what]  # fmt: skip
    model = with_flags(mlp())
    before = whole_of(model)
    with pytest.raises(error, match="enough"):
        secateur.prune(model, 0.5, calibration=batches(), **how)
    assert whole_of(model) == before and len(calls) == 2
