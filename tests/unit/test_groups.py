"""N:M on its way: any smaller count is exact, lies on the way to the full pattern and spares no group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.core.choose import Groups
from secateur.core.groups import full_cut, group_ranks
from secateur.core.keys import magnitude_key
from secateur.core.select import Space
from secateur.core.types import Spec
from tests.property import oracles
from tests.property.worlds import DTYPES, Pieces, example, gone_of, selecting, specs_of, whole

RATIOS = [(2, 4), (1, 4), (3, 4), (1, 2), (5, 7), (1, 8)]


def groups_of(tensors: Mapping[str, Tensor], pattern: secateur.NM, size: int | None = None) -> Groups:
    parts = whole(tensors)
    if size is not None:
        run = pattern.grouping(specs_of(tensors, in_dim=1)[0]).run
        parts = Pieces(tensors, run * size, strided=True, runs=run).parts
    selector = selecting(parts, pattern)
    assert isinstance(selector, Groups)
    return selector


@st.composite
def pools(draw: st.DrawFn, of: int) -> dict[str, Tensor]:
    dtypes = [draw(st.sampled_from(DTYPES))] if draw(st.booleans()) else DTYPES
    fills = st.sampled_from(["normal", "normal", "few values", "equal", "sparse", "zeros"])
    return {
        name: example(
            (draw(st.integers(1, 3)), of * draw(st.integers(1, 3))), draw(st.sampled_from(dtypes)), draw(fills)
        )
        for name in ("a", "b", "c")[: draw(st.integers(1, 3))]
    }


@pytest.mark.parametrize(("keep", "of"), RATIOS, ids=str)
@settings(max_examples=25)
@given(st.data())
def test_any_count_on_the_way(keep: int, of: int, data: st.DataObject) -> None:
    tensors = data.draw(pools(of))
    specs = specs_of(tensors, in_dim=1)
    pattern = secateur.NM(keep, of)
    selector = groups_of(tensors, pattern)
    full = sum(selector.full_count(s) for s in specs)
    lower, count = sorted(data.draw(st.tuples(st.integers(0, full), st.integers(0, full))))
    taken = selector.take(specs, count)
    before = selector.take(specs, lower)
    pieces = groups_of(tensors, pattern, data.draw(st.integers(1, 2)))
    assert pieces.take(specs, count) == taken
    if count == full:  # every group on its own: one that had more zeros before does not spare another
        expected = {n: oracles.nm(t, 1, keep, of) for n, t in tensors.items()}
    else:
        expected = oracles.nm_partial(tensors, 1, of, count)
        assert sum(t.pruned for t in taken) == max(count, sum(t.zeros for t in taken))
    for spec, now, less in zip(specs, taken, before, strict=True):
        w = oracles.values(tensors[spec.name])
        gone = gone_of(selector, spec, now).numpy()
        np.testing.assert_array_equal(gone, expected[spec.name])
        np.testing.assert_array_equal(gone_of(pieces, spec, now).numpy(), gone)
        assert not (gone & ~oracles.nm(tensors[spec.name], 1, keep, of)).any(), "the final mask lies inside"
        assert not (gone_of(selector, spec, less).numpy() & ~gone).any(), "nothing comes back"
        for group in oracles.groups(spec.shape, 1, of):
            assert gone[group].sum() <= max(of - keep, (w[group] == 0).sum())


def test_ranks_count_from_the_smallest_and_the_lower_position() -> None:
    t = torch.tensor([[3.0, -1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    (spec,) = specs_of({"w": t}, in_dim=1)
    ranks = group_ranks(magnitude_key(t).reshape(-1), secateur.NM(2, 4).grouping(spec))
    assert ranks.tolist() == [3, 1, 0, 2, 0, 1, 2, 3]


def test_groups_run_down_the_columns_of_a_transposed_layer() -> None:
    t = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0], [4.0, 4.0]])
    spec = Spec("w", (4, 2), torch.float32, "linear_transposed", out_dim=1, in_dim=0)
    ranks = group_ranks(magnitude_key(t).reshape(-1), secateur.NM(2, 4).grouping(spec))
    assert ranks.view(4, 2).tolist() == [[2, 0], [0, 1], [1, 2], [3, 3]]
    assert secateur.NM(2, 4).grouping(spec).run == 8


def test_whole_ranks_go_first_then_the_smallest_of_the_next() -> None:
    """Two groups: rank 0 holds 1 and 5, rank 1 holds 2 and 6; so 1, 5, 2, 6 go in this order."""
    tensors = {"w": torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])}
    (spec,) = specs_of(tensors, in_dim=1)
    selector = groups_of(tensors, secateur.NM(2, 4))
    went = []
    for count in range(5):
        (taken,) = selector.take([spec], count)
        went.append(tensors["w"].reshape(-1)[gone_of(selector, spec, taken)].tolist())
    assert went == [[], [1], [1, 5], [1, 2, 5], [1, 2, 5, 6]]


def test_the_full_cut_is_a_rank_alone() -> None:
    cut = full_cut(secateur.NM(2, 4).grouping(Spec("w", (4, 4), torch.float32, "linear", 0, 1)), Space(31))
    assert (cut.key, cut.index, cut.level) == (1, 0, 2)
