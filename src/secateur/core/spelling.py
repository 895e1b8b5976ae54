"""The field's short forms, turned into objects in one place, for the API, the command line and recipes alike."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from secateur.errors import BadInput

from .criteria import Criterion, check_signature, magnitude, random
from .heads import Head
from .owl import OWL
from .patterns import NM, Block, Channel, Pattern, Row, Unstructured
from .saliency import NAMED, Bound, bind, needs

ALLOCATIONS = ("global", "uniform", "uniform_plus", "er", "erk", "lamp")
_ALIASES = {"local": "uniform", "layerwise": "uniform", "layer-wise": "uniform", "uniform+": "uniform_plus"}

Allocation = str | Mapping[str, float] | OWL | Callable[..., Mapping[str, int]]


def pattern_of(value: Any) -> Pattern:
    """A pattern from ``"unstructured"``, ``"2:4"``, ``"4x4"``, ``"row"``, ``"channel"``, ``"channel:in"``, ``"head:12"``, or a
    pattern itself.

    >>> pattern_of("2:4"), pattern_of("4x1")
    (NM(keep=2, of=4), Block(shape=(4, 1), reduce=None))
    """
    if isinstance(value, Unstructured | NM | Row | Block | Channel | Head):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text == "row":
            return Row()
        if text in ("unstructured", "channel", "channel:out", "channel:in"):
            return Unstructured() if text == "unstructured" else Channel("in" if text.endswith("in") else "out")
        if m := re.fullmatch(r"(\d{1,9}):(\d{1,9})", text):
            return NM(int(m[1]), int(m[2]))
        if m := re.fullmatch(r"(\d{1,9})x(\d{1,9})", text):
            return Block((int(m[1]), int(m[2])))
        if m := re.fullmatch(r"head:(\d{1,9})", text):
            return Head(int(m[1]))
    raise BadInput(
        f'pattern must be "unstructured", "N:M" (N of every M kept, as "2:4"), "RxC" (blocks, as "4x4"), "row", '
        f'"channel", "channel:in", "head:N" (of N heads a layer), or one of Unstructured, NM, Row, Block, Channel, Head; got '
        f"{value!r}."
    )


def criterion_of(value: Any, data: bool = False) -> Criterion:
    """A criterion from ``"magnitude"``, ``"random"`` (seed 0), ``"random(3)"``, or a function.

    Where there is ``data``, also from the name of one that needs statistics, or a function that asks for some; they are bound
    to it when they have been measured.

    >>> criterion_of("magnitude").__name__
    'magnitude'
    """
    if isinstance(value, str):
        if value == "magnitude":
            return magnitude
        if value == "random":
            return random(0)
        if m := re.fullmatch(r"random\((\d{1,18})\)", value):
            return random(int(m[1]))
        if value in NAMED and data:
            return bind(NAMED[value], {})
        if value in NAMED:
            raise BadInput(
                f"the criterion {value!r} is made of what data tells ({', '.join(needs(NAMED[value]))}): pass calibration=, "
                "batches of real input."
            )
        raise BadInput(
            f'criterion must be "magnitude", "random", "random(SEED)", secateur.random(seed), or a function '
            f"(weight, *, name, index) -> score where higher is kept; with calibration= also one of {', '.join(NAMED)}; "
            f"got {value!r}."
        )
    if data and callable(value) and not isinstance(value, Bound) and needs(value):
        return bind(value, {})
    check_signature(value)
    return value  # type: ignore[no-any-return]


def allocation_of(value: Any, data: bool = False) -> Allocation:
    """An allocation from its name or alias, a mapping of globs to sparsities, or a function.

    >>> allocation_of("local")
    'uniform'
    """
    if isinstance(value, str):
        name = _ALIASES.get(value.lower(), value.lower())
        if name in ALLOCATIONS:
            return name
        if name == "owl":
            value = OWL()
    if isinstance(value, OWL):
        if not data:
            raise BadInput("OWL looks at the inputs of layers: pass calibration=, batches of real input.")
        return value
    if isinstance(value, Mapping):
        return value
    if callable(value):
        _check_function(value)
        return value  # type: ignore[no-any-return]
    raise BadInput(
        f'allocation must be one of {", ".join(ALLOCATIONS)} (or "local"; "owl" with calibration=), a mapping of globs to '
        f"sparsities, or a function (rows, sparsity) -> {{name: count}}; got {value!r}."
    )


def _check_function(allocation: Callable[..., Any]) -> None:
    """Refuses a function that cannot be called as allocations are."""
    try:
        inspect.signature(allocation).bind((), 0.5)
    except ValueError:  # a builtin, which tells no parameters
        return
    except TypeError as e:
        raise BadInput(
            f"an allocation function must take (rows, sparsity) and return {{name: count}}; "
            f"{describe_allocation(allocation)} does not: {e}."
        ) from e


def describe_allocation(value: Allocation) -> str:
    """The name that plans and reports carry.

    >>> describe_allocation({"fc*": 0.5})
    'mapping'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, OWL):
        return f"owl(outlier={value.outlier:g}, limit={value.limit:g})"
    return "mapping" if isinstance(value, Mapping) else str(getattr(value, "__name__", "function"))
