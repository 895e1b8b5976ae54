"""Models built without memory for their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, ``torch.empty`` makes tensors without memory, so that models that are built have no weights.

    What a constructor computes (tables of positions, frequencies, masks) has its values, which it has not under
    ``torch.device("meta")``. Made for `secateur.runtime.load.load_packed`.

    Example:
        >>> with unfilled():
        ...     layer = torch.nn.Linear(1 << 20, 1 << 20)
        >>> layer.weight.device
        device(type='meta')
    """
    with _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        return func(*args, **(given | {"device": "meta"} if func is torch.empty else given))
