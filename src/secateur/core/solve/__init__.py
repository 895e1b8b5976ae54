"""Solvers: which weights of a layer go, and what the others become."""

from collections.abc import Mapping

from .asked import AnySolver

NAMED: Mapping[str, AnySolver] = {}
"""The solvers that can be asked for by name."""
