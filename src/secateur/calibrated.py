"""Pruning with data: block by block where counts are known beforehand, else in one go on the dense network's statistics."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from secateur.carry import Globs, carry_out, count_rows
from secateur.core.criteria import describe
from secateur.core.heads import Head
from secateur.core.make import counted, eligible, make, odd_rows
from secateur.core.owl import OWL
from secateur.core.patterns import NM
from secateur.core.plan import Row, keep_mask
from secateur.core.request import Request
from secateur.core.saliency import Bound, Statistics
from secateur.core.solve.asked import AnySolver, asks_for_mask, solver_name
from secateur.core.spelling import describe_allocation
from secateur.core.types import Part, Spec
from secateur.errors import BadInput, NotDefined, NothingChosen, SecateurWarning
from secateur.evaluate.blocks import Block, find_blocks
from secateur.evaluate.calibrate import INPUTS, Calibration, Layer, Step, measure, watched
from secateur.evaluate.informed import bound, wanted_of, why_not_solved
from secateur.evaluate.layers import solve_layer, write_layer
from secateur.evaluate.mode import only_training
from secateur.evaluate.outliers import outlier_counts
from secateur.evaluate.reruns import Reruns
from secateur.evaluate.walk import Walk
from secateur.evaluate.watch import too_few, why_unseen
from secateur.report.report import Report, ReportRow
from secateur.stores.base import choose, matches
from secateur.stores.followers import check_followers
from secateur.stores.memory import MemoryStore


def prune_calibrated(
    target: object,
    request: Request,
    calibration: Calibration,
    solver: AnySolver | None,
    include: Globs,
    ignore: Globs,
    roles: Mapping[str, str] | None,
    *,
    undo: bool = True,
    stacklevel: int = 3,
) -> Report:
    """Prunes a model with statistics of its layers, and rewrites what stays if a solver says so.

    With ``undo`` every weight is as it was before on an error, for which copies of those that are written are held.

    Raises:
        BadInput: a target that cannot be run, blocks that cannot be found, a calibration that is empty, not finite, or of no
            use to what was asked.
        NotDefined: a solver with a criterion, pattern or allocation that it has no use for.
    """
    if not isinstance(target, nn.Module):
        raise BadInput(
            f"calibration runs the model, and a {type(target).__name__} cannot be run: load it and pass the nn.Module. From the "
            "command line a folder is loaded for you: secateur prune FOLDER --calibration TEXT."
        )
    if solver is not None and (reason := why_not_solved(request, solver)):
        raise NotDefined(f"{reason}.")
    told: set[str] = set()

    def tell(notes: Sequence[str]) -> None:
        for text in dict.fromkeys(notes):
            if text not in told:
                warnings.warn(text, SecateurWarning, stacklevel=stacklevel + 1)
        told.update(notes)

    with torch.no_grad():
        job = _Job.prepare(target, request, calibration, solver, include, ignore, roles)
        job.undo = undo
        tell(job.notes)
        with only_training(target), job.undone_on_error():
            job.run()
        tell(job.notes)
        return job.report()


def left_out(specs: Sequence[Spec], why: Callable[[Spec], str | None]) -> tuple[list[Spec], list[str]]:
    """Skips the chosen tensors that there is a reason against, with one warning; refuses one that the user named."""
    out, odd = [], defaultdict(list)
    for s in specs:
        reason = why(s) if s.skip is None else None
        if reason and s.named:
            raise BadInput(
                f"{s} was asked for by name, but {reason}. Leave it out, or take a criterion that needs no data."
            )
        if reason:
            odd[reason].append(s.name)
        out.append(replace(s, skip=reason) if reason else s)
    count = sum(map(len, odd.values()))
    what = "; ".join(f"{', '.join(n[:3])}{', …' if len(n) > 3 else ''} ({len(n)}): {why}" for why, n in odd.items())
    if odd and all(s.skip for s in out):
        raise NothingChosen(f"no tensor can be pruned with this calibration: {what}.")
    return out, [f"{count} tensor{'s stay' if count > 1 else ' stays'} dense: {what}"] if odd else []


@dataclass
class _Job:
    """One call of `prune_calibrated`: what is to be done, and what was done so far.

    Attributes:
        specs: all tensors of the model, with the reasons why some are skipped.
        blocks: those of the network, or none where they do not matter.
        wanted: the statistics that are measured.
        asked: the zeros of every chosen tensor, and how many it is asked to lose.
        rows: of the report, for what was written.
        notes: what the user should know; ``said``: what they have been told of it already.
        undo: whether copies are held of what is written.
    """

    model: nn.Module
    store: MemoryStore
    request: Request
    calibration: Calibration
    solver: AnySolver | None
    specs: list[Spec]
    blocks: Sequence[Block]
    wanted: tuple[str, ...]
    asked: dict[str, Row]
    notes: list[str]
    undo: bool = True
    said: list[str] = field(default_factory=list)
    rows: dict[str, ReportRow] = field(default_factory=dict)
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @staticmethod
    def prepare(
        model: nn.Module, request: Request, calibration: Calibration, solver: AnySolver | None, include: Globs, ignore: Globs,
        roles: Mapping[str, str] | None,
    ) -> _Job:  # fmt: skip
        """Everything that can be refused before the model runs is refused here."""
        wanted, owl = wanted_of(request, solver), request.allocation
        store = MemoryStore(model, roles=roles)
        specs = choose(store.specs(), include, ignore)
        store.check(specs)
        specs, notes = eligible(specs, request.pattern)
        looks = isinstance(owl, OWL) or any(w in INPUTS for w in wanted)
        one_go = _in_one_go(request, calibration, wanted)
        blocks: Sequence[Block] = []
        if calibration.blocks != "whole" and (isinstance(owl, OWL) or not one_go):
            sizes = {s.name: s.numel for s in specs if s.skip is None and why_unseen(s) is None}
            blocks = find_blocks(model, calibration.blocks, sizes)

        def why(spec: Spec) -> str | None:
            return (why_unseen(spec) if looks else None) or (None if one_go else _outside(spec, blocks))

        specs, dense = left_out(specs, why)
        notes += dense
        known = replace(request, allocation="uniform") if isinstance(owl, OWL) else request
        rows = {r.name: r for r in counted(specs, store.parts, known, matches, store.sum)}
        if isinstance(owl, OWL):
            chosen = [s for s in specs if s.skip is None]
            assert request.sparsity is not None
            counts = outlier_counts(
                owl, model, store, chosen, blocks, calibration, list(rows.values()), request.sparsity
            )
            rows = {n: replace(r, asked=counts[n]) for n, r in rows.items()}
        return _Job(model, store, request, calibration, solver, specs, blocks, wanted, rows, notes)

    @property
    def chosen(self) -> list[Spec]:
        """The tensors to prune."""
        return [s for s in self.specs if s.skip is None]

    @property
    def in_one_go(self) -> bool:
        """Whether everything must be known of all tensors before one of them is pruned."""
        return _in_one_go(self.request, self.calibration, self.wanted)

    def run(self) -> None:
        """Prunes everything. The statistics of a block are measured when the blocks before it are pruned, and gone when it is."""
        began = time.perf_counter()
        if self.in_one_go:
            pattern = self.request.pattern
            found = measure(self.model, self.store, self.chosen, self.calibration, self.wanted, pattern, self.notes)
            self._tell("all layers", (1, 1), began, self._prune(self.chosen, found))
            return
        walk = self._walk()
        held = {i: [s for s in self.chosen if b.holds(s.name)] for i, b in enumerate(walk.blocks)}
        order, short = [i for i, some in held.items() if some], list[str]()
        for i, block in enumerate(walk.blocks[: order[-1] + 1]):
            layers = self._prune(held[i], self._observed(walk, i, held[i], short)) if held[i] else []
            if i < order[-1]:
                walk.advance(i)
            if layers:
                self._tell(block.name, (order.index(i) + 1, len(order)), began, layers)
                began = time.perf_counter()
        self.notes += too_few(short)

    def _walk(self) -> Walk | Reruns:
        """The way through the network."""
        how = self.calibration
        if how.blocks != "layers":
            return Walk(self.model, self.blocks, how.batches, how.forward)
        weights = [(s, self.store.entry(s).tensor) for s in self.chosen]
        return Reruns(self.model, self.blocks, how.batches, how.forward, weights)

    def _observed(self, walk: Walk | Reruns, number: int, specs: Sequence[Spec], short: list[str]) -> Statistics:
        """The statistics of a block's layers."""
        with watched(self.store, specs, "hessian" in self.wanted) as watch:
            walk.observe(number)
        short += watch.short
        return watch.statistics()

    def _tell(self, block: str, number: tuple[int, int], since: float, layers: Sequence[Layer]) -> None:
        if self.calibration.progress is not None:
            self.calibration.progress(Step(block, *number, time.perf_counter() - since, tuple(layers)))

    def _prune(self, specs: Sequence[Spec], statistics: Statistics) -> list[Layer]:
        """Prunes tensors whose statistics are there: all together, or one by one."""
        pools = [specs] if self.in_one_go else [[s] for s in specs]
        return [layer for pool in pools for layer in self._one(pool, statistics)]

    def _one(self, specs: Sequence[Spec], statistics: Statistics) -> list[Layer]:
        """Prunes tensors that are selected together."""
        began = time.perf_counter()
        if self.solver is not None and not asks_for_mask(self.solver):
            return [self._solve(self.solver, s, statistics[s.name], None) for s in specs]
        made = make(specs, self.store.parts, self._asked(specs, statistics), matches, self.store.sum)
        check_followers(made, self.store)
        self.notes += made.warnings
        if self.solver is not None:
            masks = {r.name: keep_mask(made, self._part(r.spec)) for r in made.chosen}
            return [self._solve(self.solver, s, statistics[s.name], masks[s.name]) for s in specs]
        self._keep([s.name for s in specs] + [m.name for r in made.chosen for m in r.followers])
        report = carry_out(made, self.store, self.model)
        self.said += [w for w in report.warnings if w not in made.warnings]
        self.rows |= {r.name: r for r in report.rows}
        each = (time.perf_counter() - began) / max(1, len(specs))
        return [Layer(r.name, r.numel, r.zeros or 0, each) for r in report.chosen]

    def _asked(self, specs: Sequence[Spec], statistics: Statistics) -> Request:
        """The request for some tensors: their counts are those of the whole, their scores made of these statistics."""
        own = isinstance(self.request.criterion, Bound) and bool(self.request.criterion.statistics)
        r = bound(self.request, specs, None if own else statistics)
        if isinstance(r.pattern, NM) or (self.in_one_go and not isinstance(r.allocation, OWL)):
            return r

        def counts(rows: Sequence[Row], sparsity: float) -> dict[str, int]:
            return {row.name: self.asked[row.name].asked or 0 for row in rows}

        return replace(r, allocation=counts, max_sparsity=None, min_keep=0)

    def _part(self, spec: Spec) -> Part:
        return next(iter(self.store.parts(spec, "whole")))

    def _solve(self, solver: AnySolver, spec: Spec, measured: Mapping[str, Tensor], mask: Tensor | None) -> Layer:
        """Solves one layer and writes it."""
        began = time.perf_counter()
        row, tensor, pattern = self.asked[spec.name], self._part(spec).tensor, self.request.pattern
        count = row.asked or 0 if isinstance(pattern, NM) else max(row.asked or 0, row.zeros or 0)
        count = count if mask is None else int((~mask).sum())
        self._keep([spec.name])
        solved = solve_layer(solver, spec, tensor, measured, pattern, count, mask)
        write_layer(tensor, solved)
        self.rows[spec.name] = replace(count_rows([spec], self.store)[0], asked=row.asked)
        zeros = self.rows[spec.name].zeros or 0
        self.notes += odd_rows([replace(row, prune=zeros)]) if mask is None else []
        return Layer(spec.name, spec.numel, zeros, time.perf_counter() - began, solved.loss, solved.damping)

    def _keep(self, names: Sequence[str]) -> None:
        """Copies of tensors that are about to be written, in the machine's own memory."""
        if self.undo:
            by_name = {n: s for s in self.store.specs() for n in (s.name, *s.aliases)}
            tensors = [self._part(by_name[n]).tensor for n in names]
            self._kept += [(t, t.to("cpu", copy=True)) for t in tensors]

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
        r = self.request
        what = {
            "sparsity": r.sparsity, "threshold": r.threshold, "criterion": self._method(),
            "allocation": describe_allocation(r.allocation), "pattern": str(r.pattern),
        }  # fmt: skip
        return Report(tuple(rows), what, tuple(dict.fromkeys((*self.notes, *self.said))))


def _in_one_go(request: Request, calibration: Calibration, wanted: Sequence[str]) -> bool:
    """Whether everything must be known of all tensors before one of them is pruned: where they are one pool or heads, and for
    statistics of the whole network."""
    pooled = request.allocation == "global" and not isinstance(request.pattern, NM)
    whole = calibration.blocks == "whole" or any(w not in INPUTS for w in wanted)
    return pooled or whole or isinstance(request.pattern, Head)


def _outside(spec: Spec, blocks: Sequence[Block]) -> str | None:
    """Why a tensor is not pruned block by block, or ``None`` if it is."""
    if any(b.holds(spec.name) for b in blocks):
        return None
    return 'outside the blocks, whose inputs alone are observed (Calibration(…, blocks="whole") observes all)'
