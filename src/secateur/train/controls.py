"""What a ticket is held against: the same masks over weights drawn anew, and random masks over the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core import schedules
from secateur.core.bits import count_kept
from secateur.core.criteria import random
from secateur.core.patterns import Unstructured
from secateur.core.spelling import pattern_of
from secateur.errors import BadInput

from .pruner import Pruner

Control = Literal["reinit", "random"]
CONTROLS: tuple[Control, ...] = ("reinit", "random")
DRAWN = 0x5EC47E0000
"""Where the seeds of the control begin: far from those that people give their networks, lest it draw the same weights."""


def redraw(model: nn.Module, seed: int, number: int) -> None:
    """Draws every parameter anew, by each module's own ``reset_parameters``; the same for a seed and the number of a round.

    Raises:
        BadInput: a module has parameters of its own and no ``reset_parameters``.
    """
    check_redraws(model)
    with torch.random.fork_rng():
        torch.manual_seed(DRAWN + seed * 1009 + number)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


def check_redraws(model: nn.Module) -> None:
    """Refuses a model that `redraw` cannot draw anew."""
    for name, module in model.named_modules():
        if not callable(getattr(module, "reset_parameters", None)) and list(module.parameters(recurse=False)):
            raise BadInput(
                f"{name or 'the model'} ({type(module).__name__}) has parameters and no reset_parameters(): give it one, so "
                "that the control can draw it anew."
            )


def random_masks(
    model: nn.Module, ticket: Mapping[str, Tensor], share: float, choice: Mapping[str, Any], seed: int
) -> dict[str, Tensor]:
    """Random masks, packed: of single weights as many in each tensor as the ticket's; of other patterns as many in all.

    They grow from round to round, since the order that a seed draws stays the same. Zeros are written into the model.
    """
    how = {**choice, "criterion": random(seed)}
    if isinstance(pattern_of(how.get("pattern", "unstructured")), Unstructured):
        how["allocation"] = _counts(model, ticket)
    return pruned_masks(model, share, how)


def pruned_masks(model: nn.Module, share: float, choice: Mapping[str, Any]) -> dict[str, Tensor]:
    """Prunes a model, and returns the masks of that, packed; what was zero before stays zero."""
    pruner = Pruner(model, None, schedules.constant(share), **choice)
    pruner.close()
    found: dict[str, Tensor] = pruner.state_dict()["masks"]
    return found


def _counts(model: nn.Module, ticket: Mapping[str, Tensor]) -> Any:
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    gone = {n: sizes[n] - count_kept(bits) for n, bits in ticket.items()}
    return lambda rows, sparsity: {row.name: gone.get(row.name, 0) for row in rows}
