"""Tables of schedules that can be checked by eye, and the published codes' own rules beside ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from secateur import BadInput, schedules


def tf_mot(
    step: int, target: float, begin: int, end: int, every: int, initial: float = 0.0, power: float = 3.0
) -> float | None:
    """TF-MOT's PolynomialDecay: what an update at this step asks for; ``None`` where there is no update."""
    if not begin <= step <= end or (step - begin) % every:
        return None
    p = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return (initial - target) * (1 - p) ** power + target


def jax_pruner(step: int, target: float, start: int, end: int, every: int) -> float | None:
    """JaxPruner's polynomial: one step ahead, and updates at multiples of the absolute step."""
    if not start <= step <= end or step % every:
        return None
    p = min(max(step + 1 - start, 0), end - start) / (end - start)
    return target * (1 - (1 - p) ** 3)


def held(rule: Callable[[int], float | None], steps: int) -> list[float]:
    """What a network has at each step: the value of the last update."""
    out, now = [], 0.0
    for t in range(steps):
        value = rule(t)
        now = now if value is None else value
        out.append(round(now, 6))
    return out


def ours(schedule: schedules.Schedule, steps: int) -> list[float]:
    return [round(schedule(t), 6) for t in range(steps)]


def test_the_cubic_by_eye() -> None:
    # 0.8 * (1 - (1 - p)^3) at p = 0, 1/4, 1/2, 3/4, 1
    assert ours(schedules.cubic(0.8, begin=2, end=6), 9) == [0, 0, 0, 0.4625, 0.7, 0.7875, 0.8, 0.8, 0.8]


def test_the_straight_line_the_halving_and_the_step_by_eye() -> None:
    assert ours(schedules.linear(0.8, begin=0, end=4, initial=0.4), 6) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.8]
    assert ours(schedules.exponential(0.9375, begin=0, end=4), 6) == [0, 0.5, 0.75, 0.875, 0.9375, 0.9375]
    assert ours(schedules.one_shot(0.5, at=2), 4) == [0, 0, 0.5, 0.5]
    assert ours(schedules.constant(0.5), 2) == [0.5, 0.5]


@pytest.mark.parametrize("initial", [0.0, 0.3])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_same_as_tf_mot_where_every_divides_the_way(initial: float, power: float) -> None:
    s = schedules.polynomial(0.9, begin=5, end=25, every=4, initial=initial, power=power)
    assert ours(s, 40) == held(lambda t: tf_mot(t, 0.9, 5, 25, 4, initial, power), 40)


def test_tf_mot_misses_the_target_where_every_does_not_divide_the_way() -> None:
    s = schedules.cubic(0.95, begin=1, end=40, every=5, initial=0.05)
    theirs = held(lambda t: tf_mot(t, 0.95, 1, 40, 5, 0.05), 60)
    assert ours(s, 40) == theirs[:40]
    assert theirs[40:] == [0.949029] * 20  # the published 95 %: the last update comes at step 36
    assert ours(s, 60)[40:] == [0.95] * 20


def test_tf_mots_constant_is_one_shot() -> None:
    def rule(step: int) -> float | None:  # ConstantSparsity: end=-1 means for ever
        return 0.5 if step >= 10 and (step - 10) % 4 == 0 else None

    assert ours(schedules.one_shot(0.5, at=10), 30) == held(rule, 30)


def test_jax_pruner_is_one_step_ahead() -> None:
    theirs = held(lambda t: jax_pruner(t, 0.8, 2, 6, 1), 9)
    assert theirs == [0, 0, 0.4625, 0.7, 0.7875, 0.8, 0.8, 0.8, 0.8]
    assert ours(schedules.cubic(0.8, begin=2, end=6), 9)[1:] == theirs[:-1]


def test_jax_pruner_counts_every_from_step_zero() -> None:
    theirs = held(lambda t: jax_pruner(t, 0.8, 2, 6, 4), 9)
    assert theirs == [0, 0, 0, 0, 0.7875, 0.7875, 0.7875, 0.7875, 0.7875]  # one update, at 4, and never 0.8
    assert ours(schedules.cubic(0.8, begin=2, end=6, every=4), 9) == [0, 0, 0, 0, 0, 0, 0.8, 0.8, 0.8]


def test_ac_dc_ends_sparse() -> None:
    s = schedules.ac_dc(0.9, begin=1, end=8, sparse=2, dense=3)
    assert ours(s, 11) == [0, 0.9, 0.9, 0, 0, 0, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert ours(schedules.ac_dc(0.9, begin=0, end=4, sparse=1, dense=9), 6) == [0.9, 0, 0, 0, 0.9, 0.9]


def test_join_counts_from_each_boundary() -> None:
    s = schedules.join([schedules.constant(0.5), schedules.linear(0.9, begin=0, end=4, initial=0.5)], [3])
    assert ours(s, 9) == [0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9]


def test_auto_begins_at_a_tenth_and_ends_earlier_the_higher_the_target() -> None:
    found = [schedules.auto(t, 10_000) for t in (0.5, 0.8, 0.95, 0.99)]
    assert [(s.begin, s.end) for s in found] == [(1000, 7500), (1000, 7500), (1000, 5500), (1000, 5500)]
    assert all(95 <= len({s(t) for t in range(10_000)}) <= 110 for s in found)
    for steps in range(4, 60):
        s = schedules.auto(0.9, steps)
        assert s(steps - 1) == 0.9 and s.begin < s.end < steps


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.cubic(0.9, begin=1, end=5, every=2),
        schedules.linear(0.9, begin=0, end=5, initial=0.1),
        schedules.exponential(0.9, begin=1, end=5),
        schedules.ac_dc(0.9, begin=1, end=5, sparse=1, dense=1),
        schedules.one_shot(0.5, at=3),
        schedules.join([schedules.constant(0.5), schedules.constant(0.6)], [4]),
    ],
    ids=repr,
)
def test_a_schedule_is_a_value(schedule: Any) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule == copy.deepcopy(schedule)
    shown = repr(schedule)
    assert eval(shown, {"schedules": schedules}) == schedule, shown


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.cubic(0.9, begin=5, end=5), "must end after it begins"),
        (lambda: schedules.cubic(0.9, begin=6, end=5), "begin=6, end=5"),
        (lambda: schedules.cubic(0.5, begin=0, end=5, initial=0.6), "prunes more with time"),
        (lambda: schedules.cubic(90, begin=0, end=5), "90"),
        (lambda: schedules.cubic(1.0, begin=0, end=5), "target"),
        (lambda: schedules.cubic(True, begin=0, end=5), "True"),
        (lambda: schedules.cubic(float("nan"), begin=0, end=5), "nan"),
        (lambda: schedules.cubic(0.9, begin=-1, end=5), "begin is a step"),
        (lambda: schedules.cubic(0.9, begin=0, end=5.0), "end is a step"),  # type: ignore[arg-type]
        (lambda: schedules.cubic(0.9, begin=0, end=5, every=0), "every is a number of steps"),
        (lambda: schedules.polynomial(0.9, begin=0, end=5, power=0), "power"),
        (lambda: schedules.polynomial(0.9, begin=0, end=5, power=float("nan")), "power"),
        (lambda: schedules.ac_dc(0.9, begin=0, end=5, sparse=1, dense=0), "dense"),
        (lambda: schedules.one_shot(0.9, at=-1), "at is a step"),
        (lambda: schedules.join([schedules.constant(0.5)], [1]), "0 boundaries; got 1"),
        (lambda: schedules.join([schedules.constant(0.5)] * 3, [5, 5]), "must rise"),
        (lambda: schedules.auto(0.9, 3), "4 steps or more"),
    ],
)
def test_what_no_schedule_can_be(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(BadInput) as error:
        make()
    assert words in str(error.value)
