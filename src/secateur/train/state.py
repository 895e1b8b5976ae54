"""What a `Pruner`'s saved state has to be, before any of it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.core.allocate import check_sparsity
from secateur.core.schedules import check_step
from secateur.errors import BadInput, PlanMismatch


def check_state(state: Any, mine: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what is no state of a pruner of such tensors.

    Args:
        state: what `Pruner.state_dict` is said to have returned.
        mine: the shapes of the tensors that are pruned here, by name.

    Raises:
        BadInput: not such a state.
        PlanMismatch: it is of other tensors, or of other shapes, or a mask is missing.
    """
    if not isinstance(state, Mapping) or state.get("version") != 1:
        raise BadInput("this is not the state of a Pruner (version 1).")
    missing = [k for k in ("steps", "value", "shapes", "held", "masks") if k not in state]
    if missing:
        raise BadInput(f"the state of a Pruner has {', '.join(missing)} too; this one has not: it is not whole.")
    check_step(state["steps"], "steps")
    check_sparsity(state["value"], "value")
    theirs, masks = state["shapes"], state["masks"]
    named = isinstance(theirs, Mapping) and isinstance(masks, Mapping)
    if not named or not all(isinstance(m, Tensor) for m in masks.values()):
        raise BadInput("shapes and masks of the state of a Pruner are mappings of names, the masks to tensors.")
    if mine != theirs:
        odd = sorted({*mine, *theirs} - {n for n in mine if mine[n] == theirs.get(n)})
        told = "; ".join(
            f"{n}: {theirs.get(n, 'missing')} in the state, {mine.get(n, 'missing')} here" for n in odd[:6]
        )
        raise PlanMismatch(f"the state is of another model or another choice of tensors: {told}.")
    # Of a model that is cut over processes there are bool masks of all tensors, held or not.
    held = {*state["held"]}
    if lost := sorted(held - {*masks} | {n for n, m in masks.items() if n not in held and m.dtype == torch.uint8}):
        raise PlanMismatch(
            f"the state holds {', '.join(state['held'])}, and has masks of {', '.join(masks)}: see {lost[0]}."
        )
