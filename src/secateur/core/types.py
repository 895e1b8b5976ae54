"""What the pure core knows of a tensor: its description (`Spec`) and the piece of it at hand (`Part`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Align = Literal["chunk", "whole", "resident"] | int
"""What a part must not cut: nothing; a run of so many elements (for N:M the contiguous run of memory that whole groups lie
in); or the tensor itself. ``"resident"`` asks for whole tensors where they are in memory anyway, and for nothing elsewhere."""

Reduce = Callable[[Tensor], Tensor]
"""Sums an int64 tensor of counts over all workers; the identity where there is one."""


def units_along(sections: tuple[int, ...], units: int) -> Tensor:
    """Which unit each feature belongs to, int64, where every section holds an equal share of each unit.

    >>> units_along((4, 2), 2)
    tensor([0, 0, 1, 1, 0, 1])
    """
    return torch.cat([torch.arange(size) // max(1, size // units) for size in sections])


@dataclass(frozen=True)
class Member:
    """A tensor that goes with another's units.

    Attributes:
        name: of the tensor.
        sections: sizes of what lies in it one after another, each with an equal share of every unit; empty where its element
            ``i``, flat, belongs to unit ``i``.
    """

    name: str
    sections: tuple[int, ...] = ()

    def numel(self, units: int) -> int:
        """How many elements it has, beside so many units."""
        return sum(self.sections) if self.sections else units

    def units(self, units: int) -> Tensor:
        """The unit of each of its elements, flat, of so many units."""
        return units_along(self.sections, units) if self.sections else torch.arange(units)


@dataclass(frozen=True)
class Attention:
    """A tensor's place in a layer of attention, whose heads it shares with the layer's other projections.

    Attributes:
        layer: name of the module that holds the layer.
        tensors: names of the layer's projections, this one among them.
        dim: the dim that the heads lie along: the outputs of queries, keys and values, the inputs of the output projection.
        sections: sizes of what lies along ``dim`` one after another, each with an equal share of every head.
        queries, keys, values, outputs: features of the layer's projections; ``outputs`` are those that come together in the
            output projection.
        followers: biases that go along.
    """

    layer: str
    tensors: tuple[str, ...]
    dim: int
    sections: tuple[int, ...]
    queries: int
    keys: int
    values: int
    outputs: int
    followers: tuple[Member, ...] = ()


@dataclass(frozen=True)
class Spec:
    """One tensor as its store describes it, before a value is read.

    Attributes:
        name: canonical name, without wrappers; for tied tensors the first registered.
        shape: full shape, also where a part holds only a piece.
        dtype: of the stored values.
        role: what the tensor does, one of `secateur.stores.roles.ROLES`.
        out_dim, in_dim: dims that index output and input features; ``None`` where there is none or it is not known.
        batch_dims: dims that stack independent weights (experts); the remaining dims are spatial (a kernel).
        groups: of a grouped convolution, else 1.
        bias: name of the bias that belongs to the output channels, if any.
        more_biases: those of the other layers that a tied weight belongs to.
        aliases: the other names of the same storage, and names with wrappers in them.
        skip: why the tensor is not chosen, or ``None`` if it is.
        named: whether the user asked for it by full name.
        order: position in the model's own order of registration; ``None`` where the store does not know it (a file).
        attention: its place in a layer of attention, where names and shapes tell.
        members: the tensors that together have the units of this one, which is then no tensor but a layer of several:
            its shape is (units, weights in a unit). Empty for a tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    out_dim: int | None = None
    in_dim: int | None = None
    batch_dims: tuple[int, ...] = ()
    groups: int = 1
    bias: str | None = None
    aliases: tuple[str, ...] = ()
    skip: str | None = None
    named: bool = False
    order: int | None = None
    more_biases: tuple[str, ...] = ()
    attention: Attention | None = None
    members: tuple[Spec, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    def __str__(self) -> str:
        return f"{self.name!r} (shape {tuple(self.shape)}, {str(self.dtype).removeprefix('torch.')})"


@dataclass(frozen=True)
class Part:
    """A piece of one tensor, in memory now.

    Attributes:
        spec: the tensor it belongs to.
        tensor: the values, any strides; the store's own storage where it can be written in place.
        start: flat index, in the whole tensor, of the first element of a piece that is contiguous there in row-major
            order; or an int64 tensor of ``tensor``'s shape with every element's flat index (a strided shard).
        resident: whether the values are in memory anyway, so that holding the part costs nothing.
    """

    spec: Spec
    tensor: Tensor
    start: int | Tensor = 0
    resident: bool = False

    @property
    def whole(self) -> bool:
        """Whether the part is the whole tensor."""
        return isinstance(self.start, int) and self.tensor.numel() == self.spec.numel

    def chunks(self, size: int) -> Iterator[Part]:
        """The part in flat pieces of at most ``size`` elements, in order, at least one; views where strides allow."""
        flat = self.tensor.reshape(-1)
        start = self.start if isinstance(self.start, int) else self.start.reshape(-1)
        for a in range(0, max(1, flat.numel()), size):
            at = start + a if isinstance(start, int) else start[a : a + size]
            yield Part(self.spec, flat[a : a + size], at)

    def index(self) -> Tensor:
        """Flat index of each element in the whole tensor, int64, of ``tensor``'s shape."""
        if isinstance(self.start, Tensor):
            return self.start
        n = self.tensor.numel()
        return torch.arange(self.start, self.start + n, device=self.tensor.device).view(self.tensor.shape)


Parts = Callable[[Spec, Align], Iterable[Part]]
"""Where the core gets values from: a store's ``parts``. May be called many times; must yield the same pieces."""
