"""The probes pass, and the page that shows them says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import probes
from benchmarks.tools import TOOLS, Tool

OURS, TORCHS = TOOLS.values()
SMALL: dict[str, Callable[[Tool], probes.Answer]] = {**probes.PROBES, "P8": partial(probes.pooled, weights=4_000_000)}
PAGE = Path(__file__).parents[2] / "docs" / "probes.md"


@pytest.mark.parametrize("name", SMALL)
def test_secateur_passes(name: str) -> None:
    answer = SMALL[name](OURS)
    assert answer.passed, answer


def test_a_probe_can_fail() -> None:
    assert str(probes.twice(TORCHS)) == "no: 0.75"
    assert not probes.tied(TORCHS).passed
    assert not probes.round_trips(TORCHS).passed
    assert not probes.two_of_four(TORCHS).passed


def test_a_wrong_group_is_seen() -> None:
    dense = torch.tensor([[4.0, -3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]])
    right = torch.tensor([[4.0, -3.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]])
    wrong = torch.tensor([[4.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0]])
    assert probes._groups_that_hold(dense, right) == (2, 2)
    assert probes._groups_that_hold(dense, wrong) == (1, 2)


def test_the_page_shows_every_probe_passed() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| P")]
    shown = {row[0].removeprefix("| "): (row[1], row[2].partition(":")[0]) for row in rows}
    assert shown == {name: (probes.question(probe), "yes") for name, probe in probes.PROBES.items()}
