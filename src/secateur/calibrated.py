"""Pruning with data: block by block where counts are known beforehand, else in one go on the dense network's statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.carry import Globs, carry_out, count_rows, plan_over
from secateur.core.criteria import describe, magnitude
from secateur.core.heads import Head
from secateur.core.make import Request
from secateur.core.owl import OWL, outliers
from secateur.core.patterns import NM, Unstructured
from secateur.core.plan import Plan, keep_mask
from secateur.core.saliency import Bound, Statistics, bind, needs, wanda
from secateur.core.solve import NAMED
from secateur.core.solve.asked import AnySolver, asks_for_mask, solver_name, solver_needs, solver_of
from secateur.core.spelling import describe_allocation, pattern_of
from secateur.core.types import Part, Spec
from secateur.errors import BadInput, NotDefined
from secateur.evaluate.blocks import Walk, find_blocks
from secateur.evaluate.calibrate import INPUTS, Calibration, Layer, Step, measure, watched
from secateur.evaluate.layers import solve_layer, write_layer
from secateur.evaluate.mode import only_training
from secateur.evaluate.watch import why_unseen
from secateur.report.report import Report, ReportRow
from secateur.stores.base import Store, choose
from secateur.stores.memory import MemoryStore


def prune_calibrated(
    target: object,
    request: Request,
    calibration: Calibration,
    solver: AnySolver | None,
    include: Globs,
    ignore: Globs,
    roles: Mapping[str, str] | None,
) -> Report:
    """Prunes a model with statistics of its layers, and rewrites what stays if a solver says so.

    On an error every weight is as it was before.

    Raises:
        BadInput: a target that cannot be run, blocks that cannot be found, a calibration that is empty or not finite.
        NotDefined: a solver with a criterion, pattern or allocation that it has no use for.
    """
    if not isinstance(target, nn.Module):
        raise BadInput(
            f"calibration runs the model, and a {type(target).__name__} cannot be run: load it and pass the nn.Module. From the "
            "command line a folder is loaded for you: secateur prune FOLDER --calibration TEXT."
        )
    if solver is not None and (reason := why_not_solved(request, solver)):
        raise NotDefined(f"{reason}.")
    job = _Job.prepare(target, request, calibration, solver, include, ignore, roles)
    with torch.no_grad(), only_training(target), job.undone_on_error():
        for stage in job.stages():
            job.carry_out(stage)
    return job.report()


def with_solver(solver: object, calibration: object, statistics: object) -> tuple[AnySolver | None, Calibration | None]:
    """The solver and the calibration that were asked for, resolved.

    Raises:
        BadInput: data given twice, or a solver without any.
    """
    if calibration is not None and statistics is not None:
        raise BadInput("calibration and statistics are two answers to one question: give one of them.")
    found = None if solver is None else solver_of(solver, NAMED)
    if found is not None and calibration is None:
        raise BadInput(
            f"the solver {solver_name(found)} works on what data tells of each layer: pass calibration=, batches of real input."
        )
    return found, None if calibration is None else Calibration.of(calibration)


def defaults_of(solver: AnySolver | None, criterion: Any, allocation: Any, pattern: Any) -> dict[str, Any]:
    """Criterion, allocation and pattern, with what a solver stands for where nothing was said."""
    if solver is not None and criterion == "magnitude":
        criterion = getattr(solver, "criterion", criterion)
    one_by_one = solver is not None and not asks_for_mask(solver) and allocation is None
    if one_by_one and isinstance(pattern_of("unstructured" if pattern is None else pattern), Unstructured):
        allocation = "uniform"
    return {"criterion": criterion, "allocation": allocation, "pattern": pattern}


def informed(request: Request, statistics: Statistics | None, store: Store) -> Request:
    """A request whose criterion has the statistics it asks for."""
    if statistics is None:
        return request
    if not isinstance(request.criterion, Bound):
        raise BadInput("statistics go with a criterion that asks for some; this one does not.")
    dims = {s.name: (s.out_dim, s.in_dim) for s in store.specs()}
    return replace(request, criterion=bind(request.criterion.criterion, statistics, dims))


def why_not_solved(request: Request, solver: AnySolver) -> str | None:
    """Why a solver cannot do what is asked, or ``None`` if it can."""
    name = solver_name(solver)
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


@dataclass(frozen=True)
class _Stage:
    """Some tensors whose statistics are there, to be pruned together."""

    name: str
    number: int
    of: int
    specs: list[Spec]
    statistics: Statistics
    since: float


@dataclass
class _Job:
    model: nn.Module
    store: MemoryStore
    request: Request
    calibration: Calibration
    solver: AnySolver | None
    specs: list[Spec]
    wanted: tuple[str, ...]
    draft: Plan
    rows: dict[str, ReportRow] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def prepare(
        model: nn.Module, request: Request, calibration: Calibration, solver: AnySolver | None, include: Globs, ignore: Globs,
        roles: Mapping[str, str] | None,
    ) -> _Job:  # fmt: skip
        """Everything that can be refused before the model runs is refused here."""
        store = MemoryStore(model, roles=roles)
        specs = choose(store.specs(), include, ignore)
        store.check(specs)
        criterion = request.criterion
        wanted = needs(criterion.criterion) if isinstance(criterion, Bound) else ()
        wanted += solver_needs(solver) if solver is not None else ()
        if any(w in INPUTS for w in wanted):
            specs = [_seen_only(s) for s in specs]
        allocation = request.allocation
        if isinstance(allocation, OWL):
            specs = [_seen_only(s) for s in specs]
            request = replace(
                request, allocation=_outlier_counts(model, store, specs, calibration, request, allocation)
            )
        made = plan_over(specs, store, replace(request, criterion=magnitude), stacklevel=6)
        found = {r.name: r for r in made.rows}
        specs = [replace(s, skip=found[s.name].skip) for s in specs]  # what cannot carry the pattern is skipped by now
        return _Job(model, store, request, calibration, solver, specs, tuple(dict.fromkeys(wanted)), made)

    @property
    def chosen(self) -> list[Spec]:
        """The tensors to prune."""
        return [s for s in self.specs if s.skip is None]

    @property
    def in_one_go(self) -> bool:
        """Whether everything must be known of all tensors before one of them is pruned."""
        r = self.request
        pooled = isinstance(r.pattern, Head) or (r.allocation == "global" and not isinstance(r.pattern, NM))
        return pooled or self.calibration.blocks == "whole" or any(w not in INPUTS for w in self.wanted)

    def stages(self) -> Iterator[_Stage]:
        """The tensors with their statistics; those of a block are measured when the blocks before it are pruned."""
        began = time.perf_counter()
        if self.in_one_go:
            found = measure(self.model, self.store, self.chosen, self.calibration, self.wanted, self.request.pattern)
            yield _Stage("all layers", 1, 1, self.chosen, found, began)
            return
        blocks = find_blocks(self.model, self.calibration.blocks, {s.name: s.numel for s in self.chosen})
        held = {b.name: [s for s in self.chosen if b.holds(s.name)] for b in blocks}
        self._leave_out({s.name for some in held.values() for s in some})
        walk = Walk(self.model, blocks, iter(self.calibration.batches), self.calibration.forward)
        for i, block in enumerate(blocks):
            specs = held[block.name]
            if specs:
                with watched(self.store, specs, "hessian" in self.wanted) as watch:
                    walk.observe(i)
                found = {name: seen.statistics() for name, seen in watch.seen.items()}
                yield _Stage(block.name, i + 1, len(blocks), specs, found, began)
            if i + 1 < len(blocks):
                walk.advance(i)
            began = time.perf_counter()

    def _leave_out(self, inside: set[str]) -> None:
        """Tensors outside the blocks are skipped, unless they were asked for by name."""
        for i, s in enumerate(self.specs):
            if s.skip is None and s.name not in inside:
                if s.named:
                    raise BadInput(
                        f"{s} lies outside the blocks, whose inputs alone are observed: leave it out, or say "
                        'secateur.Calibration(batches, blocks="whole").'
                    )
                self.specs[i] = replace(s, skip="outside the blocks that are pruned one after another")

    def carry_out(self, stage: _Stage) -> None:
        """Prunes the tensors of a stage."""
        pools = [stage.specs] if self.in_one_go else [[s] for s in stage.specs]
        layers = [layer for specs in pools for layer in self._one(specs, stage)]
        if self.calibration.progress is not None:
            self.calibration.progress(
                Step(stage.name, stage.number, stage.of, time.perf_counter() - stage.since, tuple(layers))
            )

    def _one(self, specs: list[Spec], stage: _Stage) -> list[Layer]:
        """Prunes tensors that are selected together."""
        began = time.perf_counter()
        if self.solver is not None and not asks_for_mask(self.solver):
            return [self._solve(s, stage, None) for s in specs]
        made = plan_over(specs, self.store, self._asked(stage), stacklevel=7)
        self.notes += made.warnings
        if self.solver is not None:
            masks = {r.name: keep_mask(made, self._part(r.spec)) for r in made.chosen}
            return [self._solve(s, stage, masks[s.name]) for s in specs]
        self._keep([s.name for s in specs] + [m.name for r in made.chosen for m in r.followers])
        report = carry_out(made, self.store, None, False, self.model)
        self.notes += [w for w in report.warnings if w not in self.notes]
        self.rows |= {r.name: r for r in report.rows}
        each = (time.perf_counter() - began) / max(1, len(specs))
        return [Layer(r.name, r.numel, r.zeros or 0, each) for r in report.chosen]

    def _asked(self, stage: _Stage) -> Request:
        """The request for the tensors of a stage: their counts are those of the whole, their scores the stage's."""
        r = self.request
        if isinstance(r.criterion, Bound):
            dims = {s.name: (s.out_dim, s.in_dim) for s in stage.specs}
            r = replace(r, criterion=bind(r.criterion.criterion, stage.statistics, dims))
        if self.in_one_go or isinstance(r.pattern, NM):
            return r
        asked = {row.name: row.asked for row in self.draft.rows}

        def counts(rows: Sequence[Any], sparsity: float) -> dict[str, int]:
            return {row.name: asked[row.name] or 0 for row in rows}

        return replace(r, allocation=counts, max_sparsity=None, min_keep=0)

    def _part(self, spec: Spec) -> Part:
        return next(iter(self.store.parts(spec, "whole")))

    def _solve(self, spec: Spec, stage: _Stage, mask: Tensor | None) -> Layer:
        """Solves one layer and writes it."""
        began = time.perf_counter()
        assert self.solver is not None
        row = next(r for r in self.draft.rows if r.name == spec.name)
        self._keep([spec.name])
        tensor, measured = self._part(spec).tensor, stage.statistics[spec.name]
        count = row.asked or 0 if isinstance(self.request.pattern, NM) else max(row.asked or 0, row.zeros or 0)
        solved = solve_layer(self.solver, spec, tensor, measured, self.request.pattern, count, mask)
        write_layer(tensor, solved)
        self.rows[spec.name] = replace(count_rows([spec], self.store)[0], asked=row.asked)
        zeros = self.rows[spec.name].zeros or 0
        return Layer(spec.name, spec.numel, zeros, time.perf_counter() - began, solved.loss, solved.damping)

    def _keep(self, names: Sequence[str]) -> None:
        """Copies of tensors that are about to be written."""
        by_name = {n: s for s in self.store.specs() for n in (s.name, *s.aliases)}
        for name in names:
            tensor = self._part(by_name[name]).tensor
            self._kept.append((tensor, tensor.clone()))

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """On an error every tensor that was written is put back."""
        try:
            yield
        except BaseException:
            for tensor, before in reversed(self._kept):
                tensor.copy_(before)
            raise
        finally:
            self._kept.clear()

    def _method(self) -> str:
        """What decided which weights go, and what moved the others."""
        criterion = describe(self.request.criterion)
        if self.solver is None:
            return criterion
        return f"{criterion} + {solver_name(self.solver)}" if asks_for_mask(self.solver) else solver_name(self.solver)

    def report(self) -> Report:
        """What was counted."""
        rest = count_rows([s for s in self.specs if s.name not in self.rows], self.store)
        rows = sorted((*self.rows.values(), *rest), key=lambda r: r.name)
        what = {
            "sparsity": self.draft.sparsity, "threshold": self.draft.threshold,
            "criterion": self._method(),
            "allocation": self.draft.allocation, "pattern": str(self.draft.pattern),
        }  # fmt: skip
        return Report(tuple(rows), what, tuple(dict.fromkeys(self.notes)))


def _outlier_counts(
    model: nn.Module, store: MemoryStore, specs: Sequence[Spec], calibration: Calibration, request: Request, how: OWL
) -> Callable[..., Mapping[str, int]]:
    """OWL's counts, from one look at the dense network, as an allocation function of its name."""
    chosen = [s for s in specs if s.skip is None]
    asked = calibration.blocks if calibration.blocks != "whole" else "auto"
    blocks = find_blocks(model, asked, {s.name: s.numel for s in chosen})
    held = {b.name: [s for s in chosen if b.holds(s.name)] for b in blocks}
    held |= {s.name: [s] for s in chosen if not any(b.holds(s.name) for b in blocks)}
    measured = measure(model, store, chosen, calibration, ("input_norm",), request.pattern)
    shares = {}
    for name, some in held.items():
        scores = [
            wanda(store.entry(s).tensor.detach(), input_norm=measured[s.name]["input_norm"], in_dim=s.in_dim or 0)
            for s in some
        ]
        if some:
            shares[name] = outliers(scores, how.outlier)

    def owl(rows: Sequence[Any], sparsity: float) -> Mapping[str, int]:
        sizes, zeros = {r.name: r.numel for r in rows}, {r.name: r.zeros or 0 for r in rows}
        inside = {b: [s.name for s in held[b] if s.name in sizes] for b in shares}
        return how.counts(shares, inside, sizes, zeros, sparsity)

    owl.__name__ = describe_allocation(how)
    return owl


def _seen_only(spec: Spec) -> Spec:
    """A tensor whose layer's inputs cannot be observed is skipped, or refused where the user named it."""
    why = why_unseen(spec) if spec.skip is None else None
    if why and spec.named:
        raise BadInput(f"{spec}: {why}. Leave it out, or take a criterion that needs no data.")
    return replace(spec, skip=why) if why else spec
