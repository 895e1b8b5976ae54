"""What a profile tells of a tensor that comes in pieces is what a sort of all of it tells, and what it knows it does not read
again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.core import fast
from secateur.core.keys import magnitude_key
from secateur.core.profile import Budget, Profile, Settled
from secateur.core.select import Cut
from secateur.core.types import Align, Part, Spec

FEW = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-30, -7.0]), min_size=1, max_size=40)


class Pieces:
    """A tensor that is read in pieces of some size, and how often."""

    def __init__(self, values: Tensor, size: int, of: int = 0) -> None:
        self.values, self.size, self.read = values, size, 0
        self.spec = Spec("w", (max(of, len(values)),), values.dtype, "linear")

    def __call__(self, spec: Spec, align: Align) -> Iterator[Part]:
        for at in range(0, len(self.values), self.size):
            self.read += 1
            yield Part(spec, self.values[at : at + self.size].clone(), at)


@pytest.mark.parametrize("native", [True, False])
@given(FEW, st.integers(1, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e5m2]), st.data())
def test_counts_ties_and_cuts(
    native: bool, values: list[float], size: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    pieces = Pieces(torch.tensor(values).to(dtype), size)
    keys = magnitude_key(pieces.values)
    order = sorted(range(len(keys)), key=lambda i: (int(keys[i]), i))
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(fast, "memory", lambda part: None)
        known = Profile(pieces.spec, pieces)
        key = int(data.draw(st.sampled_from(keys.tolist())))
        below, equal = int((keys < key).sum()), int((keys == key).sum())
        assert known.count(key) == (below, equal)
        assert (known.zeros, known.nonfinite) == (int((keys == 0).sum()), 0)
        ties = data.draw(st.integers(1, equal))
        index = known.nth(key, ties)
        assert index == order[below + ties - 1] + 1
        if key and ties < equal:
            before = pieces.read
            assert known.settle(Cut(key, index)) == Settled(below + ties, key)
            assert pieces.read == before
        gone = set(order[: below + ties]) | {i for i in order if keys[i] == 0}
        left = [int(keys[i]) for i in order if i not in gone]
        assert Profile(pieces.spec, pieces).settle(Cut(key, index)) == Settled(len(gone), min(left, default=None))


def test_a_worker_with_a_part_of_a_tensor_does_not_know_its_ties() -> None:
    values = torch.tensor([1.0, 2.0, 1.0, 1.0])
    one = int(magnitude_key(values)[0])
    assert Profile((all_of := Pieces(values, 2)).spec, all_of).nth(one, 2) == 3
    assert Profile((some := Pieces(values, 2, of=8)).spec, some).nth(one, 2) is None
    assert Profile((none := Pieces(values[:0], 2, of=8)).spec, none).nth(one, 2) == 0


def test_without_room_to_keep_counts_the_last_tensors_are_held() -> None:
    a, b = Pieces(torch.tensor([1.0, 2.0, 1.0]), 3), Pieces(torch.tensor([0.0, 2.0]).bfloat16(), 3)
    budget = Budget(0)
    first, second = Profile(a.spec, a, budget), Profile(replace(b.spec, name="v"), b, budget)
    assert (first.zeros, first.nonfinite, first.zeros, a.read) == (0, 0, 0, 1)
    assert (second.zeros, b.read) == (1, 1)
    assert (first.zeros, a.read) == (0, 2)
    kept = Profile(a.spec, a, Budget())
    assert (kept.zeros, second.zeros, kept.zeros, a.read) == (0, 1, 0, 3)
