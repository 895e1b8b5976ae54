"""Masks that move through training: what ``rewire=`` of a `secateur.Pruner` takes.

Sparse from the start: a constant schedule and ``rewire=None`` train one fixed mask (static sparse training). With `rigl` or
`random_growth` the smallest live weights of every tensor are dropped now and then, and as many are grown elsewhere: by the
largest gradients (`rigl`) or at random (`random_growth`, the field's SET). New weights begin at zero, and so does what the
optimizer remembers of them; a live weight may therefore be zero, and the mask alone says what lives.

Both drop the share ``f(t) = drop / 2 * (1 + cos(pi * t / end))`` of the live weights of each tensor, at updates ``every``,
``2 * every``, ... before ``end`` (Evci et al., arXiv:1911.11134). Of equal magnitudes, gradients or draws the one at the lower
flat index goes, or comes; the official code adds noise instead.

Movement pruning goes by scores that it gathers, and gives weights back: `movement` under a rising schedule, `soft_movement`
under a threshold. Both are documented in `secateur.train.movement`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.allocate import prune_count
from secateur.core.bits import pack
from secateur.core.criteria import random
from secateur.core.keys import FORMATS, magnitude_key
from secateur.core.patterns import Unstructured
from secateur.core.request import Request
from secateur.core.rewire import rewire
from secateur.core.schedules import OneShot, check_count, check_step
from secateur.core.types import Spec
from secateur.errors import BadInput, NotDefined, PlanMismatch

from .held import Held, refuse_not_finite
from .movement import Movement, check_movement
from .movement import movement as movement
from .movement import soft_movement as soft_movement


@dataclass(frozen=True)
class _Rewiring:
    """When masks move, and how far; where to is what a kind of it says."""

    every: int
    end: int
    drop: float

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_step(self.end, "end")
        if self.end <= self.every:
            raise BadInput(f"the first update is at step every={self.every}, so end={self.end} must come after it.")
        if isinstance(self.drop, bool) or not isinstance(self.drop, int | float) or not 0 < self.drop < 1:
            raise BadInput(
                f"drop is the share of the live weights that an update drops at first, 0 < drop < 1; got {self.drop!r}."
            )

    def due(self, step: int) -> bool:
        """Whether update ``step`` moves the masks."""
        return 0 < step < self.end and step % self.every == 0

    def fraction(self, step: int) -> float:
        """The share of the live weights that goes at a step before ``end``."""
        return self.drop / 2 * (1 + math.cos(math.pi * step / self.end))


@dataclass(frozen=True)
class RigL(_Rewiring):
    """See `rigl`."""

    def looks(self, step: int) -> bool:
        """Whether update ``step`` looks at the gradients of weights that do not live."""
        return self.due(step)

    def keys(self, held: Held, spec: Spec, step: int) -> Tensor | None:
        """Keys of growth, 1 or more, the lowest first; ``None`` for a tensor that got no gradient."""
        gradients = [p.grad for p in held.parameters[spec.name] if p.grad is not None]
        if not gradients:
            return None
        total = reduce(torch.add, gradients)
        return FORMATS[total.dtype].nonfinite - _finite_keys(total, f"the gradient of {spec}", step)


@dataclass(frozen=True)
class SET(_Rewiring):
    """See `random_growth`."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        random(self.seed)

    def looks(self, step: int) -> bool:
        """It never does."""
        return False

    def keys(self, held: Held, spec: Spec, step: int) -> Tensor | None:
        """Keys of growth: an integer hash of (seed, name, step, index)."""
        index = torch.arange(spec.numel, device=held.tensor(spec).device)
        hashed = random(self.seed)(index, name=f"{spec.name}\0{step}", index=index)
        return hashed.to(torch.int64) + (1 << 31) + 1


Rewiring = RigL | SET | Movement


def rigl(*, every: int = 100, end: int, drop: float = 0.3) -> RigL:
    """RigL: grows where the dense gradient is largest. Evci et al., "Rigging the Lottery" (arXiv:1911.11134).

    An update that rewires makes no step with its gradients: they are taken dense, for growth alone, and thrown away, so the
    optimizer's state stands still but for what was dropped. A weight that was just dropped may grow again; it keeps its value
    and its state then. A tensor that got no gradient is left as it is.

    Args:
        every: updates between two rewirings.
        end: no rewiring from this step on; the paper's is three quarters of the training.
        drop: the share of the live weights that would go at step 0; it falls to 0 at ``end`` along a cosine.

    Returns:
        A value for ``Pruner(rewire=)``.

    Raises:
        BadInput: a number out of range, or no update before ``end``.

    >>> import torch, secateur
    >>> from secateur import dynamic, schedules
    >>> model = torch.nn.Linear(20, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> how = dynamic.rigl(every=2, end=8)
    >>> pruner = secateur.Pruner(
    ...     model, optimizer, schedules.constant(0.9), criterion="random", allocation="erk", rewire=how)
    >>> first = pruner.masks()["weight"]
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 20)).square().mean().backward()
    ...     optimizer.step()
    >>> now = pruner.masks()["weight"]
    >>> int(first.sum()), int(now.sum()), torch.equal(first, now)
    (20, 20, False)
    """
    return RigL(every, end, drop)


def random_growth(*, every: int = 100, end: int, drop: float = 0.3, seed: int = 0) -> SET:
    """SET: grows at random. Mocanu et al., "Scalable training of artificial neural networks" (arXiv:1707.04780).

    It rewires right after the update, which is made as any other. The share that goes falls along the cosine of `rigl`, as in
    the comparison of that paper; the first paper's is 0.3 throughout. What grows is an integer hash of seed, name, step and
    index, so it is the same on every device and after a resume.

    Args:
        every, end, drop: as in `rigl`.
        seed: any int.

    Returns:
        A value for ``Pruner(rewire=)``.

    Raises:
        BadInput: as in `rigl`; a seed that is not an int.

    >>> how = random_growth(every=100, end=1000, seed=1)
    >>> [t for t in range(1001) if how.due(t)][-1], round(how.fraction(500), 4)
    (900, 0.15)
    """
    return SET(every, end, drop, seed)


def check_rewiring(how: Any, schedule: Any, asked: Request, regrow: bool, grad_mask: bool) -> None:
    """Refuses what rewiring has no meaning with.

    Raises:
        BadInput: not a value of one of the functions here; see also `check_movement`.
        NotDefined: another pattern, ``regrow``, or ``grad_mask=False``; with `rigl` and `random_growth` a schedule other than
            a constant one above 0; with the others what `check_movement` refuses.
    """
    if how is None:
        return
    if not isinstance(how, Rewiring):
        raise BadInput(
            f"rewire is dynamic.rigl(...), random_growth(...), movement(...), soft_movement(...) or None; got {how!r}."
        )
    if not isinstance(asked.pattern, Unstructured):
        raise NotDefined(f"rewire drops and grows single weights: it is not defined with the pattern {asked.pattern}.")
    if isinstance(how, Movement):
        check_movement(how, schedule, asked)
    elif not (isinstance(schedule, OneShot) and schedule.at == 0 and schedule.target > 0):
        raise NotDefined(
            "rewire moves masks at a constant sparsity above 0: give schedule=schedules.constant(sparsity), not "
            f"{schedule!r}."
        )
    if regrow:
        raise NotDefined("rewire says what grows and when: leave regrow=True out.")
    if not grad_mask:
        raise NotDefined("rewire takes dense gradients itself, where it looks at them: leave grad_mask=False out.")


def check_constant(how: Any, theirs: float, mine: float) -> None:
    """Refuses the state of another sparsity, where rewiring keeps it constant.

    Raises:
        PlanMismatch: they differ.
    """
    if isinstance(how, RigL | SET) and theirs != mine:
        raise PlanMismatch(f"the state is of sparsity {theirs}, which rewire keeps constant at {mine} here.")


@torch.no_grad()
def move_masks(held: Held, specs: Iterable[Spec], how: RigL | SET, step: int, optimizers: Sequence[Optimizer]) -> None:
    """Drops and grows in every tensor as is due at a step.

    Raises:
        BadTensor: weights or gradients that are NaN or infinite. Nothing has been touched.
    """
    masks = {}
    for spec in specs:
        if spec.name not in held.bits:  # dense: there is nowhere to grow
            continue
        drop = _finite_keys(held.tensor(spec), str(spec), step) + 1
        grow = how.keys(held, spec, step)
        count = prune_count(held.kept(spec), how.fraction(step))
        if grow is not None and count:
            masks[spec.name] = pack(rewire(spec, held.mask(spec).reshape(-1), drop, grow, count))
    held.swap(masks, optimizers)


def _finite_keys(t: Tensor, what: str, step: int) -> Tensor:
    """The magnitude keys of a tensor, flat."""
    refuse_not_finite(t, what, step)
    return magnitude_key(t.detach()).reshape(-1)
