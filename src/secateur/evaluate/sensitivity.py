"""Which layers can bear what: each is pruned alone, to one sparsity after another, and the network is measured every time."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.allocate import check_sparsity
from secateur.core.criteria import describe
from secateur.core.make import eligible, make
from secateur.core.patterns import NM, Pattern
from secateur.core.request import Request
from secateur.core.spelling import pattern_of
from secateur.core.types import Spec
from secateur.errors import BadInput, NothingChosen, SecateurWarning
from secateur.stores.base import choose, globs, matches
from secateur.stores.followers import check_followers
from secateur.stores.memory import MemoryStore
from secateur.train.randomness import check_seed
from secateur.train.rounds import locked

from .fingerprint import digest
from .sensitivity_cells import Cells, Evaluate, Meter, measured
from .sensitivity_facts import Layer, Piece, Sensitivity

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""What every layer is pruned to, unless asked otherwise."""
STILL = (
    "{} did not move at all, in no layer and at no sparsity: it may hide damage. Take a finer metric (a loss instead of an "
    "accuracy), or more data."
)
Globs = str | Sequence[str] | None
Progress = Callable[[str, int, int], None]


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    sparsities: Sequence[float] | None = None,
    *,
    criterion: Any = "magnitude",
    pattern: Any = "unstructured",
    include: Globs = None,
    ignore: Globs = None,
    roles: Mapping[str, str] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Prunes one layer at a time to each sparsity, measures the network, and puts the weights back bit for bit.

    The network as it came is measured first. Then for every layer and sparsity: ``prune_count(n, s)`` of its weights go,
    counted as `secateur.prune` counts (blocks and channels: the whole units that fit), ``evaluate`` is called, and the
    weights are as before again, also after an error. ``drop = metric(dense) - metric(pruned)``, or the other way round for a
    metric of which less is better; a metric that is not finite is the worst. Nothing is trained.

    A tied tensor is one layer. An output channel takes its bias along. The projections of an attention (q, k, v) are layers
    of their own; ``groups`` makes one of several tensors, which are then pruned together, each to the same sparsity. Where
    nothing was pruned (a layer that is wholly zero, sparser than asked already, or cannot carry the pattern; a count of
    0) nothing is measured, and the reason is recorded.

    Args:
        model: a module; it is run in eval mode and without gradients.
        evaluate: ``evaluate(model)`` returns ``{name: number}``, or one number. Measure on data that neither trains the
            network nor judges it in the end: what is chosen by a test set is flattered by it.
        sparsities: any of ``0 < s < 1``; `SPARSITIES` by default, for N:M the one that it means.
        criterion, pattern, include, ignore, roles: as for `secateur.prune`.
        groups: name to globs over tensors or modules, as ``{"attention": "*.attn.*"}``.
        metric: which of several metrics is looked at, the first by default; the name of it where ``evaluate`` returns one
            number.
        higher_is_better: which way of the metric is better; ``None`` goes by its name (accuracy, f1, …; loss, error, …).
        folder: where to keep every cell, so that a scan that was killed goes on where it was. More sparsities or
            layers may be added later.
        seed: for the generators of torch, numpy and Python, which are set to it before each call of ``evaluate``, and
            put back in the end.
        facts: what else tells scans apart, such as the data: shown on the page, and kept with the folder.
        progress: called with ``(layer, done, total)`` after every cell.

    Returns:
        A `Sensitivity`: the drops, the answer in sentences, a page, an allocation.

    Raises:
        BadInput: sparsities, groups or a metric that cannot be meant; a dense network whose metric is not finite; a folder
            that holds another scan; an ``evaluate`` that changed the model.
        BadTensor, NothingChosen, NotDefined: as `secateur.prune`; nothing has been measured then.

    Warns:
        SecateurWarning: a metric that did not move at all: it may hide damage.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> x = torch.linspace(-1, 1, 64).view(16, 4)
        >>> target = net(x).detach()
        >>> scan = sensitivity(net, lambda m: {"mse": (m(x) - target).square().mean()}, (0.5, 0.9))
        >>> [layer.name for layer in scan], scan.drop("0.weight", 0.9) > scan.drop("0.weight", 0.5) > 0
        (['0.weight', '2.weight'], True)
        >>> found = scan.allocation(0.5)
        >>> sum(found.counts.values())
        20

    Han et al. (arXiv:1506.02626) and Li et al., "Pruning filters for efficient ConvNets" (arXiv:1608.08710), look at
    layers in this way, by weights and by filters.
    """
    how = _how(sparsities, criterion, pattern)
    store = MemoryStore(_module(model), roles=roles)
    layers = _layers(store, how, include, ignore, groups)
    meter = Meter(model, evaluate, metric, higher_is_better, check_seed(seed))
    said = {str(k): str(v) for k, v in (facts or {}).items()}
    criterion = describe(how.requests[0].criterion)
    settings = {
        "scan": 1, "weights": digest(meter.sums), "criterion": criterion,
        "pattern": repr(how.pattern), "roles": dict(roles or {}), "groups": {n: globs(g) for n, g in (groups or {}).items()},
        "evaluate": _name_of(evaluate), "seed": seed, "facts": said,
    }  # fmt: skip
    root = None if folder is None else Path(folder)
    with nullcontext() if root is None else locked(root, settings):
        cells = Cells(root)
        with meter.running():
            meter.measure_dense(cells)
            found = _scanned(meter, store, layers, how, cells, progress)
            meter.check_unchanged()
        made = Sensitivity(
            meter.metric, meter.higher_is_better, meter.dense, criterion, str(how.pattern), how.sparsities, found,
            said,
        )  # fmt: skip
        if root is not None:
            made.save(root / "sensitivity.json")
            made.save(root / "report.html")
    if made.still:
        warnings.warn(STILL.format(made.metric), SecateurWarning, stacklevel=2)
    return made


def check(
    model: nn.Module, sparsities: Any = None, *, criterion: Any = "magnitude", pattern: Any = "unstructured",
    include: Globs = None, ignore: Globs = None, roles: Mapping[str, str] | None = None, groups: Any = None, **_: Any,
) -> None:  # fmt: skip
    """Refuses what `sensitivity` would, as far as that can be said without ``evaluate``; takes the same arguments.

    Raises:
        BadInput, BadTensor, NothingChosen, NotDefined: as `sensitivity`.
    """
    _layers(MemoryStore(_module(model), roles=roles), _how(sparsities, criterion, pattern), include, ignore, groups)


@dataclass(frozen=True)
class _How:
    """What each layer is pruned to and by, resolved; one request a sparsity."""

    sparsities: tuple[float, ...]
    pattern: Pattern
    requests: tuple[Request, ...]


def _how(sparsities: Any, criterion: Any, pattern: Any) -> _How:
    p = pattern_of(pattern)
    if sparsities is None:
        sparsities = (1 - p.keep / p.of,) if isinstance(p, NM) else SPARSITIES
    if isinstance(sparsities, str) or not isinstance(sparsities, Sequence) or not sparsities:
        raise BadInput(f"sparsities is a list of numbers between 0 and 1, such as {SPARSITIES}; got {sparsities!r}.")
    asked = tuple(sorted(check_sparsity(s, "sparsities") for s in sparsities))
    if not asked[0] or len(set(asked)) < len(asked):
        raise BadInput(f"sparsities are above 0, and each is there once; got {list(sparsities)!r}.")
    # As an allocation will prune them: each tensor by its own count, its units by the norm that goes with that.
    allocation = "global" if isinstance(p, NM) else "uniform"
    requests = tuple(Request.of(s, criterion=criterion, pattern=p, allocation=allocation) for s in asked)
    return _How(asked, p, requests)


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise BadInput(f"sensitivity takes a module, since evaluate has to run it; got a {type(model).__name__}.")
    return model


def _name_of(function: Any) -> str:
    """What a function is called, for the settings of a folder."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _layers(
    store: MemoryStore, how: _How, include: Globs, ignore: Globs, groups: Any
) -> list[tuple[Layer, list[Spec]]]:
    """Every layer with its tensors, in the order of the model; all refusals that need no evaluation are made here."""
    chosen = choose(store.specs(), include, ignore)
    store.check(chosen)
    specs, _ = eligible(chosen, how.pattern)
    able = [s for s in specs if s.skip is None]
    first = make(able, store.parts, how.requests[0], matches, store.sum)  # NaN, odd criteria
    check_followers(first, store)
    zeros = {r.name: r.zeros or 0 for r in first.chosen}
    homes = _homes(able, groups)
    members: dict[str, list[Spec]] = {}
    for s in sorted(able, key=_order):
        members.setdefault(homes.get(s.name, s.name), []).append(s)
    found = [(Layer(n, tuple(_piece(s, zeros[s.name]) for s in of)), of) for n, of in members.items()]
    was = {s.name for s in chosen if s.skip is None}
    odd = [s for s in specs if s.skip is not None and s.name in was]
    found += [(Layer(s.name, (_piece(s, 0),), why=s.skip), [s]) for s in odd]
    return sorted(found, key=lambda item: _order(item[1][0]))


def _order(spec: Spec) -> int:
    assert spec.order is not None  # of a module it is known
    return spec.order


def _piece(spec: Spec, zeros: int) -> Piece:
    dtype = str(spec.dtype).removeprefix("torch.")
    return Piece(spec.name, spec.aliases, spec.shape, dtype, spec.role, spec.numel, zeros, spec.dtype.itemsize)


def _homes(specs: Sequence[Spec], groups: Any) -> dict[str, str]:
    """The group of each tensor that is in one.

    Raises:
        BadInput: groups that are no mapping, overlap, or are called as a tensor is.
        NothingChosen: a glob that matches no tensor that is pruned.
    """
    if groups is not None and not isinstance(groups, Mapping):
        raise BadInput(f'groups maps names to globs, as {{"attention": "*.attn.*"}}; got {groups!r}.')
    homes: dict[str, str] = {}
    for name, patterns in (groups or {}).items():
        if not isinstance(name, str) or not globs(patterns):
            raise BadInput(f"groups: {name!r} should be a name, and have at least one glob; got {patterns!r}.")
        for glob in globs(patterns):
            hits = [s.name for s in specs if matches(s, glob)]
            if not hits:
                raise NothingChosen(f"groups: {glob!r} of {name!r} matches none of the tensors that are pruned.")
            for hit in hits:
                if homes.setdefault(hit, name) != name:
                    raise BadInput(f"groups: {hit!r} is in two of them, {homes[hit]!r} and {name!r}.")
    taken = {n for s in specs if s.name not in homes for n in (s.name, *s.aliases)} & {*homes.values()}
    if taken:
        raise BadInput(f"groups: {sorted(taken)[0]!r} is the name of a tensor outside it; call the group otherwise.")
    return homes


def _scanned(
    meter: Meter, store: MemoryStore, layers: Sequence[tuple[Layer, list[Spec]]], how: _How, cells: Cells, progress: Any
) -> tuple[Layer, ...]:
    """Every layer with its points.

    Raises:
        NothingChosen: nothing was pruned in any of them.
    """
    total, done, found = len(layers) * len(how.sparsities), 0, []
    for layer, specs in layers:
        points = []
        for request in how.requests:
            if layer.why is None:
                points.append(measured(meter, store, layer, specs, request, cells))
            done += 1
            if progress is not None:
                progress(layer.name, done, total)
        found.append(replace(layer, points=tuple(points)))
    if not any(layer.measured for layer in found):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in found[:6])
        raise NothingChosen(f"nothing was pruned in any layer, so nothing was measured ({reasons}).")
    return tuple(found)
