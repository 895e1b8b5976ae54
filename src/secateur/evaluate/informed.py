"""What a request needs of data, and what a request is once it has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.core.criteria import describe, magnitude
from secateur.core.owl import OWL
from secateur.core.patterns import NM, Unstructured
from secateur.core.request import Request
from secateur.core.saliency import STATISTICS, Bound, Statistics, bind, needs
from secateur.core.solve import NAMED
from secateur.core.solve.asked import AnySolver, asks_for_mask, solver_name, solver_needs, solver_of
from secateur.core.spelling import pattern_of
from secateur.core.types import Spec
from secateur.errors import BadInput
from secateur.stores.base import Store

from .calibrate import Calibration


def with_solver(solver: object, calibration: object, statistics: object) -> tuple[AnySolver | None, Calibration | None]:
    """The solver and the calibration that were asked for, resolved.

    Raises:
        BadInput: data given twice or of another kind, or a solver without any.
    """
    if calibration is not None and statistics is not None:
        raise BadInput("calibration and statistics are two answers to one question: give one of them.")
    if statistics is not None:
        _check_statistics(statistics)
    found = None if solver is None else solver_of(solver, NAMED)
    if found is not None and calibration is None:
        raise BadInput(
            f"the solver {solver_name(found)} works on what data tells of each layer: pass calibration=, batches of real input."
        )
    return found, None if calibration is None else Calibration.of(calibration)


def _check_statistics(statistics: object) -> None:
    tables = statistics.values() if isinstance(statistics, Mapping) else [statistics]
    if odd := [t for t in tables if not isinstance(t, Mapping)]:
        raise BadInput(
            "statistics is what secateur.calibrate returns, {name: {statistic: tensor}}; "
            f"got a {type(odd[0]).__name__}. Batches of input go into calibration=."
        )


def defaults_of(solver: AnySolver | None, criterion: Any, allocation: Any, pattern: Any) -> dict[str, Any]:
    """Criterion, allocation and pattern, with what a solver stands for where nothing was said."""
    if solver is not None and criterion == "magnitude":
        criterion = getattr(solver, "criterion", criterion)
    one_by_one = solver is not None and not asks_for_mask(solver) and allocation is None
    if one_by_one and isinstance(pattern_of("unstructured" if pattern is None else pattern), Unstructured):
        allocation = "uniform"
    return {"criterion": criterion, "allocation": allocation, "pattern": pattern}


def informed(request: Request, statistics: Statistics | None, store: Store) -> Request:
    """A request whose criterion has the statistics it asks for, and the dims of every tensor.

    Raises:
        BadInput: statistics that nothing asks for, or OWL, which looks at a model.
    """
    if isinstance(request.allocation, OWL):
        raise BadInput("OWL looks at the blocks of a model and their inputs: pass calibration=, batches of real input.")
    if not isinstance(request.criterion, Bound):
        if statistics is not None:
            raise BadInput("statistics go with a criterion that asks for some; this one does not.")
        return request
    return bound(request, store.specs(), statistics)


def bound(request: Request, specs: Sequence[Spec], statistics: Statistics | None) -> Request:
    """A request whose criterion has dims, and statistics where it has none of its own or is given others."""
    c = request.criterion
    if not isinstance(c, Bound):
        return request
    dims = {s.name: (s.out_dim, s.in_dim) for s in specs}
    return replace(request, criterion=bind(c.criterion, c.statistics if statistics is None else statistics, dims))


def why_not_solved(request: Request, solver: AnySolver) -> str | None:
    """Why a solver cannot do what is asked, or ``None`` if it can."""
    name = solver_name(solver)
    if request.nonfinite != "error":
        return f"{name} computes with every weight, so all must be finite: leave nonfinite out"
    if asks_for_mask(solver):
        return None
    if request.criterion is not magnitude:
        return f"{name} decides by itself which weights go: leave criterion out"
    if not isinstance(request.pattern, NM | Unstructured):
        return f"{name} prunes single weights and N:M, not the pattern {request.pattern}"
    if request.threshold is not None:
        return f"{name} needs a count for every layer, which a threshold does not give: say sparsity="
    if request.allocation == "global" and isinstance(request.pattern, Unstructured):
        return f'{name} solves layer by layer and needs a count for each: say allocation="uniform" or another, not "global"'
    return None


def wanted_of(request: Request, solver: AnySolver | None) -> tuple[str, ...]:
    """The statistics that are to be measured.

    Raises:
        BadInput: there is nothing that needs data, or a criterion asks for a statistic that nobody measures.
    """
    c = request.criterion
    wanted = needs(c.criterion) if isinstance(c, Bound) and not c.statistics else ()
    if unknown := [w for w in wanted if w not in STATISTICS]:
        raise BadInput(
            f"the criterion {describe(c)} asks for {unknown[0]!r}, which calibration does not measure; it knows "
            f"{', '.join(STATISTICS)}. Measure it yourself, and pass it in statistics=."
        )
    wanted += solver_needs(solver) if solver is not None else ()
    if not wanted and not isinstance(request.allocation, OWL):
        raise BadInput(
            f"nothing that was asked for needs data: the criterion is {describe(c)}, and there is no solver. Leave calibration "
            'out, or say criterion="wanda" or another of secateur.criteria.'
        )
    return tuple(dict.fromkeys(wanted))
