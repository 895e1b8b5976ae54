"""Batches of a user's data: onto the model's device, and through the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import BadInput

from .blocks import without_cache
from .mode import eager, only_training

Forward = Callable[[nn.Module, Any], object]
"""Runs a model on a batch."""
EMPTY = "the calibration is empty: there are no batches to run. Was its loader used up before?"


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


def run_all(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None, after: Callable[[], None] = lambda: None
) -> None:
    """Runs a model on every batch: in evaluation mode, without gradients or a cache, and uncompiled, so that it can be looked at.

    Args:
        model: left as it is; a batch is moved to its device.
        batches: iterated once.
        forward: how a batch is run, where `run_batch` does not.
        after: called after each.

    Raises:
        BadInput: no batch.
    """
    run, device, empty = forward or run_batch, device_of(model), True
    with torch.no_grad(), only_training(model), without_cache(model), eager():
        for batch in batches:
            run(model, moved(batch, device))
            after()
            empty = False
    if empty:
        raise BadInput(EMPTY)


def pieces(batches: Iterable[Any], per_sample: bool = False) -> Iterator[tuple[str, Any]]:
    """Which it is, and the batch; or each of its samples, as a batch of one.

    Raises:
        BadInput: a batch that cannot be cut into samples.
    """
    for number, batch in enumerate(batches, 1):
        if not per_sample:
            yield f"batch {number}", batch
            continue
        sizes = {len(t) for t in _leaves(batch)}
        if len(sizes) != 1:
            found = (
                "no tensor" if not sizes else f"tensors of {' and '.join(map(str, sorted(sizes)))} entries along dim 0"
            )
            raise BadInput(f"batch {number} cannot be cut into samples: it holds {found}.")
        for i in range(sizes.pop()):
            yield f"sample {i + 1} of batch {number}", _sample(batch, i)


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield from [batch] if batch.dim() else []
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(value)


def _sample(batch: Any, i: int) -> Any:
    """Sample ``i`` as a batch of one; what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return batch[i : i + 1] if batch.dim() else batch
    if isinstance(batch, Mapping):
        one: Any = copy.copy(batch)  # a tokenizer's output stays one
        for key, value in batch.items():
            one[key] = _sample(value, i)
        return one
    if isinstance(batch, list | tuple):
        items = [_sample(v, i) for v in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
