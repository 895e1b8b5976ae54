"""The command line: ``secateur inspect`` and ``secateur prune``, which call the functions of the same names."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; the entry point of ``secateur``."""
    from .app import run

    run()
