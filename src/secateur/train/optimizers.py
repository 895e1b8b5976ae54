"""What pruning has to know of optimizers: whose parameters they hold, and which of their state belongs to single weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.bits import keep_
from secateur.errors import BadInput, NotDefined, SecateurWarning
from secateur.stores.shards import here

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Adafactor", "Adamax", "Rprop",
)  # fmt: skip
"""Classes of ``torch.optim`` that move a weight with no gradient, no momentum and the value zero nowhere."""

STATE_KEYS = frozenset({
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta", "sum",
    "prev", "ax", "variance",
})  # fmt: skip
"""State that belongs to single weights. Shape alone proves nothing: the preconditioner of a square weight has its shape."""


PATIENCE = 100
"""Backward passes without a step after which a loop is warned."""


def bare(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper such as Accelerate's.

    Raises:
        BadInput: not an optimizer.
        NotDefined: LBFGS.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise BadInput(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}.")
    if isinstance(inner, torch.optim.LBFGS):
        raise NotDefined(
            "LBFGS evaluates the loss at weights of its own between two steps, from directions over all weights together, so "
            "no mask holds during a step: train with another optimizer."
        )
    return inner


def listed(optimizer: Any) -> list[Any]:
    """None, one or several optimizers as a list."""
    return list(optimizer) if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]


def held_by(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters of an optimizer."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def check_holds(optimizer: Optimizer, parameters: Mapping[str, Sequence[Tensor]], all_of: bool, what: str) -> None:
    """Refuses an optimizer that holds none of the parameters that are ``what``, or with ``all_of`` not all of them."""
    held = held_by(optimizer)
    foreign = [name for name, some in parameters.items() if not any(id(p) in held for p in some)]
    none = len(foreign) == len(parameters)
    if foreign and (all_of or none):
        raise BadInput(
            f"the optimizer ({type(optimizer).__name__}, {len(held)} parameters) holds {'none' if none else 'not all'} of the "
            f"parameters that are {what} (missing: {', '.join(foreign[:4])}{', …' if len(foreign) > 4 else ''}): make it from "
            "this model's parameters, after anything that replaces them."
        )


def check_follows(optimizer: Optimizer, of: int, pruned: Mapping[str, Sequence[Tensor]], rewires: bool) -> None:
    """Refuses an optimizer, one of so many, whose steps a pruner cannot follow; one that rewires needs all parameters in one.

    Raises:
        BadInput: it holds none of the pruned parameters, or with ``rewires`` not all of them.
        NotDefined: one of several, with ``rewires``.
    """
    if rewires and of > 1:
        raise NotDefined("rewire is not defined with several optimizers, whose steps are not one: give it one.")
    check_holds(optimizer, pruned, rewires, "pruned")


def mixes(optimizer: Optimizer) -> bool:
    """Whether a weight without a gradient may move all the same, so that it has to be masked again after the step.

    By the gradients of others; or in float16, where Adam's ``eps`` of 1e-8 is 0, and what has no gradient becomes 0 / 0.
    """
    kind = type(optimizer)
    elementwise = kind.__module__.startswith("torch.optim") and kind.__name__ in ELEMENTWISE
    return not elementwise or any(p.dtype == torch.float16 for g in optimizer.param_groups for p in g["params"])


def goes_last(optimizer: Optimizer, hook: Callable[..., Any]) -> bool:
    """Whether no other hook runs between this one, before a step, and the step.

    If so, whatever has changed gradients after it was the step itself (Nesterov's of SGD does), which leaves zeros zero.
    """
    hooks = optimizer._optimizer_step_pre_hooks
    return next(reversed(hooks.values()), hook) == hook


def skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler found infinite gradients: it calls a fused optimizer all the same, which then does nothing."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def warn_of_waiting(passes: int, attached: bool) -> None:
    """Warns a loop that has made so many backward passes since the last step that was counted."""
    if passes == PATIENCE:
        what = (
            "attach the optimizer whose steps are made"
            if attached
            else "call pruner.step() after optimizer.step(), or give the Pruner the optimizer"
        )
        warnings.warn(
            f"{PATIENCE} backward passes and no step: {what}. Until then nothing more is pruned.", SecateurWarning, 3
        )


def drop_gradients(optimizer: Optimizer) -> None:
    """Takes the gradients away, so that a step moves nothing: optimizers pass over parameters without one."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def mask_state(
    optimizers: Iterable[Optimizer], masked: Sequence[tuple[nn.Parameter, Tensor]], state_keys: frozenset[str]
) -> None:
    """Zeros the state of pruned weights: the floating-point tensors of known names and the parameter's own shape."""
    for optimizer in optimizers:
        for parameter, bits in masked:
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if key in state_keys and isinstance(value, Tensor) and value.shape == parameter.shape:
                    if value.is_floating_point():
                        keep_(here(value), bits.to(value.device))
