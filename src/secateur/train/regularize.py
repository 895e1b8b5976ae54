"""Regularisation that prepares a network for pruning: it drives weights to zero while they train.

`attach` it to an optimizer and train as before; what is then pruned is smaller, or zero already. Each kind is a value,
made by `l1`, `weight_decay` or `group_lasso`. Several may be attached to one optimizer, and act in the order in which
they were: L1 and then group lasso is the sparse group lasso.

The proximal kinds are a step of their own after the optimizer's, with the learning rate that its parameter group has at
that moment (Duchi and Singer, "Efficient online and batch learning using forward backward splitting", JMLR 10, 2009). They
alone make zeros: a gradient of the penalty moves weights to and fro across zero. After SGD that is the proximal gradient
method for ``loss + penalty``. After Adam and others that scale each weight's step it is not: the proximal step takes the
plain learning rate, not the one scaled for each weight, so strengths that suit SGD do not suit Adam.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.make import eligible
from secateur.core.patterns import Channel, Unstructured
from secateur.core.types import Spec
from secateur.errors import BadInput, BadTensor, SecateurWarning
from secateur.stores.base import choose
from secateur.stores.memory import MemoryStore

from .closures import before_use
from .optimizers import bare, check_holds, skipped
from .parameters import Filter, parameters_by_name, trainable


@dataclass(frozen=True)
class L1:
    """See `l1`."""

    strength: float
    method: Literal["proximal", "penalty"] = "proximal"

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if self.method not in ("proximal", "penalty"):
            raise BadInput(f'method is "proximal" or "penalty"; got {self.method!r}.')


@dataclass(frozen=True)
class WeightDecay:
    """See `weight_decay`."""

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self.strength)


@dataclass(frozen=True)
class GroupLasso:
    """See `group_lasso`."""

    strength: float
    dim: Literal["out", "in"] = "out"

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        if self.dim not in ("out", "in"):
            raise BadInput(f'a group is an output or an input channel: dim is "out" or "in"; got {self.dim!r}.')


How = L1 | WeightDecay | GroupLasso


def l1(strength: float, method: Literal["proximal", "penalty"] = "proximal") -> L1:
    """L1: ``strength * sum(|w|)`` beside the loss (Tibshirani, "Regression shrinkage and selection via the lasso", 1996).

    ``"proximal"`` takes the step ``w <- sign(w) * max(|w| - lr * strength, 0)`` after the optimizer's, in the weight's own
    dtype. What it brings to zero is exactly +0.0. (In 16 bits a large weight does not feel a threshold below half its
    last digit.)

    ``"penalty"`` adds ``strength * sign(w)`` to the gradient before the optimizer's step. It makes **no exact zeros**, only
    small weights. It is added once an update, whatever the number of backward passes, after clipping and unscaling, and
    for optimizers that get a closure after the closure; a term in the loss would have to be added in every loop, be
    scaled with it, and be clipped with it. Adam divides it by the size of each weight's gradients, like the rest.

    Args:
        strength: of the penalty, 0 or more, the λ of the formula.
        method: ``"proximal"`` or ``"penalty"``.

    Raises:
        BadInput: a strength that is no finite number of 0 or more, or another method.

    >>> layer = nn.Linear(3, 1, bias=False)
    >>> layer.weight.data = torch.tensor([[0.5, -0.25, 0.03]])
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    >>> _ = attach(layer, optimizer, l1(0.25))
    >>> layer(torch.zeros(1, 3)).sum().backward()  # no gradient
    >>> optimizer.step()
    >>> layer.weight.data
    tensor([[ 0.3750, -0.1250,  0.0000]])
    """
    return L1(strength, method)


def weight_decay(strength: float) -> WeightDecay:
    """Decoupled weight decay, ``w <- w - lr * strength * w`` before the optimizer's step, on the chosen weights only.

    With Adam it is AdamW to the bit (Loshchilov and Hutter, arXiv:1711.05101). It makes weights small, and none zero.

    Args:
        strength: 0 or more, AdamW's ``weight_decay``.

    Raises:
        BadInput: a strength that is no finite number of 0 or more.

    >>> weight_decay(0.01)
    WeightDecay(strength=0.01)
    """
    return WeightDecay(strength)


def group_lasso(strength: float, dim: Literal["out", "in"] = "out") -> GroupLasso:
    """Group lasso on channels: ``strength * sum(sqrt(size) * ||w_g||)`` beside the loss, for channels g of ``size`` weights.

    The proximal step ``w_g <- w_g * max(0, 1 - lr * strength * sqrt(size) / ||w_g||)`` comes after the optimizer's. It
    makes whole channels exactly +0.0, and no single weights. Norms are taken in float32 or better. A layer's bias is in no
    group; ``secateur.prune(model, ..., pattern="channel")`` takes it along.

    Args:
        strength: 0 or more, the λ of the formula.
        dim: which channels are groups, ``"out"`` or ``"in"``, in linear layers, convolutions and transposed weights alike.

    Raises:
        BadInput: a strength that is no finite number of 0 or more, or another dim.

    Yuan and Lin, "Model selection and estimation in regression with grouped variables" (2006); on the channels of
    networks: Wen et al., "Learning structured sparsity in deep neural networks" (arXiv:1608.03665).

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    >>> _ = attach(layer, optimizer, group_lasso(0.5))
    >>> layer(torch.zeros(1, 2)).sum().backward()  # no gradient
    >>> optimizer.step()
    >>> layer.weight.data
    tensor([[2.5757, 3.4343],
            [0.0000, 0.0000]])
    """
    return GroupLasso(strength, dim)


def attach(
    model: nn.Module,
    optimizer: Any,
    how: How,
    *,
    include: Filter = None,
    ignore: Filter = None,
    roles: Mapping[str, str] | None = None,
) -> Regularizer:
    """Regularises a model's weights at every step of an optimizer, until the handle it returns is closed.

    Chosen are the weights that `secateur.prune` would choose. Of those an update reaches the ones this optimizer holds
    and that have a gradient, tied weights once; frozen ones are left alone. An update that a gradient scaler skips does
    nothing. Zeros that a `secateur.Pruner` holds stay zero, and zeros made here are for it zeros like any.

    Nothing is added to the model. Hooks are the optimizer's own, and copies of an optimizer have none: attach again.

    Args:
        model: the module that is trained.
        optimizer: the one that trains it, bare or in a wrapper such as Accelerate's.
        how: what `l1`, `weight_decay` or `group_lasso` made.
        include, ignore, roles: as for `secateur.prune`.

    Returns:
        The handle, whose ``close()`` ends it.

    Raises:
        BadInput, NothingChosen, NotDefined: as `secateur.Pruner`: filters that match nothing, a frozen parameter named in
            ``include``, an optimizer that holds none of the chosen parameters, or LBFGS. Also an optimizer whose groups
            have no ``"lr"``. Nothing has been touched.
        BadTensor: float8 weights, which torch does not calculate with; with ``l1(..., "penalty")``, at the first step, a
            sparse gradient.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> regularizer = attach(model, optimizer, l1(0.2))
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(32, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> regularizer.close()
    >>> bool((model[0].weight == 0).any())
    True
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"what is regularised is a module in training, got {type(model).__name__}.")
    if not isinstance(how, How):
        raise BadInput(f"how is made by regularize.l1, weight_decay or group_lasso; got {how!r}.")
    inner = bare(optimizer)
    store = MemoryStore(model, roles=roles)
    pattern = Channel(how.dim) if isinstance(how, GroupLasso) else Unstructured()
    specs, texts = eligible(choose(store.specs(), include, ignore), pattern)
    specs = [s for s in trainable(specs, store) if s.skip is None]
    store.check(specs)
    parameters = parameters_by_name(model, store)
    chosen: dict[Tensor, Spec] = {p: s for s in specs for p in parameters[s.name]}
    _check_can(inner, chosen)
    for text in texts:
        warnings.warn(text, SecateurWarning, stacklevel=2)
    return Regularizer(inner, how, chosen)


class Regularizer:
    """What `attach` returns; it regularises until it is closed.

    Attributes:
        how: what `l1`, `weight_decay` or `group_lasso` made.
    """

    def __init__(self, optimizer: Optimizer, how: How, chosen: Mapping[Tensor, Spec]) -> None:
        self.how, self._chosen = how, chosen
        if isinstance(how, WeightDecay) or (isinstance(how, L1) and how.method == "penalty"):
            self._hook = optimizer.register_step_pre_hook(self._before)
        else:
            self._hook = optimizer.register_step_post_hook(self._after)

    def close(self) -> None:
        """Removes the hook. Weights stay as they are."""
        self._hook.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Acts on the gradients that the step will use: those of its closure, where it has one."""
        return before_use(args, kwargs, partial(self._act, optimizer))

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._act(optimizer)

    @torch.no_grad()
    def _act(self, optimizer: Optimizer) -> None:
        if skipped(optimizer):
            return
        for parameter, spec, lr in self._due(optimizer):
            if isinstance(self.how, WeightDecay):
                parameter.mul_(1 - lr * self.how.strength)
            elif isinstance(self.how, GroupLasso):
                _shrink_groups_(parameter, spec, self.how, lr)
            elif self.how.method == "proximal":
                threshold = lr * self.how.strength
                # The same as sign(w) * max(|w| - t, 0), and w - w is +0.0 whatever the sign.
                parameter.sub_(parameter.clamp(-threshold, threshold))
            else:
                _add_penalty_(parameter, spec, self.how, optimizer)

    def _due(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, Spec, float]]:
        """The chosen tensors with a gradient, each once, and the learning rate of their group."""
        seen = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                spec = self._chosen.get(parameter)
                if spec is not None and parameter.grad is not None and spec.name not in seen:
                    seen.add(spec.name)
                    yield parameter, spec, float(group["lr"])


def _shrink_groups_(weight: Tensor, spec: Spec, how: GroupLasso, lr: float) -> None:
    """Takes from each channel the share ``lr * strength * sqrt(size) / norm``, at most all of it."""
    grid = Channel(how.dim).grid(spec)
    threshold = lr * how.strength * math.sqrt(grid.unit_size)
    if not threshold:  # nor is a norm that underflows to 0 then below it
        return
    dims = [d for d, stride in enumerate(grid.stride) if not stride]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=dtype)
    share = (threshold / norms).clamp_(max=1)
    weight.sub_(weight * share)  # w - w is +0.0 whatever the sign


def _add_penalty_(parameter: Tensor, spec: Spec, how: L1, optimizer: Optimizer) -> None:
    """Adds the penalty's gradient, in the scale of the gradients that a scaler left to a fused optimizer to unscale."""
    assert parameter.grad is not None
    if parameter.grad.layout is not torch.strided:
        raise BadTensor(f'{spec} has a sparse gradient, to which no penalty can be added: take method="proximal".')
    scale = getattr(optimizer, "grad_scale", None)
    parameter.grad.add_(parameter.sign(), alpha=how.strength * (1.0 if scale is None else float(scale)))


def _check_strength(strength: Any) -> None:
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not 0 <= strength < math.inf:
        raise BadInput(f"strength is a finite number, 0 or more; got {strength!r}.")


def _check_can(optimizer: Optimizer, chosen: Mapping[Tensor, Spec]) -> None:
    for p, spec in chosen.items():
        if p.element_size() == 1:
            raise BadTensor(f"{spec} is float8, which torch does not calculate with: train in a wider dtype.")
    check_holds(optimizer, {spec.name: [p] for p, spec in chosen.items()}, False, "regularised")
    if any("lr" not in group for group in optimizer.param_groups):
        raise BadInput(
            f'the parameter groups of {type(optimizer).__name__} have no "lr", which the steps of a regularizer are sized by.'
        )
