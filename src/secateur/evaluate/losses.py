"""Losses of a user's, one batch at a time, of a model that is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput

from .batches import EMPTY, device_of, moved, pieces
from .mode import eager, only_training

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


def each_loss(
    loss: Loss, model: nn.Module, batches: Iterable[Any], add: Callable[[Tensor, int], None], per_sample: bool = False
) -> int:
    """Hands the loss of every batch, or of every sample, to ``add``, each with its number, from 1; returns how many there were.

    No graph outlives its ``add``.

    Raises:
        BadInput: no batch; one that cannot be cut into samples; a loss that is none, see `loss_of`.
    """
    device, count = device_of(model), 0
    for count, (where, batch) in enumerate(pieces(batches, per_sample), 1):
        add(loss_of(loss, model, moved(batch, device), where), count)
    if not count:
        raise BadInput(EMPTY)
    return count


@contextmanager
def differentiable(model: nn.Module, parameters: Iterable[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode with gradients, also of ``parameters`` that are frozen; afterwards all is as it was.

    Compiled modules run as they are written: compiled code sees no new hooks, and has no second derivative.
    """
    with ExitStack() as stack:
        stack.enter_context(eager())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(only_training(model))
        for p in parameters:
            if not p.requires_grad:
                stack.callback(p.requires_grad_, False)
                p.requires_grad_(True)
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            # cuDNN's recurrent layers have no backward in eval mode.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
