"""Which modules train, set for a while and put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def only_training(model: nn.Module, training: Collection[nn.Module] = ()) -> Iterator[None]:
    """Puts ``training`` in train mode and all else in eval mode; on leaving, by an error too, every flag is
    as it was.

    Flags are set one by one, because a model may override ``train()``: to keep its norms frozen, say, or to
    merge an adapter, which setting them back would not undo.
    """
    before = [(m, m.training) for m in model.modules()]
    chosen = {id(m) for m in training}
    try:
        for m, _ in before:
            m.training = id(m) in chosen
        yield
    finally:
        for m, was in before:
            m.training = was
