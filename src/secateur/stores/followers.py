"""What goes with the units of a tensor: a layer's bias with its output channels."""

from __future__ import annotations

from dataclasses import replace

from secateur.core.heads import UnitPattern
from secateur.core.plan import Plan
from secateur.errors import BadTensor, PlanMismatch

from .base import Store


def check_followers(made: Plan, store: Store) -> None:
    """Refuses tensors that should go with another's units (a bias with its channels) and cannot be written as they are.

    Raises:
        PlanMismatch: there is no such tensor, or it does not have one element for each unit.
        BadTensor: it cannot be pruned, or goes with two layers.
    """
    specs = {n: s for s in store.specs() for n in (s.name, *s.aliases)}
    leaders: dict[str, str] = {}
    for row in made.chosen:
        for member in row.followers:
            spec = specs.get(member.name)
            units = made.pattern.grid(row.spec).units if isinstance(made.pattern, UnitPattern) else 0
            if spec is None or spec.numel != member.numel(units):
                raise PlanMismatch(
                    f"{member.name!r}, the bias of {row.name!r}, should have {member.numel(units)} elements; found {spec}."
                )
            if spec.name in leaders:
                raise BadTensor(
                    f"the bias {spec} belongs to two layers, {leaders[spec.name]!r} and {row.name!r}, whose pruned channels "
                    "differ: leave one of them out with ignore=, or give each its own bias."
                )
            leaders[spec.name] = row.name
    store.check([replace(specs[n], skip=None) for n in leaders])
