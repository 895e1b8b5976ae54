"""How a model runs, set for a while and put back: which modules train, and nothing compiled."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
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


def eager() -> AbstractContextManager[object]:
    """Compiled modules run as they are written: what looks on from outside does not see into compiled code."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
