"""The verbs: each finds the store for its target and composes what the layers below offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from secateur.calibrated import prune_calibrated
from secateur.carry import (
    Globs,
    Target,
    carry_out,
    check_out,
    count_rows,
    make_plan,
    opened,
    plan_of_masks,
    refuse_other,
)
from secateur.core.criteria import Criterion
from secateur.core.keys import nonzero
from secateur.core.owl import OWL
from secateur.core.patterns import Pattern
from secateur.core.plan import Plan
from secateur.core.request import Request
from secateur.core.saliency import Statistics
from secateur.core.solve.asked import AnySolver
from secateur.evaluate.calibrate import Calibration
from secateur.evaluate.informed import defaults_of, informed, with_solver
from secateur.files import Files
from secateur.pretrained import prune_folder
from secateur.report.report import Report
from secateur.stores import torch_prune
from secateur.stores.base import choose
from secateur.stores.memory import MemoryStore

Allocate = str | Mapping[str, float] | OWL | Callable[..., Mapping[str, int]]
NonFinite = Literal["error", "keep", "prune"]


def prune(
    target: Target,
    sparsity: float | None = None,
    *,
    threshold: float | None = None,
    criterion: str | Criterion = "magnitude",
    allocation: Allocate | None = None,
    pattern: str | Pattern | None = None,
    include: Globs = None,
    ignore: Globs = None,
    max_sparsity: float | Mapping[str, float] | None = None,
    min_keep: int = 0,
    nonfinite: NonFinite = "error",
    roles: Mapping[str, str] | None = None,
    calibration: Calibration | Iterable[Any] | None = None,
    statistics: Statistics | None = None,
    solver: str | AnySolver | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    files: Files | None = None,
) -> Report:
    r"""Prunes weights by magnitude, exactly: zeros written in place, or to the path ``out``.

    With allocation ``"global"`` the weights of all chosen tensors are one pool, and the ``round(sparsity * total)`` first in
    the order ``(zero first, |w|, name, flat index)`` become zero. Everything else about the target stays as it was: names,
    shapes, dtypes, keys, hooks, optimizer references, ties.

    Args:
        target: an ``nn.Module``; a dict of tensors; one tensor of any shape; or, with ``out``, the path of a safetensors
            file or of a folder that holds one or several with an index.
        sparsity: fraction of the chosen weights that is zero afterwards, 0 <= sparsity < 1; absolute, so pruning to 0.5
            twice is 0.5. May be left out with an N:M pattern, a mapping, or a threshold.
        threshold: instead of sparsity: weights with ``|w| < threshold`` go.
        criterion: ``"magnitude"``; `random` (a seed); or a function ``(weight, *, name, index) -> score`` of the weight's
            shape, higher is kept. With data also ``"wanda"``, ``"taylor"``, ``"snip"``, ``"obd"``, ``"fisher"``,
            ``"woodfisher"``, ``"movement"``, and functions that ask for statistics by name; see `secateur.criteria`.
        allocation: how many each tensor loses; by default ``"global"``, but ``"uniform"`` where rows compete or a solver works
            layer by layer. ``"global"``: one threshold over all. ``"uniform"`` (``"local"``): the same
            share everywhere. ``"uniform_plus"``: uniform, but a first convolution stays dense and the last layer keeps
            20 % (arXiv:1902.09574). ``"er"``, ``"erk"``: Erdős–Rényi densities (arXiv:1911.11134). ``"lamp"``
            (arXiv:2010.07611). ``"owl"``, `OWL`, with calibration (arXiv:2310.05175). A mapping of globs to sparsities, tensors
            without a match getting ``sparsity``. A function ``(rows, sparsity) -> {name: count}``.
        pattern: by default ``"unstructured"``, but of Wanda ``"row"``: single weights, each against those of its own output row
            (`Row`). ``"2:4"`` or `NM` (N of every M kept, along the input dimension); ``"4x4"`` or `Block`; ``"channel"`` or
            `Channel`; ``"head:12"`` or `Head`, of 12 heads a layer of attention.
        include, ignore: globs over tensor and module names. They choose among weights of layers; only a full name adds a
            bias, norm or embedding.
        max_sparsity: cap on every tensor's sparsity, or globs to caps; ``{"conv1*": 0}`` keeps a layer dense. The total
            stays exact.
        min_keep: number of weights that every tensor keeps at least.
        nonfinite: ``"error"`` refuses NaN and Inf; ``"keep"`` keeps them, ``"prune"`` prunes them first.
        roles: for dicts and files: globs to roles, where names do not tell what a tensor is.
        calibration: batches of real input, or a `Calibration`, for a criterion or solver that needs data. A model is then pruned
            block by block, each with the inputs that the pruned blocks before it give; a criterion made of gradients, and
            allocation ``"global"``, take statistics of the dense network instead. On an error all weights are as before.
        statistics: instead: what `calibrate` returned, for a criterion.
        solver: also moves the weights that stay: ``"sparsegpt"`` (arXiv:2301.00774), ``"exactobs"`` (arXiv:2208.11580),
            ``"obs"``, ``"woodfisher"`` (arXiv:2004.14340), ``"refit"`` (least squares for the criterion's mask), one of
            `secateur.solvers`, or a function. Needs ``calibration``.
        out: path to write to, for a file or folder; must not exist unless ``overwrite``.
        overwrite: replace what is at ``out``.
        files: of a path: with how much memory, in how many processes, and whether to go on with an interrupted run; see `Files`.

    Returns:
        A `Report` of what was counted while writing.

    Raises:
        BadInput: a request that cannot be meant, or a tensor that cannot be pruned, by name. Nothing has been touched.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> report = secateur.prune(model, 0.5)
        >>> report.zeros, report.total
        (450, 900)
        >>> secateur.prune(model, 0.5).zeros      # absolute: it is at 0.5 already
        450
    """
    data = calibration is not None or statistics is not None
    solve, calibration = with_solver(solver, calibration, statistics)
    how = defaults_of(solve, criterion, allocation, pattern)
    request = Request.of(
        sparsity,
        threshold=threshold,
        max_sparsity=max_sparsity,
        min_keep=min_keep,
        nonfinite=nonfinite,
        data=data,
        **how,
    )
    if calibration is not None:
        check_out(target, out, overwrite)
        if isinstance(target, str | PathLike):
            return prune_folder(Path(target), request, calibration, solve, include, ignore, roles, out, overwrite)
        return prune_calibrated(target, request, calibration, solve, include, ignore, roles)
    check_out(target, out, overwrite, files is not None and (files.in_place or files.resume))
    with opened(target, roles, files) as store:
        request = informed(request, statistics, store)
        if isinstance(target, str | PathLike):
            from secateur.carry_files import prune_files

            return prune_files(store, request, include, ignore, out, overwrite, files)
        return carry_out(make_plan(store, request, include, ignore), store, target)


def plan(
    target: Target,
    sparsity: float | None = None,
    *,
    threshold: float | None = None,
    criterion: str | Criterion = "magnitude",
    allocation: Allocate | None = None,
    pattern: str | Pattern | None = None,
    include: Globs = None,
    ignore: Globs = None,
    max_sparsity: float | Mapping[str, float] | None = None,
    min_keep: int = 0,
    nonfinite: NonFinite = "error",
    roles: Mapping[str, str] | None = None,
    statistics: Statistics | None = None,
    files: Files | None = None,
) -> Plan:
    """What `prune` would do with the same arguments, as data; nothing is touched.

    Args:
        target, sparsity, threshold, criterion, allocation, pattern, include, ignore, max_sparsity, min_keep, nonfinite,
            roles, statistics, files: as for `prune`; a path needs no ``out`` here.

    Returns:
        A `Plan`: one row a tensor with its count, its cut and its threshold. Save it with `save_plan`, carry it out with
        `apply`.

    Raises:
        BadInput: as `prune`.

    Example:
        >>> import torch, secateur
        >>> w = {"fc.weight": torch.tensor([[4.0, -1.0, 3.0, 2.0]])}
        >>> plan = secateur.plan(w, 0.5)
        >>> plan.rows[0].prune, plan.rows[0].threshold      # two go; 3.0 is the smallest that survives
        (2, 3.0)
        >>> secateur.apply(plan, w).zeros
        2
    """
    request = Request.of(
        sparsity, threshold=threshold, criterion=criterion, allocation=allocation, pattern=pattern,
        max_sparsity=max_sparsity, min_keep=min_keep, nonfinite=nonfinite, data=statistics is not None,
    )  # fmt: skip
    with opened(target, roles, files) as store:
        request = informed(request, statistics, store)
        if isinstance(target, str | PathLike):
            from secateur.carry_files import plan_files

            return plan_files(store, request, include, ignore, files)
        return make_plan(store, request, include, ignore)


def apply(
    plan_or_masks: Plan | Mapping[str, Tensor],
    target: Target,
    *,
    roles: Mapping[str, str] | None = None,
    out: str | PathLike[str] | None = None,
    overwrite: bool = False,
    files: Files | None = None,
) -> Report:
    """Carries out a plan, or writes zeros where masks are ``False``.

    A plan is counted against the target first. If a tensor is missing, has another shape or dtype, or its values give
    another count than the plan's row says, nothing is touched.

    Args:
        plan_or_masks: a `Plan`; or a dict of bool tensors, ``True`` = keep, by name and of the tensors' shapes.
        target: as for `prune`.
        roles, out, overwrite, files: as for `prune`.

    Returns:
        A `Report` of what was counted while writing.

    Raises:
        PlanMismatch: made for other tensors than these.
        BadInput: as `prune`.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Linear(2, 1)
        >>> secateur.apply({"weight": torch.tensor([[True, False]])}, model).zeros
        1
    """
    check_out(target, out, overwrite, files is not None and (files.in_place or files.resume))
    with opened(target, roles, files) as store:
        made = plan_or_masks if isinstance(plan_or_masks, Plan) else plan_of_masks(plan_or_masks, store)
        if isinstance(target, str | PathLike):
            from secateur.carry_files import apply_files

            return apply_files(made, store, out, overwrite, files)
        refuse_other(made, store)
        return carry_out(made, store, target)


def inspect(
    target: Target, *, include: Globs = None, ignore: Globs = None, roles: Mapping[str, str] | None = None
) -> Report:
    """Counts zeros, tensor by tensor, and says which tensors `prune` would choose and why it skips the others.

    Args:
        target: as for `prune`; a path needs no ``out``.
        include, ignore, roles: as for `prune`.

    Returns:
        A `Report`. Nothing is touched.

    Raises:
        BadInput: a target that holds no tensors, or a filter that matches nothing.

    Example:
        >>> import torch, secateur
        >>> report = secateur.inspect(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
        >>> for row in report:
        ...     print(row.name, row.role, "-", row.skip)
        0.bias bias - a bias
        0.weight linear - None
        1.bias bias - a bias
        1.weight norm - a norm or another per-channel scale
    """
    with opened(target, roles) as store:
        specs = store.specs()
        if include is not None or ignore is not None or any(s.skip is None for s in specs):
            specs = choose(specs, include, ignore)
        return Report(count_rows(specs, store), {})


def masks(
    target: Target, *, include: Globs = None, ignore: Globs = None, roles: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """``weight != 0`` of every chosen tensor: on a pruned network its masks, on a dense one ``True`` but for natural zeros.

    Args:
        target, include, ignore, roles: as for `prune`; a path needs no ``out``.

    Returns:
        ``{name: bool tensor of the weight's shape}``, ``True`` = keep, fit for `apply`.

    Raises:
        BadInput: as `prune`.

    Example:
        >>> import torch, secateur
        >>> secateur.masks({"fc.weight": torch.tensor([[0.0, 2.0]])})
        {'fc.weight': tensor([[False,  True]])}
    """
    with opened(target, roles) as store:
        chosen = [s for s in choose(store.specs(), include, ignore) if s.skip is None]
        store.check(chosen)
        if isinstance(store, MemoryStore):
            return {s.name: store.like(s, nonzero(store.values(s))) for s in chosen}
        return {s.name: nonzero(part.tensor) for s in chosen for part in store.parts(s, "whole")}


def from_torch_prune(model: nn.Module) -> Report:
    """Turns a model under `torch.nn.utils.prune` into plain parameters with exact zeros, in place.

    The parameter that trained as ``weight_orig`` is registered as ``weight`` again, the same object, so optimizers go on
    holding it; masks and their hooks are gone, keys are those of a fresh model.

    Args:
        model: a module with at least one tensor under `torch.nn.utils.prune`.

    Returns:
        `inspect` of the model afterwards.

    Raises:
        BadInput: nothing there is pruned that way, or a mask holds other values than 0 and 1. Nothing has been touched.

    Example:
        >>> import torch, secateur
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 4), "weight", amount=0.5)
        >>> secateur.from_torch_prune(layer).zeros, sorted(layer.state_dict())
        (8, ['bias', 'weight'])
    """
    torch_prune.bake(model)
    return inspect(model)
