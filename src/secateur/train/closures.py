"""The closure of an optimizer's step, which makes the gradients that the step uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def with_loss(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """What ``step`` was called with, its closure, if any, called now: for gradients before the step begins."""
    closure = _closure(args, kwargs)
    if closure is None:
        return args, kwargs
    with torch.enable_grad():
        loss = closure()
    return _with_closure(args, kwargs, lambda: loss)


def before_use(args: Args, kwargs: Kwargs, act: Callable[[], object]) -> tuple[Args, Kwargs] | None:
    """Acts on the gradients that a step is about to use: now, or whenever its closure, if any, has made them.

    Returns:
        What to call ``step`` with, as its pre-hook returns it.
    """
    closure = _closure(args, kwargs)
    if closure is None:
        act()
        return None

    def closed() -> Any:
        loss = closure()
        act()
        return loss

    return _with_closure(args, kwargs, closed)


def _closure(args: Args, kwargs: Kwargs) -> Callable[[], Any] | None:
    return kwargs["closure"] if "closure" in kwargs else args[1] if len(args) > 1 else None


def _with_closure(args: Args, kwargs: Kwargs, closure: Callable[[], Any]) -> tuple[Args, Kwargs]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs
