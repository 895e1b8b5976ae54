"""Schedules: pure functions from a step to a sparsity. Step t means that t updates of the optimizer are done.

Any function ``step -> sparsity`` is a schedule. Those here are values too: they print as the call that makes them, compare,
and pickle. A schedule changes its value only at ``begin``, every ``every`` steps after it, and at
``end``; from ``end`` on it is the target exactly, also where ``every`` does not divide the way (a published 95 % model was
really 94.91 % sparse, because its last update came before the end).

Before ``begin`` a schedule asks for nothing: its value is 0.

The polynomial is that of Zhu and Gupta, "To prune, or not to prune" (arXiv:1710.01878):
``s_t = s_f + (s_i - s_f) * (1 - (t - begin) / (end - begin)) ** 3``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from secateur.errors import BadInput

from .allocate import check_sparsity

Schedule = Callable[[int], float]
"""``step -> sparsity``, with 0 <= sparsity < 1 and no other input."""


@dataclass(frozen=True, repr=False)
class OneShot:
    """``target`` from step ``at`` on."""

    target: float
    at: int = 0

    def __repr__(self) -> str:
        return _shown(self, "one_shot")

    def __post_init__(self) -> None:
        check_sparsity(self.target, "target")
        check_step(self.at, "at")

    def __call__(self, step: int) -> float:
        return self.target if step >= self.at else 0.0


@dataclass(frozen=True, repr=False)
class _Gradual(ABC):
    """From ``initial`` at ``begin`` to ``target`` at ``end``, held between updates; how is what a kind of it says."""

    target: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __repr__(self) -> str:
        return _shown(self, type(self).__name__.lower())

    def __post_init__(self) -> None:
        _check_way(self.target, self.begin, self.end, self.every, self.initial)

    def __call__(self, step: int) -> float:
        if step < self.begin or step >= self.end:
            return self.target if step >= self.end else 0.0
        done = (step - self.begin) // self.every * self.every / (self.end - self.begin)
        return min(max(self._value(done), self.initial), self.target)  # rounding may put it beyond one of the ends

    @abstractmethod
    def _value(self, done: float) -> float:
        """The sparsity when a share of the way is done."""


@dataclass(frozen=True, repr=False)
class Polynomial(_Gradual):
    """See `polynomial`."""

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not 0 < self.power < float("inf"):
            raise BadInput(f"power is a number > 0; got {self.power!r}.")

    def _value(self, done: float) -> float:
        return self.target + (self.initial - self.target) * float((1 - done) ** self.power)


@dataclass(frozen=True, repr=False)
class Exponential(_Gradual):
    """See `exponential`."""

    def _value(self, done: float) -> float:
        return 1 - float((1 - self.initial) ** (1 - done) * (1 - self.target) ** done)


@dataclass(frozen=True, repr=False)
class AcDc:
    """See `ac_dc`."""

    target: float
    begin: int
    end: int
    sparse: int
    dense: int

    def __repr__(self) -> str:
        return _shown(self, "ac_dc")

    def __post_init__(self) -> None:
        _check_way(self.target, self.begin, self.end, self.sparse, 0.0)
        check_count(self.dense, "dense")

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        compressed = step >= self.end or (step - self.begin) % (self.sparse + self.dense) < self.sparse
        return self.target if compressed else 0.0


@dataclass(frozen=True)
class Join:
    """See `join`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __call__(self, step: int) -> float:
        which = sum(step >= b for b in self.boundaries)
        return self.schedules[which](step - (self.boundaries[which - 1] if which else 0))

    def __repr__(self) -> str:
        return f"schedules.join({list(self.schedules)!r}, {list(self.boundaries)!r})"


def constant(target: float) -> OneShot:
    """``target`` at every step, the first included.

    Raises:
        BadInput: not a sparsity, 0 <= target < 1.

    >>> constant(0.9)(0)
    0.9
    """
    return OneShot(target)


def one_shot(target: float, at: int = 0) -> OneShot:
    """0 before step ``at``, ``target`` from it on.

    Raises:
        BadInput: not a sparsity, or a step below 0.

    >>> one_shot(0.9, at=100)(99), one_shot(0.9, at=100)(100)
    (0.0, 0.9)
    """
    return OneShot(target, at)


def polynomial(
    target: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0, power: float = 3.0
) -> Polynomial:
    """From ``initial`` at ``begin`` to ``target`` at ``end``, steeply first.

    ``target + (initial - target) * (1 - (t - begin) / (end - begin)) ** power``, held between updates
    (Zhu and Gupta, arXiv:1710.01878).

    Args:
        target: the last value, a sparsity.
        begin: first step with an update, 0 or more.
        end: the step from which the value is the target, after ``begin``.
        every: steps between updates; ``end`` is an update whatever it is.
        initial: the value at ``begin``.
        power: 3 is the paper's cubic, 1 a straight line.

    Raises:
        BadInput: an end that is not after the begin, an initial value above the target, or a number out of range.

    >>> s = polynomial(0.9, begin=1000, end=8000, every=100)
    >>> s(999), round(s(4500), 4), s(4599) == s(4500), s(8000)
    (0.0, 0.7875, True, 0.9)
    """
    return Polynomial(target, begin, end, every, initial, power)


def cubic(target: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Polynomial:
    """`polynomial` of power 3, the schedule of gradual magnitude pruning.

    >>> cubic(0.95, begin=0, end=10, every=3)(10)
    0.95
    """
    return Polynomial(target, begin, end, every, initial)


def linear(target: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Polynomial:
    """`polynomial` of power 1.

    >>> linear(0.75, begin=0, end=4)(2)
    0.375
    """
    return Polynomial(target, begin, end, every, initial, 1.0)


def exponential(target: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Exponential:
    """The density falls by the same share with every step: ``(1 - initial) ** (1 - p) * (1 - target) ** p``.

    That is the schedule of iterative pruning, which takes a share of what is left in every round.

    Args, errors: as in `polynomial`.

    >>> [round(exponential(0.75, begin=0, end=2)(t), 4) for t in range(3)]
    [0.0, 0.5, 0.75]
    """
    return Exponential(target, begin, end, every, initial)


def ac_dc(target: float, *, begin: int, end: int, sparse: int, dense: int) -> AcDc:
    """Sparse and dense phases in turn: Peste et al., "AC/DC" (arXiv:2106.12379). Run it with ``regrow=True``.

    Args:
        target: the sparsity of the sparse phases.
        begin: the first step of the first sparse phase.
        end: the step from which the network stays sparse.
        sparse, dense: steps of a sparse phase, and of the dense one after it.

    Raises:
        BadInput: as in `polynomial`.

    >>> [ac_dc(0.9, begin=1, end=7, sparse=2, dense=2)(t) for t in range(9)]
    [0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9]
    """
    return AcDc(target, begin, end, sparse, dense)


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Join:
    """One schedule after another: the next takes over at each boundary, and counts its steps from there.

    Raises:
        BadInput: not one boundary fewer than schedules, or boundaries that do not rise.

    >>> s = join([constant(0.5), linear(0.9, begin=0, end=10, initial=0.5)], [100])
    >>> s(99), s(105), s(110)
    (0.5, 0.7, 0.9)
    """
    if len(schedules) != len(boundaries) + 1:
        raise BadInput(
            f"{len(schedules)} schedules are joined at {len(schedules) - 1} boundaries; got {len(boundaries)}."
        )
    for b in boundaries:
        check_step(b, "a boundary")
    if any(a >= b for a, b in pairwise(boundaries)):
        raise BadInput(f"boundaries must rise; got {list(boundaries)}.")
    return Join(tuple(schedules), tuple(boundaries))


def auto(target: float, steps: int) -> Polynomial:
    """A cubic schedule for a run of ``steps`` updates, for those who have not chosen one.

    It begins at a tenth of the run and makes about a hundred updates. It ends at three quarters up to a target of 0.8, and
    earlier the higher the target, at 0.55 of the run for 0.95 and above: what was pruned harder needs longer to recover
    (the best schedules of Gale et al., arXiv:1902.09574, end at 0.78, 0.59 and 0.53 of the run for 0.8, 0.9 and 0.95).

    Raises:
        BadInput: not a sparsity, or fewer than 4 steps.

    >>> auto(0.9, 10_000)
    schedules.polynomial(0.9, begin=1000, end=6167, every=51)
    """
    check_sparsity(target, "target")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 4:
        raise BadInput(f"a run to prune over takes 4 steps or more; got {steps!r}.")
    late = 0.75 - 0.2 * min(1.0, max(0.0, (target - 0.8) / 0.15))
    begin, end = steps // 10, max(steps // 10 + 1, round(late * steps))
    return Polynomial(target, begin, end, max(1, (end - begin) // 100))


def target_of(schedule: Schedule | None) -> float | None:
    """The sparsity that a schedule of this module ends at; ``None`` of any other function.

    >>> target_of(join([constant(0.5), linear(0.9, begin=0, end=10)], [100])), target_of(lambda step: 0.5)
    (0.9, None)
    """
    if isinstance(schedule, Join):
        return target_of(schedule.schedules[-1])
    return schedule.target if isinstance(schedule, OneShot | _Gradual | AcDc) else None


def _shown(schedule: Any, call: str) -> str:
    """A schedule as the call that makes it."""
    given = [(f.name, getattr(schedule, f.name), f.default) for f in fields(schedule)]
    shown = [f"{value!r}" if name == "target" else f"{name}={value!r}" for name, value, d in given if value != d]
    return f"schedules.{call}({', '.join(shown)})"


def _check_way(target: float, begin: int, end: int, every: int, initial: float) -> None:
    check_sparsity(target, "target")
    check_sparsity(initial, "initial")
    check_step(begin, "begin")
    check_step(end, "end")
    check_count(every, "every")
    if end <= begin:
        raise BadInput(f"a schedule must end after it begins; got begin={begin}, end={end}. For one step use one_shot.")
    if initial > target:
        raise BadInput(f"a schedule prunes more with time; got initial={initial}, target={target}.")


def check_step(value: Any, what: str) -> None:
    """Refuses what is not the number of an update."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadInput(f"{what} is a step, an int >= 0; got {value!r}.")


def check_count(value: Any, what: str) -> None:
    """Refuses what is not a number of updates."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"{what} is a number of steps, an int >= 1; got {value!r}.")
