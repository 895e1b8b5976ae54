"""Movement pruning in a few steps that can be followed by hand."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import BadInput, Pruner, dynamic, schedules


def started(weights: list[float], schedule: Any, how: Any) -> tuple[Tensor, torch.optim.Optimizer, Pruner]:
    model = nn.Linear(len(weights), 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weights))
    return model.weight, optimizer, Pruner(model, optimizer, schedule, rewire=how)


def step(weight: Tensor, optimizer: torch.optim.Optimizer, gradient: list[float]) -> list[float]:
    """One update with a loss whose gradient is known, and the weights after it."""
    optimizer.zero_grad()
    (weight * torch.tensor(gradient)).sum().backward()
    optimizer.step()
    return weight.detach().flatten().tolist()


def test_three_steps_by_hand() -> None:
    shares = {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.25}
    weight, optimizer, pruner = started([1.0, -2.0, 3.0, 0.5], shares.__getitem__, dynamic.movement(every=1, end=3))

    # S = 0 - g w = (-1, -2, -1.5, 0.5), and w - g / 2 = (0.5, -1.5, 2.75, 1). One of four goes: the second.
    assert step(weight, optimizer, [1.0, -1.0, 0.5, -1.0]) == [0.5, 0.0, 2.75, 1.0]
    assert pruner.state_dict()["movement"]["scores"]["weight"].tolist() == [[-1.0, -2.0, -1.5, 0.5]]
    assert pruner.state_dict()["movement"]["values"]["weight"].tolist() == [[0.0, -1.5, 0.0, 0.0]]

    # The second's gradient is taken where it is zero, and its score goes on with the -1.5 it was: S = (-2, 4, 1.25, 0.5).
    # It does not move, the others do: (-0.5, -1.5, 3.25, 1). Two of four go, the first and the last, and the second is back.
    assert step(weight, optimizer, [2.0, 4.0, -1.0, 0.0]) == [0.0, -1.5, 3.25, 0.0]
    assert pruner.state_dict()["movement"]["scores"]["weight"].tolist() == [[-2.0, 4.0, 1.25, 0.5]]
    assert pruner.state_dict()["movement"]["values"]["weight"].tolist() == [[-0.5, 0.0, 0.0, 1.0]]

    # S = (-2, 5.5, -2, 6.5), and (-0.5, -2, 2.75, 1). One of four goes: of two with the same score the first.
    assert step(weight, optimizer, [0.0, 1.0, 1.0, -6.0]) == [0.0, -2.0, 2.75, 1.0]

    # From now on the mask is what it is, whatever the gradients, and nothing else is remembered.
    assert "movement" not in pruner.state_dict()
    assert step(weight, optimizer, [-9.0, 2.0, 2.0, 4.0]) == [0.0, -3.0, 1.75, -1.0]


def test_soft_steps_by_hand() -> None:
    how = dynamic.soft_movement(schedules.constant(0.2), lr=2.0, strength=0.5, every=1, end=9)
    weight, optimizer, pruner = started([1.0, -2.0], None, how)

    # sigmoid(0) = 1/2, so each score falls by 2 * (g w + 0.5 / 4): S = (-2.25, 1.75). sigmoid(S) > 0.2 is S > log(0.2 / 0.8).
    assert step(weight, optimizer, [1.0, 0.5]) == [0.0, -2.25]
    assert pruner.state_dict()["movement"]["scores"]["weight"].tolist() == [[-2.25, 1.75]]
    assert pruner.sparsity == 0.5 and -2.25 < math.log(0.25) < 1.75

    # The first was 0.5 when it went. 2.25 - 2 * 2 * 0.5 = 0.25 below zero, less what the penalty takes, is above -1.386.
    assert step(weight, optimizer, [-2.0, 0.0]) == [0.5, -2.25]
    first, second = pruner.state_dict()["movement"]["scores"]["weight"].flatten().tolist()
    pulls = [s * (1 - s) for s in (1 / (1 + math.exp(2.25)), 1 / (1 + math.exp(-1.75)))]
    assert first == pytest.approx(-0.25 - pulls[0], rel=1e-6) and second == pytest.approx(1.75 - pulls[1], rel=1e-6)


def test_the_penalty_rises_with_the_threshold() -> None:
    # As in the paper's code: lambda * threshold(t) / final threshold, cubic from 0 to 0.1 between updates 2 and 6.
    how = dynamic.soft_movement(schedules.cubic(0.1, begin=2, end=6), lr=1.0, strength=400.0, end=6)
    assert [round(how.penalty(t), 3) for t in (0, 2, 3, 4, 6, 9)] == [0.0, 0.0, 231.25, 350.0, 400.0, 400.0]
    assert how.cut(0) == how.cut(2) == -math.inf and how.cut(6) == pytest.approx(-2.1972, abs=1e-4)


@pytest.mark.parametrize(
    ("every", "end", "made"), [(3, 10, [3, 6, 9, 10]), (3, 9, [3, 6, 9]), (1, 3, [1, 2, 3]), (20, 5, [5])]
)
def test_masks_are_made_at_multiples_of_every_and_at_the_end(every: int, end: int, made: list[int]) -> None:
    how = dynamic.movement(every=every, end=end)
    assert [t for t in range(1, 20) if how.due(t, 0.5, changed=False)] == made
    assert how.due(4, 0.5, changed=True) and not how.due(end, 0.0, changed=False)
    assert [t for t in range(1, 20) if how.looks(t)] == list(range(1, end + 1))


TENTH = schedules.constant(0.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"end": 0}, "end"),
        ({"end": 10.0}, "end"),
        ({"every": 0}, "every"),
        ({"every": True}, "every"),
        ({"lr": 0.0}, "lr"),
        ({"lr": True}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"threshold": 0.1}, "threshold"),
        ({"threshold": lambda t: 0.1}, "threshold"),
        ({"threshold": schedules.constant(0.5)}, "below 0.5"),
        ({"threshold": schedules.constant(0.0)}, "above 0"),
        ({"threshold": schedules.cubic(0.1, begin=0, end=21)}, "end=20"),
    ],
)
def test_numbers_out_of_range_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        dynamic.soft_movement(**{"threshold": TENTH, "lr": 1.0, "strength": 1.0, "end": 20, **given})
    hard = {k: v for k, v in given.items() if k in ("every", "end")}
    if hard:
        with pytest.raises(BadInput, match=words):
            dynamic.movement(**{"end": 20, **hard})


def test_they_are_values() -> None:
    soft = dynamic.soft_movement(TENTH, lr=1.0, strength=1.0, end=9)
    for how in (dynamic.movement(end=9), soft):
        assert pickle.loads(pickle.dumps(how)) == how == copy.deepcopy(how)
    assert dynamic.movement(every=10, end=9) != soft
