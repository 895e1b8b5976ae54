"""What all solvers share: the layer's matrix and Hessian checked, damping, the order in which weights go, the loss.

A linear layer with weights ``W`` (out, in) is fed ``x_1 … x_n``. Moving its weights by ``D`` changes its outputs by ``D x``,
and the mean squared change is a quadratic form in the Hessian ``H = 2/n sum(x x^T)`` (in, in), the same for every row::

    1/n sum(|D x|^2) = 1/2 tr(D H D^T)

That is the loss every solver here keeps low. ``H`` is factored in float64 whatever it was summed in: a few inputs of a
language model are thousands of times larger than the rest and nearly collinear, and what is left of them when the others
are accounted for is lost in float32.

**Dead inputs**, whose diagonal entry is 0, never carried a signal: their weights cost nothing and go first, after those
that are zero already. They count. Their diagonal entry is taken as 1 and all they share with others as 0.

**Damping** adds ``share * mean(diag H)`` to the diagonal, the mean over inputs that are not dead (SparseGPT's code puts the
ones of the dead into it, which makes the result depend on the scale of the inputs). It also is the price of moving a
weight: the loss then minimised is ``1/2 tr(D H D^T) + damping/2 |D|^2``, so it never draws weights to zero. Where the
damped Hessian is not positive definite in floating point, the share is raised tenfold, and what was added is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from secateur.core.keys import FORMATS, nonzero
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.rewire import lowest
from secateur.core.types import Spec
from secateur.errors import BadInput, BadTensor, NotDefined

T = TypeVar("T")

FIRST_SHARE = 1e-8
"""The share that is tried where none was asked for and the Hessian turns out to be singular."""

MOST_SHARE = 10.0
"""Beyond this share no sum of ``x x^T`` fails, and damping would decide more than the data."""

NOISE = {torch.float32: 1e-6, torch.float64: 1e-10}
"""By dtype of the Hessian: a pivot below this share of its diagonal entry is what rounding left of a singular matrix."""

BATCH = 1 << 22
"""Numbers that a batch of rows may hold in one of its work arrays: 32 MiB in float64."""


class Solution(NamedTuple):
    """What a solver makes of a layer.

    Attributes:
        weight: (out, in), contiguous, in the dtype the solver works in; what was pruned is +0.0. Nothing is shared with
            the input.
        mask: bool, same shape, contiguous, ``True`` = keep. A survivor may come out as exactly zero; it is kept all the same.
        loss: ``1/2 tr(D H D^T)`` of the undamped Hessian, for ``D`` the change of the weights: with ``H = 2/n sum(x x^T)``
            the mean squared error of the layer's outputs. Measured in float64 from the result.
        damping: what was added to the diagonal of the Hessian, in its own units; ``None`` where that is not told.
    """

    weight: Tensor
    mask: Tensor
    loss: float
    damping: float | None


class Solver(Protocol):
    """A function that prunes a matrix to a count and moves what stays."""

    def __call__(self, weight: Tensor, *, hessian: Tensor, pattern: Pattern, count: int, name: str = "") -> Solution:
        """Solves one layer.

        Args:
            weight: (out, in), any real float dtype, any strides; not written to.
            hessian: (in, in), float32 or float64, symmetric, on the same device; not written to.
            pattern: `Unstructured` or `NM`, whose groups run along the inputs.
            count: zeros in all when done. Weights that are zero stay zero and count first; if there are more of them than
                that, nothing else is pruned (in an N:M group likewise).
            name: of the tensor, for messages.

        Returns:
            The weights, the mask, what it costs, and the damping it took.
        """
        ...


@contextmanager
def exactly() -> Iterator[None]:
    """Full float32 products, whatever the user allowed elsewhere: no TF32, no bfloat16; and no gradients."""
    backends = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    before = [b.fp32_precision for b in backends]
    with ExitStack() as stack:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = "ieee"
            stack.callback(setattr, backend, "fp32_precision", precision)
        stack.enter_context(torch.no_grad())
        yield


@dataclass(frozen=True)
class Layer:
    """One layer's matrix and Hessian, checked.

    Attributes:
        spec: name, shape and dtype as given.
        weight: (out, in), float32 or float64, contiguous; may share memory with what was given.
        zero: bool, (out, in): where it is zero already.
        hessian: (in, in), float64, symmetric, undamped; a copy. Rows and columns of dead inputs are 0.
        dead: bool, (in,).
        scale: mean of its diagonal over inputs that are not dead.
        noise: which of its pivots say nothing, of `NOISE`.
    """

    spec: Spec
    weight: Tensor
    zero: Tensor
    hessian: Tensor
    dead: Tensor
    scale: float
    noise: float

    @staticmethod
    def of(weight: Tensor, hessian: Tensor, name: str, dtype: torch.dtype | None = None) -> Layer:
        """Checks and prepares a layer; weights in ``dtype``, by default float64 if that is theirs and else float32.

        Raises:
            BadTensor: not a matrix of finite real floats, or no Hessian of it (see `_refuse_hessian`), or all inputs dead.
        """
        spec = _spec_of(weight, name)
        if dtype is None:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        w = weight.detach().to(dtype).contiguous()
        if bad := int((~torch.isfinite(w)).sum()):
            raise BadTensor(
                f"{spec} holds {bad} NaN or infinite weight{'s' if bad > 1 else ''}. Repair the model first."
            )
        h, dead = _curvature(spec, weight, hessian)
        return Layer(spec, w, ~nonzero(weight), h, dead, float(h.diagonal()[~dead].mean()), NOISE[hessian.dtype])

    def damped(self, damping: float) -> Tensor:
        """The Hessian to invert: with ``damping`` on its diagonal, and 1 more for dead inputs; a copy."""
        h = self.hessian.clone()
        h.diagonal().add_(self.dead).add_(damping)
        return h

    def solved(self, weight: Tensor, gone: Tensor, damping: float) -> Solution:
        """The solution with zeros where weights are gone, and its loss.

        Raises:
            BadTensor: weights that are not finite.
        """
        out = weight.masked_fill(gone, 0.0).contiguous()
        if not bool(torch.isfinite(out).all()):
            raise BadTensor(
                f"the solution for {self.spec} is not finite: its weights or its Hessian are too large or too far apart "
                "for the arithmetic. Give the weights in float64, or a higher damping."
            )
        moved = out.to(torch.float64) - self.weight.to(torch.float64)
        loss = 0.5 * float(((moved @ self.hessian) * moved).sum())
        return Solution(out, (~gone).contiguous(), max(loss, 0.0), damping)


def _spec_of(weight: Tensor, name: str) -> Spec:
    """The matrix as the messages name it; refused if it is none."""
    spec = Spec(name or "weight", tuple(weight.shape), weight.dtype, "linear", 0, 1)
    if weight.ndim != 2 or not weight.numel():
        raise BadTensor(f"solvers work on a matrix (out, in) that is not empty; {spec} is none. Reshape it first.")
    if weight.dtype not in FORMATS or weight.layout != torch.strided or weight.is_meta:
        raise BadTensor(f"{spec} does not hold real floats in memory ({weight.layout}, {weight.device}).")
    return spec


def _curvature(spec: Spec, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """A Hessian in float64, made exactly symmetric, and which inputs are dead; a copy."""
    _refuse_hessian(spec, weight, hessian)
    h = hessian.detach().to(torch.float64).contiguous()
    h = (h + h.t()) / 2
    dead = h.diagonal() == 0
    if bool(dead.all()):
        raise BadTensor(
            f"all {len(dead)} inputs of {spec} are dead: the diagonal of its Hessian is zero, so no calibration data "
            "reached it. Calibrate with data that does, or prune it by magnitude."
        )
    return h.masked_fill_(dead[:, None] | dead[None, :], 0.0), dead


def _refuse_hessian(spec: Spec, weight: Tensor, hessian: Tensor) -> None:
    """Raises where a tensor cannot be ``2/n sum(x x^T)`` of this layer's inputs."""
    what, wanted = f"the Hessian of {spec}", (spec.shape[1],) * 2
    if tuple(hessian.shape) != wanted:
        raise BadTensor(f"{what} must have the shape {wanted} (in, in), got {tuple(hessian.shape)}.")
    if hessian.dtype not in NOISE:
        raise BadTensor(f"{what} is {hessian.dtype}: sum it in float32 or float64.")
    if hessian.device != weight.device:
        raise BadTensor(f"{what} is on {hessian.device}, the weights on {weight.device}: move one to the other.")
    if bad := int((~torch.isfinite(hessian)).sum()):
        raise BadTensor(f"{what} holds {bad} NaN or infinite values. Look for them in the calibration data.")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()):
        raise BadTensor(f"{what} has a negative diagonal: it is not a sum of x x^T.")
    unseen = hessian[diagonal == 0].abs()
    if unseen.numel() and float(unseen.max()) > 1e-6 * float(diagonal.max()):
        raise BadTensor(f"{what} has entries beside a diagonal that is zero: it is not a sum of x x^T.")
    apart = float((hessian - hessian.t()).abs().max())
    if apart > 1e-3 * float(diagonal.max()):
        raise BadTensor(f"{what} is not symmetric: entries differ from their mirror image by up to {apart:.3g}.")


def check_damping(damping: Any) -> None:
    """Refuses a share that is not a finite number of at least 0.

    Raises:
        BadInput: of any other kind.
    """
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not number or not math.isfinite(damping) or damping < 0:
        raise BadInput(f"damping is a share of the Hessian's mean diagonal, a number >= 0; got {damping!r}.")


def check_request(spec: Spec, pattern: Pattern, count: int) -> None:
    """Refuses a pattern that solvers do not know, or a count that the matrix or the pattern has not.

    Raises:
        BadInput: a count that is not an int between 0 and the number of weights.
        NotDefined: another pattern than `Unstructured` and `NM`, inputs that do not divide into groups, or N:M with
            another count than its own.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= spec.numel:
        raise BadInput(f"count is how many weights of {spec} are zero when done, 0 to {spec.numel}; got {count!r}.")
    if not isinstance(pattern, Unstructured | NM):
        raise NotDefined(f"solvers prune single weights or N:M; {pattern!r} of {spec} they cannot.")
    if reason := pattern.why_not(spec):
        raise NotDefined(f"{spec} cannot carry {pattern}: {reason}.")
    if isinstance(pattern, NM) and count != (full := spec.numel // pattern.of * (pattern.of - pattern.keep)):
        raise NotDefined(f"{pattern} leaves {full} of the {spec.numel} weights of {spec} zero; got count={count}.")


def keys_of(score: Tensor, zero: Tensor, dead: Tensor) -> Tensor:
    """Int64 keys from 1 up: weights that are zero, then those of dead inputs, then by score, float64 and not negative.

    >>> keys = keys_of(torch.tensor([2.0, 0.5, 0.1, 3.0]), *torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool())
    >>> keys.argsort().tolist()
    [3, 2, 1, 0]
    """
    return (score.to(torch.float64).view(torch.int64) + 3).masked_fill_(dead & ~zero, 2).masked_fill_(zero, 1)


def first(keys: Tensor, count: int) -> Tensor:
    """Where the ``count`` lowest of a matrix of keys from 1 up are, of equal ones those at the lower flat index; bool.

    >>> first(torch.tensor([[3, 1], [1, 1]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = keys.reshape(-1)
    every = torch.ones_like(flat, dtype=torch.bool)
    return lowest(Spec("", tuple(keys.shape), torch.float64, ""), flat, every, count).view(keys.shape)


def lower(h: Tensor, noise: float) -> Tensor | None:
    """Cholesky factors ``L L^T`` of one or many float64 matrices, or ``None`` where one is singular to working precision.

    A pivot is what of an input the ones before it do not explain. At or below ``noise``, as a share of the diagonal entry,
    it says nothing. (A rule of thumb: where inputs depend on each other in many ways, rounding can leave more.)
    """
    factor, info = torch.linalg.cholesky_ex(h)
    pivots, diagonal = factor.diagonal(dim1=-2, dim2=-1).square(), h.diagonal(dim1=-2, dim2=-1)
    sound = (pivots > noise * diagonal).all() & (info == 0).all()
    return factor if bool(sound) else None


def with_damping(layer: Layer, share: float, attempt: Callable[[Tensor, float], T | None]) -> tuple[T, float]:
    """What ``attempt(h, noise)`` makes of the damped Hessian, at the first share from ``share`` up where it succeeds.

    Returns:
        The result, and the damping that was added.

    Raises:
        BadTensor: it fails at every share.
    """
    asked, share = share, float(share)
    while True:
        found = attempt(layer.damped(share * layer.scale), layer.noise)
        if found is not None:
            return found, share * layer.scale
        if share >= MOST_SHARE:
            raise BadTensor(
                f"the Hessian of {layer.spec} is not positive definite, also with {share:g} times its mean diagonal added "
                f"(asked: {asked:g}): it is not a sum of x x^T. Was it damaged on its way, or summed in a narrow format?"
            )
        share = max(10 * share, FIRST_SHARE)
