"""Dropping and growing against a full stable sort."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from secateur.core import keys
from secateur.core.rewire import lowest, rewire
from secateur.core.types import Spec


def sorted_lowest(k: Tensor, among: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
    """The first ``count`` of those there are, by a stable sort."""
    order = [i for i in np.argsort(k.numpy(), kind="stable") if among[i]]
    found = np.zeros_like(among)
    found[order[:count]] = True
    return found


@st.composite
def some_keys(draw: st.DrawFn, size: int) -> Tensor:
    """Keys with many ties, up to the widest there are."""
    values = st.one_of(st.integers(1, 7), st.integers(1, draw(st.sampled_from([2**15, 2**31, keys.HIGHEST]))))
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.int64)


@settings(max_examples=60)
@given(st.data())
def test_what_goes_and_what_comes_is_what_the_sort_says(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    live = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    count = data.draw(st.integers(0, int(live.sum())))
    drop, grow = data.draw(some_keys(n)), data.draw(some_keys(n))
    spec = Spec("w", (n,), torch.float32, "linear")
    found = rewire(spec, live, drop, grow, count).numpy()
    rest = live.numpy() & ~sorted_lowest(drop, live.numpy(), count)
    np.testing.assert_array_equal(found, rest | sorted_lowest(grow, ~rest, count))
    assert found.sum() == int(live.sum())


def test_tensors_of_more_than_one_chunk_and_ties_across_them() -> None:
    n = 2 * keys.CHUNK + 77
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(1, 9, (n,), generator=generator)
    among = torch.rand(n, generator=generator) < 0.6
    for count in (0, 1, 1000, n // 3, int(among.sum())):
        found = lowest(Spec("w", (n,), torch.float32, "linear"), k, among, count)
        np.testing.assert_array_equal(found.numpy(), sorted_lowest(k, among.numpy(), count))
