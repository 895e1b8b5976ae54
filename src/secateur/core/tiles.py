"""Sums over the units of a tensor, and units spread over its elements: by views where a piece allows it, else by indices.

Blocks and channels tile a tensor in row-major order. So a flat piece that holds whole *bands* (of the first dim as many rows
as a unit is high) is a view of shape ``(bands, rows of a unit, blocks, width of a block, …)``, and every other dim lies inside
the units. Dims are merged where that leaves the tiling as it is: a convolution's output channels are one dim of runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

from .heads import Slices
from .keys import CHUNK
from .patterns import Grid
from .types import Align, Part


@dataclass(frozen=True)
class Tiles:
    """The units of one tensor, laid over pieces of it.

    Example:
        >>> from secateur.core.types import Spec
        >>> spec = Spec("w", (4, 2), torch.float32, "linear")
        >>> tiles = Tiles(Grid((4, 2), (2, 1), (2, 1), units=4, unit_size=2))
        >>> tiles.dims, tiles.run
        (((2, 2), (2, 1)), 4)
        >>> table = torch.zeros(4, dtype=torch.int64)
        >>> tiles.add(table, Part(spec, torch.zeros(4), 4), torch.tensor([1, 2, 3, 4]))
        >>> table
        tensor([0, 0, 4, 6])
    """

    grid: Grid | Slices

    @cached_property
    def dims(self) -> tuple[tuple[int, int], ...]:
        """(units, elements of one) along each dim, as few dims as will do; none where units do not tile the tensor, or where a
        band is too long for a piece."""
        if not isinstance(self.grid, Grid) or 0 in self.grid.shape:
            return ()
        dims = [(size // edge, edge) for size, edge in zip(self.grid.shape, self.grid.block, strict=True)]
        while len(dims) > 1 and dims[-1][0] == 1:  # a unit goes through all of the last dim
            _, edge = dims.pop()
            dims[-1] = dims[-1][0], dims[-1][1] * edge
        while len(dims) > 1 and dims[0][1] == 1:  # and is one element high in the first
            many, _ = dims.pop(0)
            dims[0] = dims[0][0] * many, dims[0][1]
        return tuple(dims) if dims[0][1] * prod(n * e for n, e in dims[1:]) <= CHUNK else ()

    @property
    def run(self) -> int:
        """Elements of a band, which pieces should not cut; 1 where there are none."""
        return self.dims[0][1] * prod(n * e for n, e in self.dims[1:]) if self.dims else 1

    @property
    def align(self) -> Align:
        """How to ask for pieces that `add` and `spread` are fast with."""
        return self.run if self.run > 1 else "chunk"

    def add(self, table: Tensor, part: Part, values: Tensor, how: Literal["sum", "amax"] = "sum") -> None:
        """Adds to a table of units a flat piece's values, int64 or bool, both on the CPU; or takes the largest."""
        place = self._place(part)
        if place is None:
            unit = self.grid.unit_of(part.index()).reshape(-1).cpu()
            table.scatter_reduce_(0, unit, values.reshape(-1).to(table.dtype), how)
            return
        first, shape = place
        found = values.reshape(shape)
        for dim in range(1, len(self.dims) + 1):  # the shape loses a dim each time
            found = found.sum(dim) if how == "sum" else found.amax(dim)
        here = table[first : first + found.numel()]
        here.copy_(here + found.reshape(-1) if how == "sum" else torch.maximum(here, found.reshape(-1)))

    def spread(self, units: Tensor, part: Part) -> Tensor:
        """What a table says of the unit of each of a flat piece's elements, of the piece's shape and on its device."""
        units, place = units.to(part.tensor.device), self._place(part)
        if place is None:
            return units[self.grid.unit_of(part.index())]
        first, shape = place
        narrow = [1 if i % 2 else n for i, n in enumerate(shape)]
        return units[first : first + prod(narrow)].view(narrow).expand(shape).reshape(part.tensor.shape)

    def _place(self, part: Part) -> tuple[int, tuple[int, ...]] | None:
        """The first unit of a piece of whole bands, and its shape, where every second dim lies inside the units."""
        count = part.tensor.numel()
        if not self.dims or not isinstance(part.start, int) or part.start % self.run or count % self.run:
            return None
        bands, inner = count // self.run, self.dims[1:]
        shape = bands, self.dims[0][1], *(n for dim in inner for n in dim)
        return part.start // self.run * prod(n for n, _ in inner), shape
