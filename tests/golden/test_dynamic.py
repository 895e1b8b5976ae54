"""The drop fraction of RigL in tables that can be checked by eye, and the numbers that are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from secateur import BadInput, dynamic


def test_the_drop_fraction_of_the_paper() -> None:
    # alpha / 2 * (1 + cos(pi t / T_end)) with alpha = 0.3: at 0, 1/3, 1/2, 2/3 and nearly all of the way.
    how = dynamic.rigl(every=100, end=75_000)
    at = {0: 0.3, 25_000: 0.225, 37_500: 0.15, 50_000: 0.075, 74_900: 0.000001}
    assert {t: round(how.fraction(t), 6) for t in at} == at
    assert dynamic.random_growth(every=100, end=75_000).fraction(25_000) == how.fraction(25_000)


@pytest.mark.parametrize(("every", "end", "updates"), [(3, 10, [3, 6, 9]), (3, 9, [3, 6]), (1, 3, [1, 2]), (4, 5, [4])])
def test_updates_are_multiples_of_every_before_the_end(every: int, end: int, updates: list[int]) -> None:
    how = dynamic.rigl(every=every, end=end)
    assert [t for t in range(20) if how.due(t)] == updates


@pytest.mark.parametrize("make", [dynamic.rigl, dynamic.random_growth])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"end": 100}, "first update"),
        ({"end": 10.0}, "end"),
        ({"end": 9, "every": 0}, "every"),
        ({"end": 9, "every": True}, "every"),
        ({"end": 900, "drop": 0}, "drop"),
        ({"end": 900, "drop": 1.0}, "drop"),
        ({"end": 900, "drop": float("nan")}, "drop"),
        ({"end": 900, "drop": "0.3"}, "drop"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make(**given)


def test_a_seed_is_an_int() -> None:
    with pytest.raises(BadInput, match="takes an int"):
        dynamic.random_growth(end=900, seed=1.5)  # type: ignore[arg-type]


def test_they_are_values() -> None:
    for how in (dynamic.rigl(end=900), dynamic.random_growth(end=900, seed=3)):
        assert pickle.loads(pickle.dumps(how)) == how == copy.deepcopy(how)
    assert dynamic.rigl(end=900) != dynamic.random_growth(end=900)
