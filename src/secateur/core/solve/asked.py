"""Solvers by name, and what a solver asks for.

A solver gets by keyword what its signature names, among ``hessian`` (then the weight is the layer's matrix, (out, in)) or
``fisher_inverse`` (then the weight is as it is stored), ``mask`` (the criterion chose), or ``pattern`` and ``count`` (it chooses
itself), and ``name``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from secateur.errors import BadInput

AnySolver = Callable[..., Any]
STATISTICS = ("hessian", "fisher_inverse")
OFFERED = (*STATISTICS, "mask", "pattern", "count", "name")


def asked(solver: AnySolver) -> set[str]:
    """The keywords that a solver takes, of those there are."""
    return {p for p in inspect.signature(solver).parameters if p in OFFERED}


def asks_for_mask(solver: AnySolver) -> bool:
    """Whether a criterion chooses which weights go, and the solver only moves those that stay."""
    return "mask" in asked(solver)


def solver_needs(solver: AnySolver) -> tuple[str, ...]:
    """The statistics a solver needs of a layer."""
    return tuple(s for s in STATISTICS if s in asked(solver))


def solver_name(solver: AnySolver) -> str:
    """The name that reports carry."""
    return str(getattr(solver, "__name__", type(solver).__name__)).lower()


def solver_of(value: Any, named: Mapping[str, AnySolver]) -> AnySolver:
    """A solver from its name, or a function.

    Raises:
        BadInput: an unknown name, or a function that asks for something nobody provides.
    """
    if isinstance(value, str):
        if value.lower() in named:
            return named[value.lower()]
        raise BadInput(f"solver must be one of {', '.join(named)}, or a function; got {value!r}.")
    if not callable(value):
        raise BadInput(f"solver must be one of {', '.join(named)}, or a function; got {value!r}.")
    params = list(inspect.signature(value).parameters.values())[1:]
    needed = [p.name for p in params if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    odd = [n for n in needed if n not in OFFERED]
    if odd or not solver_needs(value):
        what = (
            f"asks for {', '.join(odd)}, which nobody provides" if odd else f"asks for none of {', '.join(STATISTICS)}"
        )
        raise BadInput(
            f"the solver {solver_name(value)} {what}; after the weight it may ask by keyword for {', '.join(OFFERED)}."
        )
    return value  # type: ignore[no-any-return]
