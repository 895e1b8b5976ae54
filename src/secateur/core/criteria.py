"""Criteria order the elements inside a tensor: ``(weight, *, name, index) -> score``, same shape, higher = keep.

A criterion is a function. It gets the weight (a copy, any real dtype) and whatever it asks for by name among ``name`` (the
tensor's name) and ``index`` (int64, each element's flat index in the whole tensor). A user's function gets whole tensors
and is called once a tensor; one marked `elementwise` may get pieces, several times.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.errors import BadInput, BadTensor

from .types import Part

Criterion = Callable[..., Tensor]
F = TypeVar("F", bound=Criterion)
PROVIDED = ("name", "index")


def elementwise(criterion: F) -> F:
    """Marks a criterion whose score of a weight depends on that weight, its name and its index alone.

    Such a function may be called with pieces of a tensor, more than once, and must then give the same scores.

    Args:
        criterion: ``(weight, *, name, index) -> score``.

    Returns:
        The same function, marked.

    Example:
        >>> import torch, secateur
        >>> @secateur.elementwise
        ... def signed(weight):
        ...     return weight          # prunes the most negative weights first
        >>> w = torch.tensor([3.0, -2.0, 1.0, -4.0])
        >>> _ = secateur.prune(w, 0.5, criterion=signed)
        >>> w
        tensor([3., 0., 1., 0.])
    """
    criterion.elementwise = True  # type: ignore[attr-defined]
    return criterion


@elementwise
def magnitude(weight: Tensor) -> Tensor:
    """``|w|``: the criterion everything else must beat.

    Args:
        weight: any shape, any real float dtype.

    Returns:
        The absolute values, same shape and dtype (float32 for 8-bit floats).

    Example:
        >>> import torch, secateur
        >>> secateur.magnitude(torch.tensor([-2.0, 0.5]))
        tensor([2.0000, 0.5000])

    Han et al., "Learning both weights and connections for efficient neural networks" (arXiv:1506.02626).
    """
    return (weight if weight.dtype.itemsize > 1 else weight.float()).abs()


@dataclass(frozen=True)
class RandomCriterion:
    """The criterion `random` returns; a value, so that plans can name it."""

    seed: int
    elementwise: bool = True

    def __call__(self, weight: Tensor, *, name: str, index: Tensor) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        offset = int.from_bytes(digest[:8], "little", signed=True)
        x = index.to(torch.int64) + offset
        for mult in (-49064778989728563, -4265267296055464877):  # the finalizer of MurmurHash3, as signed integers
            x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * mult
        return (x >> 32).to(torch.int32)


def random(seed: int) -> Criterion:
    """A uniformly random order, the control every result needs: an integer hash of (seed, name, index).

    No generator is involved, so the same mask comes out of every store, device and number of workers.

    Args:
        seed: any int.

    Returns:
        A criterion whose scores are int32 hashes.

    Raises:
        BadInput: ``seed`` is not an int.

    Example:
        >>> import torch, secateur
        >>> w = torch.ones(8)
        >>> report = secateur.prune(w, 0.5, criterion=secateur.random(0))
        >>> report.zeros
        4
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadInput(f"random(seed) takes an int, got {seed!r} ({type(seed).__name__}).")
    return RandomCriterion(seed)


def is_elementwise(criterion: Criterion) -> bool:
    """Whether the criterion may be called with pieces of a tensor, more than once."""
    return bool(getattr(criterion, "elementwise", False))


def describe(criterion: Criterion) -> str:
    """The name that plans and reports carry.

    >>> describe(magnitude), describe(random(3))
    ('magnitude', 'random(3)')
    """
    if isinstance(criterion, RandomCriterion):
        return f"random({criterion.seed})"
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def is_named(criterion: Criterion) -> bool:
    """Whether a plan can name the criterion and any process recompute its scores from the weights alone."""
    return criterion is magnitude or isinstance(criterion, RandomCriterion)


def _parameters(criterion: Criterion) -> Mapping[str, inspect.Parameter]:
    """The criterion's parameters; of a builtin, which tells none, the weight alone."""
    try:
        return inspect.signature(criterion).parameters
    except ValueError:
        return {"weight": inspect.Parameter("weight", inspect.Parameter.POSITIONAL_ONLY)}


def check_signature(criterion: Criterion) -> None:
    """Refuses a criterion that asks for something nobody provides.

    Raises:
        BadInput: not callable, or a required parameter other than the weight is not in `PROVIDED`.
    """
    if not callable(criterion):
        raise BadInput(f"criterion must be a name or a function (weight, *, name, index) -> score, got {criterion!r}.")
    params = list(_parameters(criterion).values())
    if not params:
        raise BadInput(f"criterion {describe(criterion)} takes no arguments; it must take the weight.")
    for p in params[1:]:
        known = p.name in PROVIDED or p.default is not p.empty
        if not known and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise BadInput(
                f"criterion {describe(criterion)} asks for {p.name!r}, which is not provided here; it may ask for "
                f"{', '.join(PROVIDED)} after the weight."
            )


def scores(criterion: Criterion, part: Part) -> Tensor:
    """Calls the criterion on a part, with what it asks for, and checks what comes back.

    Raises:
        BadTensor: the result is not a tensor of the weight's shape.
    """
    accepted = _parameters(criterion)
    extra: dict[str, Any] = {}
    if "name" in accepted:
        extra["name"] = part.spec.name
    if "index" in accepted:
        extra["index"] = part.index()
    # A copy, so that a function that writes to its argument does not touch the model.
    weight = part.tensor.detach()
    own = criterion is magnitude or isinstance(criterion, RandomCriterion)
    score = criterion(weight if own else weight.clone(), **extra)
    if not isinstance(score, Tensor) or score.shape != part.tensor.shape:
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise BadTensor(
            f"criterion {describe(criterion)} must return a tensor of the weight's shape for {part.spec}; got {got}."
        )
    return score.detach()
