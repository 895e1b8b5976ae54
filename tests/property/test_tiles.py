"""Units by views of pieces are units by indices of elements."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.patterns import Block, Channel
from secateur.core.tiles import Tiles
from secateur.core.types import Part, Spec

CASES = [
    (Spec("linear", (6, 8), torch.float32, "linear", 0, 1), [Block((2, 4)), Block((6, 8)), Channel("out"), Channel("in")]),
    (Spec("conv", (4, 6, 3, 3), torch.float32, "conv", 0, 1), [Block((2, 3)), Channel("out"), Channel("in")]),
    (Spec("turned", (6, 4), torch.float32, "linear", 1, 0), [Block((2, 3)), Channel("out"), Channel("in")]),
    (Spec("experts", (3, 4, 8), torch.float32, "linear", 1, 2, (0,)), [Block((2, 4)), Channel("out"), Channel("in")]),
]  # fmt: skip
PAIRS = [(spec, pattern) for spec, patterns in CASES for pattern in patterns]


@given(st.sampled_from(PAIRS), st.data())
def test_sums_largest_and_spread(pair: tuple[Spec, Block | Channel], data: st.DataObject) -> None:
    spec, pattern = pair
    grid = pattern.grid(spec)
    tiles = Tiles(grid)
    run = tiles.run if data.draw(st.booleans()) else data.draw(st.integers(1, spec.numel))
    size = run * data.draw(st.integers(1, 3))
    values = torch.randint(-50, 50, (spec.numel,))
    units = torch.randint(0, 2, (grid.units,), dtype=torch.bool)
    whole = Part(spec, values.view(spec.shape))
    of = grid.unit_of(whole.index()).reshape(-1)
    sums = torch.zeros(grid.units, dtype=torch.int64).index_add_(0, of, values)
    most = torch.full((grid.units,), -99).scatter_reduce_(0, of, values, "amax")
    found, largest, live = torch.zeros_like(sums), torch.full_like(most, -99), torch.zeros_like(sums)
    for part in whole.chunks(size):
        part = part if data.draw(st.booleans()) else replace(part, start=part.index())  # as of a strided shard
        tiles.add(found, part, part.tensor)
        tiles.add(largest, part, part.tensor, "amax")
        tiles.add(live, part, part.tensor > 0)
        assert torch.equal(tiles.spread(units, part), units[grid.unit_of(part.index())])
    assert torch.equal(found, sums)
    assert torch.equal(largest, most)
    assert int(live.sum()) == int((values > 0).sum())


def test_pieces_are_cut_where_units_allow_views() -> None:
    assert {(spec.name, str(pattern)): (Tiles(pattern.grid(spec)).dims) for spec, pattern in PAIRS} == {
        ("linear", "2x4"): ((3, 2), (2, 4)),
        ("linear", "6x8"): ((1, 48),),
        ("linear", "channel"): ((6, 8),),
        ("linear", "channel:in"): ((1, 6), (8, 1)),
        ("conv", "2x3"): ((2, 2), (2, 3), (3, 1), (3, 1)),
        ("conv", "channel"): ((4, 54),),
        ("conv", "channel:in"): ((1, 4), (6, 9)),
        ("turned", "2x3"): ((2, 3), (2, 2)),
        ("turned", "channel"): ((1, 6), (4, 1)),
        ("turned", "channel:in"): ((6, 4),),
        ("experts", "2x4"): ((6, 2), (2, 4)),
        ("experts", "channel"): ((12, 8),),
        ("experts", "channel:in"): ((3, 4), (8, 1)),
    }
    for spec, pattern in PAIRS:
        tiles = Tiles(pattern.grid(spec))
        assert prod(n for n, _ in tiles.dims) == tiles.grid.units
        assert tiles.align == (tiles.run if tiles.run > 1 else "chunk")


def test_bands_that_are_too_long_are_left_to_indices() -> None:
    spec = Spec("w", (2, 1 << 20), torch.float32, "linear", 0, 1)
    tiles = Tiles(Block((2, 1 << 10)).grid(spec))
    assert (tiles.dims, tiles.run, tiles.align) == ((), 1, "chunk")
