"""Losses of a user's, one batch at a time, of a model that is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput

from .mode import only_training

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch) -> scalar``."""


def loss_of(loss: Loss, model: nn.Module, batch: Any, where: str) -> Tensor:
    """The loss of a batch, a scalar with a graph.

    Raises:
        BadInput: not such a tensor, or not finite; ``where`` says for which batch.
    """
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise BadInput(f"loss(model, batch) must return a tensor with one real number; for {where} it returned {got}.")
    if not value.requires_grad:
        raise BadInput(
            f"the loss of {where} has no graph: it does not depend on what is measured, or was detached from it "
            "(torch.no_grad, .item(), .detach())."
        )
    if not math.isfinite(float(value.detach())):
        raise BadInput(f"the loss of {where} is {float(value.detach())}: look for NaN in the batch and in the weights.")
    return value.reshape(())


@contextmanager
def differentiable(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode with gradients, also of ``parameters`` that are frozen; afterwards all is as it was."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(only_training(model))
        for p in parameters:
            if not p.requires_grad:
                stack.callback(p.requires_grad_, False)
                p.requires_grad_(True)
        yield
