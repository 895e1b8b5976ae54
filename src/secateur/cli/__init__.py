"""The command line: a command for each verb, which calls the function of the same name."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; the entry point of ``secateur``."""
    from .app import run

    run()
