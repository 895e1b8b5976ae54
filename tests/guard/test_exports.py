"""The public names: few, sorted, each explained with an example that runs."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest

import secateur

PUBLIC = [name for name in secateur.__all__ if not name.startswith("__")]
MOST = 45  # beside the errors

Documented = type | Callable[..., Any]


def public(name: str) -> Documented:
    obj: Documented = getattr(secateur, name)
    return obj


def is_error(name: str) -> bool:
    obj = public(name)
    return isinstance(obj, type) and issubclass(obj, Exception)


# Errors explain themselves where they are raised.
EXPLAINED = [name for name in PUBLIC if callable(public(name)) and not is_error(name)]


def test_all_is_what_is_public() -> None:
    assert set(secateur.__all__) <= set(dir(secateur))
    found = {
        name
        for name, obj in vars(secateur).items()
        if not name.startswith("_") and not isinstance(obj, types.ModuleType) and name != "annotations"
    }
    assert {name for name in PUBLIC if not isinstance(getattr(secateur, name), types.ModuleType)} == found


def test_all_is_sorted_and_short() -> None:
    # As the linter sorts it: CONSTANTS, Classes, functions.
    assert PUBLIC == sorted(PUBLIC, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert sum(not is_error(name) for name in PUBLIC) <= MOST


def test_the_version_is_there() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", secateur.__version__)


def gaps(obj: Documented) -> list[str]:
    """What the docstring of a public function or class lacks."""
    doc = inspect.getdoc(obj) or ""
    lacks = [] if ">>> " in doc else ["an example"]
    own = [p for p in inspect.signature(obj).parameters if p not in ("self", "args", "kwargs")]
    section = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    said = section.group(1) if section else ""
    lacks += [f"argument {p}" for p in own if not re.search(rf"\b{p}\b", said)]
    if isinstance(obj, type):
        return lacks
    tree = ast.parse(textwrap.dedent(inspect.getsource(obj)))
    if inspect.signature(obj).return_annotation not in (None, "None") and "Returns:" not in doc:
        lacks.append("Returns:")
    if any(isinstance(n, ast.Raise) for n in ast.walk(tree)) and "Raises:" not in doc:
        lacks.append("Raises:")
    return lacks


@pytest.mark.parametrize("name", EXPLAINED)
def test_docstring(name: str) -> None:
    assert not gaps(public(name))


def test_gaps_are_seen() -> None:
    def bare(weight: int) -> int:
        """Doubles."""
        if weight < 0:
            raise ValueError(weight)
        return 2 * weight

    assert gaps(bare) == ["an example", "argument weight", "Returns:", "Raises:"]

    def whole(weight: int) -> int:
        """Doubles.

        Args:
            weight: a count.

        Returns:
            Twice the weight.

        Raises:
            ValueError: a negative weight.

        >>> whole(2)
        4
        """
        return bare(weight)

    assert not gaps(whole)
