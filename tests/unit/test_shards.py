"""Which elements of a tensor lie in a process: as torch itself cuts them, every one in one place."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from secateur.core.patterns import Grouping
from secateur.stores.shards import Place, _along, place_of

SIZES = (0, 1, 2, 5, 8, 13)


def by_torch(whole: Tensor, ways: list[tuple[Any, int, int]]) -> Tensor:
    """What is left of a tensor after cuts in turn, by the placements' own methods."""
    for placement, pieces, which in ways:
        whole = placement._split_tensor(whole, pieces, with_padding=False)[0][which]
    return whole


def cuts(rows: Any, columns: Any, outer: int, inner: int) -> list[list[tuple[Any, int, int]]]:
    """The cuts of every process of a mesh of two dims."""
    return [[(rows, outer, i), (columns, inner, j)] for i, j in product(range(outer), range(inner))]


@pytest.mark.parametrize(("outer", "inner"), list(product((1, 2, 3, 4), repeat=2)))
def test_every_element_lies_where_torch_puts_it(outer: int, inner: int) -> None:
    for rows in SIZES:
        whole = torch.arange(rows * 6).view(rows, 3, 2)
        kinds = (
            (_StridedShard(0, split_factor=inner), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(2), Shard(1)),
        )  # fmt: skip
        for kind in kinds:
            seen = []
            for ways in cuts(*kind, outer, inner):
                place = Place((rows, 3, 2), _along((rows, 3, 2), ways))
                want = by_torch(whole, ways)
                assert place.local_shape == tuple(want.shape)
                assert torch.equal(place.index(), want)
                assert torch.equal(place.taken(whole), want)
                if place.begin is not None and want.numel():
                    assert torch.equal(want.flatten(), place.begin + torch.arange(want.numel()))
                seen.append(want.flatten())
            assert torch.equal(torch.cat(seen).sort().values, whole.flatten())


def test_what_is_one_run_has_no_indices() -> None:
    for shape, ways, begin in (
        ((5, 4), [(Shard(0), 2, 1)], 12), ((1, 6), [(Shard(1), 2, 1)], 3), ((5, 4), [(Shard(1), 2, 1)], None),
        ((8, 2), [(_StridedShard(0, split_factor=2), 2, 1)], None),
    ):  # fmt: skip
        assert Place(shape, _along(shape, ways)).begin == begin  # type: ignore[arg-type]


@pytest.mark.parametrize("outer", [1, 2, 3])
def test_groups_that_are_cut_are_found(outer: int) -> None:
    shape = (6, 8, 3)
    flat = torch.arange(6 * 8 * 3).view(shape)
    groupings = {  # which group each element belongs to, written out
        Grouping(6, 2, 4, 3, 2): flat // 24 * 2 + flat // 3 % 8 // 4,
        Grouping(1, 3, 2, 24, 1): flat // 48,
        Grouping(6, 1, 24, 1, 24): flat // 24,
    }
    for dim, which in product(range(3), range(outer)):
        ways = [(Shard(dim), outer, which)]
        place = Place(shape, _along(shape, ways))
        for grouping, of in groupings.items():
            groups, counts = place.taken(of).unique(return_counts=True)
            whole = all(int(c) == int((of == g).sum()) for g, c in zip(groups, counts, strict=True))
            if grouping.inner * grouping.of == 12 and dim == 2 and outer > 1:
                continue  # groups of one column each are whole there, but no longer run side by side
            assert place.cuts_groups(grouping) != whole, (dim, which, grouping)


def test_plain_tensors_are_counted_by_the_first() -> None:
    assert [place_of(torch.zeros(2), rank).counts for rank in (0, 1)] == [True, False]
