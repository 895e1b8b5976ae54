"""Options of the form ``GLOB=VALUE``."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.errors import BadInput


def pairs_of(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """``GLOB=VALUE`` as a mapping; the last ``=`` counts, since globs may hold one.

    Raises:
        BadInput: no ``=``, nothing before it, or a glob that is there twice.
    """
    found: dict[str, str] = {}
    for text in given or ():
        glob, sign, value = text.rpartition("=")
        if not sign or not glob or not value:
            raise BadInput(f"{option} takes GLOB=VALUE; got {text!r}.")
        if glob in found:
            raise BadInput(f"{option}: {glob!r} is there twice.")
        found[glob] = value
    return found


def caps_of(given: Sequence[str] | None) -> float | dict[str, float] | None:
    """``--max-sparsity``: one number for all, or ``GLOB=NUMBER`` for some.

    Raises:
        BadInput: a text that is no number, or a number for all beside others.
    """
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0])
    return {glob: _number(value) for glob, value in pairs_of(given, "--max-sparsity").items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"--max-sparsity takes a number, or GLOB=NUMBER; got {text!r}.") from None
