"""Patterns say which elements live or die together. Dims are named by role ("out", "in"), never by number."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from secateur.errors import BadInput

from .types import Member, Spec

Reduction = Literal["mean", "l1", "l2", "max"]
REDUCTIONS = ("mean", "l1", "l2", "max")


@dataclass(frozen=True)
class Grouping:
    """How a row-major tensor falls into groups: ``(outer, groups, of, inner)``; no group may lose more than ``most``."""

    outer: int
    groups: int
    of: int
    inner: int
    most: int

    @property
    def run(self) -> int:
        """Length of the contiguous run that holds whole groups."""
        return max(1, self.of * self.inner)


@runtime_checkable
class Pattern(Protocol):
    """What every pattern can say of a tensor."""

    def why_not(self, spec: Spec) -> str | None:
        """Why this tensor cannot carry the pattern, or ``None`` if it can."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Unstructured:
    """Single weights, wherever they are.

    Example:
        >>> import torch, secateur
        >>> secateur.prune(torch.tensor([3.0, -1.0]), 0.5, pattern=secateur.Unstructured()).zeros
        1
    """

    def why_not(self, spec: Spec) -> str | None:
        """Every tensor can."""
        return None

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """N:M: of every ``of`` weights in a row along the *input* dimension, ``keep`` survive. ``"2:4"`` keeps 2 of 4.

    Groups run along the input features (of a convolution: the input channels, at one kernel position), because that is the
    dimension a matrix product sums over and the one sparse hardware groups by. Sparsity is ``1 - keep / of``.

    Args:
        keep: weights that survive in each group, 1 <= keep < of.
        of: group size.

    Raises:
        BadInput: not two such ints.

    Example:
        >>> import torch, secateur
        >>> w = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
        >>> _ = secateur.prune(w, pattern=secateur.NM(keep=2, of=4))
        >>> w
        tensor([[4., 0., 3., 0.]])

    Mishra et al., "Accelerating sparse deep neural networks" (arXiv:2104.08378).
    """

    keep: int
    of: int

    def __post_init__(self) -> None:
        ints = all(isinstance(v, int) and not isinstance(v, bool) for v in (self.keep, self.of))
        if not ints or not 1 <= self.keep < self.of:
            raise BadInput(f"N:M keeps N of every M weights, 1 <= N < M; got keep={self.keep!r}, of={self.of!r}.")

    def why_not(self, spec: Spec) -> str | None:
        """The input dimension must be known and divide into groups."""
        if spec.in_dim is None:
            return f"{self} groups along the input dimension, which is not known for the role {spec.role!r}"
        size = spec.shape[spec.in_dim]
        if size % self.of:
            return f"its {size} inputs do not divide into groups of {self.of}"
        return None

    def grouping(self, spec: Spec) -> Grouping:
        """The groups of one tensor."""
        assert spec.in_dim is not None
        outer, inner = prod(spec.shape[: spec.in_dim]), prod(spec.shape[spec.in_dim + 1 :])
        return Grouping(outer, spec.shape[spec.in_dim] // self.of, self.of, inner, self.of - self.keep)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class Row:
    """Single weights that compete only inside their output row, so that every output feature loses the same share.

    A tensor's count comes from the allocation and is exact; its rows lose equal shares of it, to within one weight: rank by
    rank, and in the last rank the lowest scores first. It is how Wanda compares (arXiv:2306.11695). A row of a convolution is
    all weights of one output channel.

    Example:
        >>> import torch, secateur
        >>> w = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
        >>> _ = secateur.prune(w, 0.5, pattern=secateur.Row())
        >>> w
        tensor([[ 0.,  0.,  3.,  4.],
                [ 0.,  0., 30., 40.]])
    """

    def why_not(self, spec: Spec) -> str | None:
        """The output dim must be known, and the rest of the dims lie on one side of it."""
        if spec.out_dim is None:
            return f"which dimension holds the outputs is not known for the role {spec.role!r}"
        if spec.role == "conv_transpose":
            return "an output channel of a transposed convolution is not one run of its weight"
        return None

    def grouping(self, spec: Spec) -> Grouping:
        """The rows of one tensor, each a group that may go wholly."""
        assert spec.out_dim is not None
        inside = [d for d in range(len(spec.shape)) if d != spec.out_dim and d not in spec.batch_dims]
        after = prod(spec.shape[d] for d in range(len(spec.shape)) if d > max(inside, default=-1))
        size = prod(spec.shape[d] for d in inside)
        return Grouping(prod(spec.shape) // max(1, size * after), 1, size, after, size)

    def __str__(self) -> str:
        return "row"


GroupPattern = NM | Row


@dataclass(frozen=True)
class Grid:
    """The units of one tensor: how many, how many weights each, and which unit an element belongs to.

    An element's unit is ``sum((coordinate[d] // block[d]) * stride[d])`` over all dims; a stride of 0 leaves a dim inside
    the unit. ``followers`` are tensors whose slices go with the units but have no say (a layer's bias).
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    stride: tuple[int, ...]
    units: int
    unit_size: int
    followers: tuple[Member, ...] = ()

    def unit_of(self, index: Tensor) -> Tensor:
        """Unit ids (int64, same shape) of elements given by flat index."""
        unit = index.new_zeros(index.shape)
        inner = 1
        for size, block, stride in reversed(list(zip(self.shape, self.block, self.stride, strict=True))):
            if stride:
                unit += (index // inner % size) // block * stride
            inner *= size
        return unit


def _grid(spec: Spec, block: dict[int, int], followers: tuple[Member, ...] = ()) -> Grid:
    """A grid with the given block edge along some dims (0: the whole dim), unit ids in row-major order of the blocks."""
    edges = [s if block[d] == 0 else block[d] for d, s in enumerate(spec.shape)]
    counts = [s // max(e, 1) for s, e in zip(spec.shape, edges, strict=True)]
    strides, units, size = [0] * len(edges), 1, 1
    for d in reversed(range(len(edges))):
        strides[d] = units if counts[d] > 1 else 0
        units *= counts[d]
        size *= edges[d]
    return Grid(spec.shape, tuple(edges), tuple(strides), units, size, followers)


@dataclass(frozen=True)
class Block:
    """Blocks of ``(rows, columns)`` over (output, input) features; each kernel position and each expert has its own.

    Args:
        shape: block height (outputs) and width (inputs), both >= 1; the tensor's dims must be multiples of them.
        reduce: how a block's scores become one: ``"mean"``, ``"l1"``, ``"l2"``, ``"max"``; by default ``"l2"`` of
            magnitudes within a tensor, and ``"mean"`` where blocks of several tensors compete and of every other
            criterion. ``"l1"`` and ``"l2"`` are norms and refused where a score is negative. A zero weight counts as 0
            in a mean or norm, and not at all in ``"max"``.

    Raises:
        BadInput: not two ints >= 1, or an unknown reduction.

    Example:
        >>> import torch, secateur
        >>> w = torch.tensor([[1.0, 1.0, 5.0, 0.1], [1.0, 1.0, 0.1, 0.1]])
        >>> _ = secateur.prune(w, 0.5, pattern=secateur.Block((2, 2)))
        >>> w
        tensor([[0.0000, 0.0000, 5.0000, 0.1000],
                [0.0000, 0.0000, 0.1000, 0.1000]])
    """

    shape: tuple[int, int]
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        ok = isinstance(self.shape, tuple) and len(self.shape) == 2
        if not ok or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in self.shape):
            raise BadInput(f"a block's shape is (rows, columns), two ints >= 1; got {self.shape!r}.")
        check_reduction(self.reduce)

    def why_not(self, spec: Spec) -> str | None:
        """Both feature dims must be known and multiples of the block."""
        if spec.out_dim is None or spec.in_dim is None:
            return (
                f"{self} blocks need an output and an input dimension, which are not known for the role {spec.role!r}"
            )
        rows, columns = spec.shape[spec.out_dim], spec.shape[spec.in_dim]
        if rows % self.shape[0] or columns % self.shape[1]:
            return f"its {rows} outputs and {columns} inputs are not multiples of {self.shape[0]} and {self.shape[1]}"
        return None

    def grid(self, spec: Spec) -> Grid:
        """The blocks of one tensor."""
        edges = dict.fromkeys(range(len(spec.shape)), 1)
        assert spec.out_dim is not None and spec.in_dim is not None
        edges[spec.out_dim], edges[spec.in_dim] = self.shape
        return _grid(spec, edges)

    def __str__(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}"


@dataclass(frozen=True)
class Channel:
    """Whole channels: all weights of one output (or input) feature. An output channel takes its layer's bias along.

    A weight tied over several layers takes the bias of each. A bias does not count in the sparsity (it is not a chosen
    weight); the report lists it.

    Args:
        side: ``"out"`` or ``"in"``.
        reduce: how a channel's scores become one, as for `Block`.

    Raises:
        BadInput: another side, or an unknown reduction.

    Example:
        >>> import torch, secateur
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight.data, layer.bias.data = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.ones(2)
        >>> _ = secateur.prune(layer, 0.5, pattern=secateur.Channel("out"))
        >>> layer.weight.data, layer.bias.data
        (tensor([[0., 0.],
                [2., 2.]]), tensor([0., 1.]))

    Li et al., "Pruning filters for efficient ConvNets" (arXiv:1608.08710).
    """

    side: Literal["out", "in"] = "out"
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        if self.side not in ("out", "in"):
            raise BadInput(f'Channel takes "out" or "in", got {self.side!r}.')
        check_reduction(self.reduce)

    def why_not(self, spec: Spec) -> str | None:
        """The dim must be known, and a unit must be one slice of one tensor."""
        if (spec.out_dim if self.side == "out" else spec.in_dim) is None:
            return f"which dimension holds the {self.side}put channels is not known for the role {spec.role!r}"
        if spec.role == "recurrent":
            return "a hidden unit of a recurrent layer spans its gates and both weights, not one row"
        split = self.side == "in" if spec.role == "conv" else self.side == "out"
        if spec.groups > 1 and split:
            return f"with groups={spec.groups} an {self.side}put channel is not one slice of the weight"
        return None

    def grid(self, spec: Spec) -> Grid:
        """The channels of one tensor, with the biases that follow them."""
        dim = spec.out_dim if self.side == "out" else spec.in_dim
        assert dim is not None
        edges = {d: 1 if d == dim or d in spec.batch_dims else 0 for d in range(len(spec.shape))}
        biases = [spec.bias, *spec.more_biases] if self.side == "out" else []
        return _grid(spec, edges, tuple(Member(b) for b in biases if b))

    def __str__(self) -> str:
        return "channel" if self.side == "out" else "channel:in"


def check_reduction(reduce: str | None) -> None:
    """Refuses what is no `Reduction`.

    Raises:
        BadInput: an unknown one.
    """
    if reduce is not None and reduce not in REDUCTIONS:
        raise BadInput(f"reduce must be one of {', '.join(REDUCTIONS)} or None, got {reduce!r}.")
