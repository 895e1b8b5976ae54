"""Batches of a user's data: onto the model's device, and through the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch, every tensor on ``device`` and a copy, since a model may write to what it gets; what has its own ``to`` (a
    tokenizer's output) uses that."""
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: moved(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        items = [moved(v, device) for v in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model(batch)`` for a tensor, ``model(batch[0])`` for a tuple or list, ``model(**batch)`` for a mapping."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**batch)
    raise BadInput(
        f"a batch is a {type(batch).__name__}: give forward=, a function of model and batch that runs one on the other."
    )
