"""The probes pass, and the page that shows them says so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import probes
from benchmarks.tools import TOOLS, Gradual, Tool

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
    for name in ("P3", "P5", "P6"):
        assert not probes.PROBES[name](TORCHS).passed, name


class Unheld(type(OURS)):  # type: ignore[misc]
    """Prunes, and lets go."""

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
        return lambda: None


class Forgetful(type(OURS)):  # type: ignore[misc]
    """Takes up the model and the optimizer, and begins the schedule again."""

    def gradual(self, model: nn.Module, optimizer: Optimizer, schedule: Callable[[int], float]) -> Gradual:
        made = super().gradual(model, optimizer, schedule)
        del made._parts["pruner"]
        return made


def test_zeros_that_are_let_go_and_checkpoints_that_lack_something_are_seen() -> None:
    assert str(probes.PROBES["P3"](Unheld())).startswith("no: AdamW: of 1,024 pruned weights 1,024 not zero")
    assert not probes.PROBES["P5"](Unheld()).passed
    assert not probes.PROBES["P10"](Forgetful()).passed


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
