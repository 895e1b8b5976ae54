"""The page about what goes together is what its script makes of the code that refuses."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.contract.table import CHOICES, OF_ATTENTION, PATTERNS, Case
from tests.guard.source import ROOT, text


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_combinations", ROOT / "docs" / "make_combinations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes(script: ModuleType) -> None:
    assert text(script.PAGE) == script.page(), "run: python docs/make_combinations.py"


def test_the_page_shows_what_the_contract_tests_run(script: ModuleType) -> None:
    assert (*PATTERNS.values(), *OF_ATTENTION.values()) == script.PATTERNS
    assert {a for _, a, _ in CHOICES} == set(script.ALLOCATED)
    page = script.page()
    rows = dict(re.findall(r"^\| `([\w:]+)` \| (.*) \|$", page.split("## Other")[0], re.M))
    assert set(rows) == {*PATTERNS, *OF_ATTENTION}
    for pattern, cells in rows.items():
        defined = [Case(pattern, a, "magnitude").why_refused() is None for a in script.ALLOCATED]
        assert [c == script.YES for c in cells.split(" | ")] == defined


def test_every_mark_has_its_reason(script: ModuleType) -> None:
    for section in script.page().split("\n## ")[1:]:
        marks = {int(n) for n in re.findall(r"\((\d+)\)", section)}
        listed = [int(n) for n in re.findall(r"^(\d+)\. ", section, re.M)]
        assert marks <= set(listed), section
        assert listed == list(range(1, len(listed) + 1))
