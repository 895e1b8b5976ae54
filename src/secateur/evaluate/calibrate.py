"""Statistics of layers, measured on a model with real input, for criteria and solvers that need data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.core.make import eligible
from secateur.core.patterns import Pattern
from secateur.core.saliency import STATISTICS, Statistics
from secateur.core.spelling import pattern_of
from secateur.core.types import Spec
from secateur.errors import BadInput, SecateurWarning
from secateur.stores.base import choose
from secateur.stores.memory import MemoryStore

from .batches import Forward, run_all
from .gradients import MEASURED, gradients
from .losses import Loss
from .structures import channel_statistics
from .unit_gradients import unit_gradients
from .watch import Watch, too_few, why_unseen

INPUTS = ("input_norm", "hessian")
CHANNELS = ("channel_activation", "channel_apoz", "norm_scale")
UNITS = ("channel_taylor", "head_gradient")


@dataclass(frozen=True)
class Layer:
    """What was done to one tensor: see `Step`.

    Attributes:
        name: of the tensor.
        numel, zeros: its weights, and how many are zero now.
        seconds: selection or solving, and writing.
        loss: a solver's reconstruction error; ``None`` where nothing was solved.
        damping: what a solver added to the Hessian's diagonal; ``None`` where nothing was solved.
    """

    name: str
    numel: int
    zeros: int
    seconds: float
    loss: float | None = None
    damping: float | None = None


@dataclass(frozen=True)
class Step:
    """A block that is done, as `Calibration.progress` is told.

    Attributes:
        block: its name.
        number, blocks: which one it is, from 1, and how many there are.
        seconds: for observing its inputs, pruning it and running it again.
        layers: its pruned tensors.
    """

    block: str
    number: int
    blocks: int
    seconds: float
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate with, and how the model is run on it.

    Args:
        batches: batches of real input; iterated once for a measurement, so a list or a loader. A batch is a tensor, a tuple or
            list whose first entry is the input, or a mapping of keyword arguments; it is moved to the model's device. Padded
            tokens count like any other.
        loss: ``loss(model, batch) -> scalar``, for criteria made of gradients.
        forward: ``forward(model, batch)`` runs the model on a batch where the default (``model(batch)``, ``model(batch[0])``,
            ``model(**batch)``) does not; its result is not used.
        blocks: ``"auto"`` finds the list of layers of a transformer and the children of an ``nn.Sequential``; the name of a
            module whose children are the blocks; the blocks' names in the order they run; ``"layers"`` to take every layer by
            itself, in a network of any form, which then runs anew for each; or ``"whole"`` to observe all layers of the dense
            network in one go.
        progress: told of every `Step`.
        per_sample: whether every sample gives a gradient of its own, instead of every batch: slower, and what the empirical
            Fisher matrix is made of.
        probes, seed: draws a batch, and what draws their signs, for the Hessian's diagonal (Hutchinson).
        block, damping: weights of a block of the Fisher matrix, and what is added to its diagonal, for WoodFisher. A block
            takes ``8 * block`` bytes a weight.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> batches = [torch.randn(32, 8) for _ in range(4)]
        >>> secateur.prune(model, 0.5, criterion="wanda", calibration=secateur.Calibration(batches)).sparsity
        0.5
    """

    batches: Iterable[Any]
    loss: Loss | None = None
    forward: Forward | None = None
    blocks: str | Sequence[str] = "auto"
    progress: Callable[[Step], None] | None = None
    per_sample: bool = False
    probes: int = 1
    seed: int = 0
    block: int = 50
    damping: float = 1e-5

    @staticmethod
    def of(value: Any) -> Calibration:
        """A calibration, or batches as one.

        Raises:
            BadInput: something that gives no batches.
        """
        made = value if isinstance(value, Calibration) else Calibration(value)
        batches = made.batches
        if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
            raise BadInput(
                f"calibration takes batches of input, or secateur.Calibration(batches, …); got a {type(batches).__name__}. For a "
                "single batch pass [batch]."
            )
        for what in ("loss", "forward", "progress"):
            if not (callable(found := getattr(made, what)) or found is None):
                raise BadInput(f"Calibration: {what} is a function; got {found!r}.")
        names = [made.blocks] if isinstance(made.blocks, str) else made.blocks
        if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) for n in names):
            raise BadInput(
                f'Calibration: blocks is "auto", "layers", "whole", the name of a module or a list of names; got {made.blocks!r}.'
            )
        return made


def calibrate(
    model: nn.Module,
    calibration: Calibration | Iterable[Any],
    statistics: str | Sequence[str] = ("input_norm",),
    *,
    include: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    pattern: str | Pattern = "unstructured",
) -> Statistics:
    """Measures statistics of the layers of a model, as it is, for criteria that need data.

    The model is in evaluation mode while it runs and as it was afterwards, also after an error; nothing is left on it.

    Args:
        model: any module.
        calibration: batches, or a `Calibration`; its ``blocks`` do not matter here.
        statistics: some of ``input_norm``, ``hessian`` (of layers' inputs); ``grad``, ``fisher_diag``, ``hessian_diag``,
            ``fisher_inverse_diag`` (of the loss); ``channel_activation``, ``channel_apoz``, ``norm_scale`` (of channels);
            ``channel_taylor``, ``head_gradient`` (of channels and heads, of the loss).
        include, ignore, roles: which tensors, as for `secateur.prune`.
        pattern: tensors that cannot carry it are left out; ``head_gradient`` needs ``"head:N"``.

    Returns:
        ``{tensor name: {statistic: tensor}}``, for `secateur.prune(…, statistics=…)` and criteria of your own.

    Raises:
        BadInput: an unknown statistic, no batches, a layer that no batch reaches, inputs or gradients that are not finite, a
            statistic of gradients without a loss.

    Example:
        >>> import torch, secateur
        >>> layer = torch.nn.Linear(2, 1)
        >>> measured = secateur.calibrate(layer, [torch.tensor([[3.0, 0.0], [4.0, 1.0]])])
        >>> measured["weight"]["input_norm"]
        tensor([3.5355, 0.7071])
    """
    calibration = Calibration.of(calibration)
    wanted = tuple(dict.fromkeys([statistics] if isinstance(statistics, str) else statistics))
    if unknown := [s for s in wanted if s not in STATISTICS]:
        raise BadInput(f"calibrate knows the statistics {', '.join(STATISTICS)}; got {', '.join(map(repr, unknown))}.")
    store = MemoryStore(model, roles=roles)
    units = pattern_of(pattern)
    specs, _ = eligible(choose(store.specs(), include, ignore), units)
    store.check(specs)
    notes: list[str] = []
    found = measure(model, store, [s for s in specs if s.skip is None], calibration, wanted, units, notes)
    for text in notes:
        warnings.warn(text, SecateurWarning, stacklevel=2)
    return found


def measure(
    model: nn.Module, store: MemoryStore, specs: Sequence[Spec], calibration: Calibration, wanted: Sequence[str],
    pattern: Pattern, notes: list[str],
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """Statistics of some tensors of a model as it is, in as few runs as there are kinds of them. What the user should know is
    added to ``notes``."""
    out: dict[str, dict[str, Tensor]] = {s.name: {} for s in specs}
    if any(w in INPUTS for w in wanted):
        watch = observe(model, store, specs, calibration, gram="hessian" in wanted)
        notes += too_few(watch.short)
        _merge(out, watch.statistics())
    if made := [w for w in wanted if w in MEASURED]:
        _merge(out, _gradients(model, specs, calibration, made))
    if any(w in CHANNELS for w in wanted):
        weights = [(s, store.entry(s).tensor) for s in specs]
        _merge(out, channel_statistics(model, weights, calibration.batches, wanted, calibration.forward))
    for name in [w for w in wanted if w in UNITS]:
        _merge(out, unit_gradients(name, model, store, specs, calibration.batches, calibration.loss, pattern))
    return out


def _gradients(model: nn.Module, specs: Sequence[Spec], calibration: Calibration, wanted: Sequence[str]) -> Statistics:
    """The statistics of gradients."""
    c = calibration
    if c.loss is None:
        raise BadInput(
            f"{', '.join(wanted)} is made of gradients: say of which loss, secateur.Calibration(batches, loss=…), a function "
            "(model, batch) -> scalar."
        )
    return gradients(
        model, c.batches, c.loss, [s.name for s in specs], wanted,
        per_sample=c.per_sample, seed=c.seed, probes=c.probes, block=c.block, damping=c.damping,
    )  # fmt: skip


def _merge(into: dict[str, dict[str, Tensor]], found: Statistics) -> None:
    for name, values in found.items():
        into[name] |= values


def watched(store: MemoryStore, specs: Sequence[Spec], gram: bool) -> Watch:
    """A `Watch` over the layers of some tensors.

    Raises:
        BadInput: a tensor whose layer's inputs cannot be observed.
    """
    for s in specs:
        if why := why_unseen(s):
            raise BadInput(f"{s}: {why}. Leave it out with ignore=, or take a criterion that needs no data.")
    return Watch([(s, store.entry(s).tensor) for s in specs], gram=gram)


def observe(model: nn.Module, store: MemoryStore, specs: Sequence[Spec], calibration: Calibration, gram: bool) -> Watch:
    """The inputs of every layer, and with ``gram`` their products, added up over one run of the dense model a batch."""
    with watched(store, specs, gram) as watch:
        run_all(model, calibration.batches, calibration.forward)
    return watch
