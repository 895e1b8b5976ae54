"""Movement pruning: weights go or stay by whether training moves them towards zero or away from it, and may come back.

Sanh, Wolf and Rush, "Movement pruning: adaptive sparsity by fine-tuning" (arXiv:2005.07683). Each chosen weight has a score
S, which begins at 0; at every update

    S <- S - dL/dW' * W

where W' are the weights in the model, pruned ones zero, and W the same with what pruned ones were when they last lived. The
gradient of a pruned weight counts like any (the paper's straight-through estimator), so its score goes on, and when it rises
enough the weight comes back with its old value. `movement` keeps those of the highest score, as many as a schedule says;
`soft_movement` those whose score passes a threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateur.core.criteria import magnitude
from secateur.core.request import Request
from secateur.core.schedules import AcDc, Schedule, check_count, target_of
from secateur.errors import BadInput, NotDefined


@dataclass(frozen=True)
class Movement:
    """See `movement`."""

    every: int
    end: int

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_count(self.end, "end")

    def looks(self, step: int) -> bool:
        """Whether update ``step`` looks at the gradients of weights that do not live."""
        return step <= self.end

    def due(self, step: int, value: float, changed: bool) -> bool:
        """Whether the mask is made anew after update ``step``: a schedule's value now, and whether it is another one."""
        return changed or (value > 0 and self._turns(step))

    def _turns(self, step: int) -> bool:
        return step % self.every == 0 if step < self.end else step == self.end


@dataclass(frozen=True)
class SoftMovement(Movement):
    """See `soft_movement`."""

    threshold: Schedule
    lr: float
    strength: float

    def __post_init__(self) -> None:
        super().__post_init__()
        last = target_of(self.threshold)
        if last is None or not 0 < last < 0.5:
            raise BadInput(
                "threshold is one of secateur.schedules that ends above 0 and below 0.5, the sigmoid of the scores at first, "
                f"such as schedules.cubic(0.1, begin=, end=); got {self.threshold!r}."
            )
        if self.threshold(self.end) != last:
            raise BadInput(f"{self.threshold!r} goes on after the mask is fixed at end={self.end}: let it end before.")
        for name, least in (("lr", "above 0"), ("strength", "0 or more")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name == "lr" and value == 0):
                raise BadInput(f"{name} is a finite number, {least}; got {value!r}.")

    def due(self, step: int, value: float, changed: bool) -> bool:
        """Whether the mask is made anew after update ``step``: while the threshold is 0, all lives."""
        return self.threshold(step) > 0 and self._turns(step)

    def cut(self, step: int) -> float:
        """The score that weights have to pass after update ``step``."""
        share = self.threshold(step)
        return math.log(share / (1 - share)) if share else -math.inf

    def penalty(self, step: int) -> float:
        """What the penalty is multiplied by after update ``step``."""
        last = target_of(self.threshold)
        assert last
        return self.strength * self.threshold(step) / last


def movement(*, every: int = 10, end: int) -> Movement:
    """Hard movement pruning: the weights of the highest scores live, exactly as many as the schedule says.

    S <- S - dL/dW' * W at every update, and where the mask is made anew, S is what orders the weights: over the model or in
    every tensor, by the `Pruner`'s ``allocation``. Zeros go first, and of equal scores the earlier tensor's, the lower index's.
    Give the schedule some updates before it prunes (``begin``): before the first there are no scores.

    What is pruned keeps its value outside the model, and does not move; when it comes back it has that value, and the
    optimizer's state of it begins at zero. Scores and values take 4 bytes and the weight's own size a weight, until ``end``;
    making a mask takes 8 more for the moment, and the time of some updates of the scores.

    The paper has a learning rate for the scores; a constant one changes nothing in their order, and is left out. The paper's
    code trains the scores by AdamW with warm-up and decay, lets decay and momentum move what is pruned, and makes the mask
    anew at every update (every 25, over the model).

    Args:
        every: updates between two masks, where the schedule's value stays the same; when it changes the mask moves too.
        end: the update after which the mask is made for the last time. From then on it is fixed, and scores and values
            are dropped. The schedule has to be at its end by then.

    Returns:
        A value for ``Pruner(rewire=)``.

    Raises:
        BadInput: a number that is no count of updates.

    >>> import torch, secateur
    >>> from secateur import schedules
    >>> model = torch.nn.Linear(20, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> pruner = secateur.Pruner(
    ...     model, optimizer, schedules.cubic(0.9, begin=2, end=6, every=2), rewire=movement(every=2, end=8))
    >>> for _ in range(10):
    ...     optimizer.zero_grad()
    ...     (model(torch.randn(16, 20)) - 1).square().mean().backward()
    ...     optimizer.step()
    >>> pruner.sparsity, int((model.weight == 0).sum())
    (0.9, 180)
    """
    return Movement(every, end)


def soft_movement(threshold: Schedule, *, lr: float, strength: float, every: int = 10, end: int) -> SoftMovement:
    """Soft movement pruning: the weights live whose score passes a threshold, and a penalty pulls all scores down.

    The loss is ``L + strength * sum(sigmoid(S))``, so S <- S - lr * (dL/dW' * W + strength * sigmoid(S) * (1 - sigmoid(S)))
    at every update, and ``sigmoid(S) > threshold(t)`` is what lives. How sparse the model gets is what comes out, not what is
    asked: ask `Pruner.sparsity`. The more ``strength`` the sparser; a schedule, an allocation and caps are refused.

    The strength rises with the threshold, ``strength * threshold(t) / threshold(end)``, as in the paper's code, which takes
    the mean of the sigmoids in each tensor and then over tensors: its strength is ours times weights a tensor times tensors.
    Here it is the paper's sum, the same pull for every weight. The code's scores are trained by AdamW, whose steps do not
    depend on the size of gradients. These do: products of weights and gradients are small, and an ``lr`` of 10 to 10,000 is
    nothing unusual. The code also keeps half a percent of each tensor; here a tensor that is left with nothing is warned of.

    Args:
        threshold: ``step -> threshold``, a schedule of `secateur.schedules` that ends above 0 and below 0.5. The paper's is
            ``schedules.cubic(0.1, begin=, end=)``.
        lr: the scores' learning rate.
        strength: of the penalty, the λ of the formula, 0 or more.
        every, end: as in `movement`.

    Returns:
        A value for ``Pruner(rewire=)``.

    Raises:
        BadInput: a number out of range, or a threshold that is none of `secateur.schedules` or not at its end at ``end``.

    >>> import torch, secateur
    >>> from secateur import schedules
    >>> model = torch.nn.Linear(20, 10)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> how = soft_movement(schedules.cubic(0.1, begin=2, end=20), lr=100.0, strength=0.01, every=2, end=30)
    >>> pruner = secateur.Pruner(model, optimizer, rewire=how)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     (model(torch.randn(16, 20)) - 1).square().mean().backward()
    ...     optimizer.step()
    >>> 0.5 < pruner.sparsity < 1
    True
    """
    return SoftMovement(every, end, threshold, lr, strength)


def check_movement(how: Movement, schedule: Schedule | None, asked: Request) -> None:
    """Refuses what movement pruning has no meaning with.

    Raises:
        NotDefined: a criterion beside the scores; for the soft kind whatever says how much goes; for the hard kind LAMP, no
            schedule, or one that prunes before the first update or has dense phases.
        BadInput: a schedule that goes on after the mask is fixed, or ends at 0.
    """
    if asked.criterion is not magnitude:
        raise NotDefined("movement pruning goes by scores of its own: leave criterion out.")
    if isinstance(how, SoftMovement):
        if schedule is not None or asked.allocation != "global" or asked.max_sparsity is not None or asked.min_keep:
            raise NotDefined(
                "soft movement pruning does not say how much goes where: leave schedule, allocation, max_sparsity and "
                "min_keep out, or take dynamic.movement."
            )
        return
    if asked.allocation == "lamp":
        raise NotDefined(
            "LAMP is defined on magnitudes, and movement pruning goes by scores: choose another allocation."
        )
    if schedule is None or isinstance(schedule, AcDc) or schedule(0):
        raise NotDefined(
            "movement pruning has no scores before the first update, and gives weights back by itself: give a schedule that "
            f"begins at 0 and rises, such as schedules.cubic(0.9, begin=, end=); not {schedule!r}."
        )
    last = target_of(schedule)
    if last is not None and (not last or schedule(how.end) != last):
        raise BadInput(
            f"{schedule!r} is not at its end, or ends at 0, when the mask is fixed at end={how.end}: movement pruning makes "
            "no mask after that."
        )
