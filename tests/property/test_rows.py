"""Rows against a brute force by ranks: any layout, dtype, ties, zeros, pieces, workers, counts; and against a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.groups import Ranked, partial_cuts
from secateur.core.keys import FORMATS, magnitude_key
from secateur.core.rows import Rows, at_rank
from secateur.core.select import Keyed, Space, identity
from secateur.core.types import Part, Spec
from tests.property.worlds import DTYPES, FILLS, Exchange, Pieces, example, gone_of, selecting, whole

SHAPES = {
    "linear": ((5, 7), 0, ()),
    "linear_transposed": ((7, 5), 1, ()),
    "bilinear": ((3, 2, 4), 0, ()),
    "conv": ((4, 2, 3, 2), 0, ()),
    "experts": ((2, 3, 5), 1, (0,)),
    "experts_transposed": ((2, 5, 3), 2, (0,)),
}
"""Role, and a shape with its output dim and its stacked dims."""
layouts = st.sampled_from(sorted(SHAPES))


def spec_of(role: str, dtype: torch.dtype) -> Spec:
    shape, out_dim, batch = SHAPES[role]
    return Spec("w", shape, dtype, role, out_dim, 1 - min(out_dim, 1), batch)


def row_of(spec: Spec) -> np.ndarray:
    """The row of every element, row-major."""
    grid = np.indices(spec.shape)
    row = grid[spec.out_dim]
    for d in spec.batch_dims:
        row = row + grid[d] * spec.shape[spec.out_dim or 0]
    return row.ravel()


def expected(spec: Spec, score: np.ndarray, dead: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` first lie in the order (zero first, rank in the row, score, flat index), and all that are zero."""
    row, flat = row_of(spec), np.where(dead, -np.inf, score)
    rank = np.zeros(flat.size, dtype=int)
    for r in np.unique(row):
        own = np.flatnonzero(row == r)
        rank[own[np.argsort(flat[own], kind="stable")]] = np.arange(len(own))
    gone = dead.copy()
    order = np.lexsort((np.arange(flat.size), flat, np.where(dead, -1, rank)))
    gone[order[:count]] = True
    return gone


def wide(t: Tensor) -> np.ndarray:
    return t.to(torch.float64).numpy().ravel()


@settings(max_examples=120)
@given(st.data())
def test_any_layout_dtype_count_and_pieces(data: st.DataObject) -> None:
    role, dtype = data.draw(layouts), data.draw(st.sampled_from(DTYPES))
    spec = spec_of(role, dtype)
    t = example(spec.shape, dtype, data.draw(st.sampled_from(FILLS)), seed=data.draw(st.integers(0, 5)))
    count = data.draw(st.sampled_from([0, 1, spec.numel]) | st.integers(0, spec.numel))
    run = secateur.Row().grouping(spec).run
    pieces = Pieces({"w": t}, run * data.draw(st.integers(1, 2)), data.draw(st.booleans()), runs=run)
    must = expected(spec, np.abs(wide(t)), wide(t) == 0, count)
    found = []
    for parts in (whole({"w": t}), whole({"w": t.transpose(0, -1).contiguous().transpose(0, -1)}), pieces.parts):
        selector = selecting(parts, secateur.Row())
        (taken,) = selector.take([spec], count)
        np.testing.assert_array_equal(gone_of(selector, spec, taken).numpy(), must)
        assert (taken.pruned, taken.zeros) == (int(must.sum()), int((wide(t) == 0).sum()))
        found.append(taken)
    assert len(set(found)) == 1


@settings(max_examples=60)
@given(st.data())
def test_signed_scores(data: st.DataObject) -> None:
    spec = spec_of(data.draw(layouts), torch.float32)
    t = example(spec.shape, torch.float32, data.draw(st.sampled_from(["normal", "sparse", "zeros"])))
    numbers = data.draw(st.lists(st.integers(-3, 3), min_size=spec.numel, max_size=spec.numel))
    score = torch.tensor(numbers, dtype=torch.float32).view(spec.shape)
    count = data.draw(st.integers(0, spec.numel))
    selector = selecting(whole({"w": t}), secateur.Row(), criterion=lambda weight: score)
    (taken,) = selector.take([spec], count)
    must = expected(spec, wide(score), wide(t) == 0, count)
    np.testing.assert_array_equal(gone_of(selector, spec, taken).numpy(), must)


@settings(max_examples=60)
@given(st.data())
def test_rows_lose_alike_and_never_get_one_back(data: st.DataObject) -> None:
    """On weights without zeros all rows lose the same but for one, and a larger count contains a smaller."""
    spec = spec_of(data.draw(layouts), torch.float32)
    t = example(spec.shape, torch.float32, data.draw(st.sampled_from(["normal", "equal"])))
    lower, upper = sorted(data.draw(st.tuples(st.integers(0, spec.numel), st.integers(0, spec.numel))))
    masks = []
    for count in (lower, upper):
        selector = selecting(whole({"w": t}), secateur.Row())
        gone = gone_of(selector, spec, selector.take([spec], count)[0]).numpy()
        each = np.bincount(row_of(spec)[gone], minlength=row_of(spec).max() + 1)
        assert gone.sum() == count and each.max() - each.min() <= 1
        masks.append(gone)
    assert not (masks[0] & ~masks[1]).any()


@settings(max_examples=15)
@given(st.data())
def test_workers_find_the_cut_of_one(data: st.DataObject) -> None:
    """Each worker holds some of the rows, and they exchange counts alone."""
    spec = spec_of(data.draw(st.sampled_from(["linear", "conv", "experts"])), torch.float32)
    t = example(spec.shape, torch.float32, data.draw(st.sampled_from(FILLS)))
    count, run = data.draw(st.integers(0, spec.numel)), secateur.Row().grouping(spec).run
    (one,) = selecting(whole({"w": t}), secateur.Row()).take([spec], count)

    def job(worker: int, reduce: object) -> object:
        parts = Pieces({"w": t}, run, worker=worker, workers=2, runs=run).parts
        return selecting(parts, secateur.Row(), reduce=reduce).take([spec], count)[0]  # type: ignore[arg-type]

    assert Exchange(2).run(job) == [one, one]


@settings(max_examples=80)
@given(st.data())
def test_the_cut_is_that_of_sorted_groups(data: st.DataObject) -> None:
    """The same cut comes from ranking every group by a sort, as N:M does."""
    dtype = data.draw(st.sampled_from(DTYPES))
    spec = spec_of(data.draw(layouts), dtype)
    t = example(spec.shape, dtype, data.draw(st.sampled_from(FILLS)), seed=data.draw(st.integers(0, 5)))
    grouping, space = secateur.Row().grouping(spec), Space(FORMATS[dtype].bits)
    keyed = Keyed(spec, lambda: iter([(magnitude_key(t).view(-1), Part(spec, t.reshape(-1)))]))
    count = data.draw(st.integers(0, spec.numel))
    (cut,) = partial_cuts([Ranked(keyed, grouping)], grouping.most, count, space, identity)
    assert Rows(keyed, grouping, space).cut(count, identity) == cut


@pytest.mark.parametrize("width", [1, 2, 9, 64])
def test_the_element_of_a_rank(width: int) -> None:
    """Of equal keys the one further left has the lower rank."""
    rows = torch.randint(0, 4, (50, width), generator=torch.Generator().manual_seed(width))
    order = torch.sort(rows, dim=1, stable=True)
    for rank in range(width):
        key, at = at_rank(rows, rank)
        assert torch.equal(key, order.values[:, rank : rank + 1])
        assert torch.equal(at, order.indices[:, rank : rank + 1])


def test_rows_of_one_and_tensors_of_none() -> None:
    """A row of one weight, and a tensor without weights beside another."""
    target = {"a.weight": torch.tensor([[3.0], [1.0], [2.0]]), "b.weight": torch.empty(0, 4)}
    assert secateur.prune(target, 0.34, pattern="row").zeros == 1
    assert target["a.weight"].tolist() == [[3.0], [0.0], [2.0]]
