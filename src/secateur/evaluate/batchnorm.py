"""Running statistics of BatchNorm, measured again on the network as it is now."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from secateur.errors import BadInput, SecateurWarning

from .batches import device_of, moved, run_batch
from .mode import only_training

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Measures the running statistics of every BatchNorm again, in place, over batches of real input.

    Pruning changes what reaches each BatchNorm, but its stored mean and variance still describe the dense
    network. For batches ``b = 1 … n`` with mean ``μ_b`` and unbiased variance ``σ²_b`` per channel::

        running_mean = (μ_1 + … + μ_n) / n        running_var = (σ²_1 + … + σ²_n) / n

    Every batch weighs the same, a smaller last one too, and ``running_var`` leaves out how far the batch
    means lie apart: so take batches of one size, and large ones. Only BatchNorm runs in train mode; dropout
    and all else stay in eval mode. No gradients, no labels; weights are not touched. The same batches in the
    same order give the same bits.

    Args:
        model: a module with at least one BatchNorm (1d, 2d, 3d, Sync) that tracks running statistics.
        loader: batches of at least two samples, iterated once. A few hundred batches do. One without an end
            needs ``batches``.
        batches: how many batches to use at most; ``None`` for all the loader has.
        forward: ``forward(model, batch)`` runs the model on one batch; its result is not used. The default
            calls ``model(batch)`` for a tensor, ``model(batch[0])`` for a tuple or list, ``model(**batch)``
            for a mapping. Either way the batch is first moved to the device of the model's first parameter.

    Returns:
        The number of batches used.

    Raises:
        BadInput: no BatchNorm that tracks statistics, an empty loader, a batch that leaves a BatchNorm one
            value per channel or makes a statistic NaN or infinite, a batch of a kind the default cannot run.
            On any error, also in ``forward``, the statistics are put back as they were.

    Warns:
        SecateurWarning: a BatchNorm that no batch reached; it keeps the statistics it had.

    Example:
        >>> import torch, secateur
        >>> from torch import nn
        >>> net = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Dropout(0.5))
        >>> inputs = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 3.0], [6.0, 5.0]])
        >>> labels = torch.zeros(4)
        >>> secateur.recalibrate_batchnorm(net, [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])])
        2
        >>> net[0].running_mean, net[0].running_var, net.training
        (tensor([3.0000, 2.5000]), tensor([2., 1.]), True)

    Reference:
        Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV 2020,
        arXiv:2007.02491: accuracy after this step predicts that after fine-tuning, accuracy before it does
        not.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and _tracks(m)}
    _check(model, norms, loader, batches)
    run = forward or run_batch
    used = 0
    with torch.no_grad(), only_training(model, norms.values()), _averaging(norms):
        for batch in islice(loader, batches):
            used += 1
            try:
                run(model, moved(batch, device_of(model)))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise BadInput(
                    f"batch {used} leaves a BatchNorm one value per channel ({error}): its variance is not "
                    "defined. Use larger batches; DataLoader(…, drop_last=True) drops a last one that is too "
                    "small."
                ) from error
        if not used:
            raise BadInput("the loader is empty: there is nothing to measure the statistics on. Was it used up before?")
        _refuse_nonfinite(norms)
    return used


def _tracks(norm: _BatchNorm) -> bool:
    return norm.track_running_stats and all(getattr(norm, s) is not None for s in STATISTICS)


def _check(model: nn.Module, norms: Mapping[str, _BatchNorm], loader: object, batches: object) -> None:
    if not norms:
        raise BadInput(
            f"this {type(model).__name__} has no BatchNorm that tracks running statistics: there is nothing "
            "to recalibrate. Networks with LayerNorm or GroupNorm do not need it."
        )
    for name, norm in norms.items():
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise BadInput(f"{name!r} is lazy and has no statistics yet: run the model once first.")
    if isinstance(loader, Tensor | Mapping):
        raise BadInput(
            f"loader is a {type(loader).__name__}: iterating it does not give batches. For a single batch pass [batch]."
        )
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise BadInput(f"batches={batches!r}: give a whole number of at least 1, or None for all the loader has.")


@contextmanager
def _averaging(norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Statistics start anew and average with equal weights; on an error they are as before."""
    before = {n: {s: getattr(m, s).clone() for s in STATISTICS} for n, m in norms.items()}
    momenta = {n: m.momentum for n, m in norms.items()}
    try:
        for m in norms.values():
            m.reset_running_stats()
            m.momentum = None
        yield
        missed = [n for n, m in norms.items() if not m.num_batches_tracked]
    except BaseException:
        _put_back(norms, before)
        raise
    finally:
        for n, m in norms.items():
            m.momentum = momenta[n]
    if missed:
        _put_back(norms, {n: before[n] for n in missed})
        what = f"no batch reached {', '.join(map(repr, missed))}: statistics left as they were."
        warnings.warn(what, SecateurWarning, stacklevel=4)


def _put_back(norms: Mapping[str, _BatchNorm], before: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, values in before.items():
        for statistic, value in values.items():
            getattr(norms[name], statistic).copy_(value)


def _refuse_nonfinite(norms: Mapping[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        for statistic in STATISTICS[:2]:
            bad = int((~torch.isfinite(getattr(norm, statistic))).sum())
            if bad:
                raise BadInput(
                    f"{statistic} of {name!r} would hold {bad} NaN or infinite values: a batch, or what the "
                    "network made of it, is not finite. Look for NaN in the inputs and in the weights."
                )
