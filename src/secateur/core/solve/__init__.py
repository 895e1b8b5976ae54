"""Solvers: methods that choose what goes and also move what stays, one layer's matrix at a time, from its Hessian."""

from collections.abc import Mapping

from .asked import AnySolver
from .base import Solution
from .fisher import woodfisher
from .least_squares import refit
from .obs import OBS, ExactOBS
from .sparsegpt import SparseGPT

__all__ = ["NAMED", "OBS", "ExactOBS", "Solution", "SparseGPT", "refit", "woodfisher"]

NAMED: Mapping[str, AnySolver] = {
    "sparsegpt": SparseGPT(),
    "obs": OBS(),
    "exactobs": ExactOBS(),
    "refit": refit,
    "woodfisher": woodfisher,
}
"""The solvers that can be asked for by name."""
