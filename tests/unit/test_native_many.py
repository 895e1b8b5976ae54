"""The kernels that take many tensors in one go, against plain NumPy: every instruction set, 1 and 2 threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur import native
from tests.unit.kernels import (
    DTYPES,
    ENGINES,
    FILLS,
    SIZES,
    all_ones,
    bits_of,
    each_dtype,
    example,
    greatest,
    keys_of,
    least,
    running,
)


@pytest.fixture(params=ENGINES, ids=lambda e: f"{e[0]}x{e[1]}", autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """An instruction set and a number of threads."""
    with running(request.param):
        yield


def several(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of every size and content, a large one among them."""
    some = [example(n, dtype, f) for n in SIZES[:-1] for f in FILLS]
    return [*some, example(SIZES[-1], dtype), example(70_000, dtype, "few values"), example(70_000, dtype, "equal")]


def picked(tensors: Sequence[Tensor], rank: int) -> list[native.Pick]:
    """By a stable sort of all keys: what taking the rank smallest, or the zeros, does to each tensor."""
    keys = [keys_of(t) for t in tensors]
    every = np.concatenate(keys)
    owner = np.repeat(np.arange(len(keys)), [k.size for k in keys])
    order = np.argsort(every, kind="stable")
    gone = np.zeros(every.size, bool)
    gone[order[: max(rank, int((every == 0).sum()))]] = True
    edge = int(every[gone].max())
    out = []
    for i, (k, t) in enumerate(zip(keys, tensors, strict=True)):
        own = gone[owner == i]
        last = np.flatnonzero(own & (k == edge))
        split = bool((~own & (k == edge)).any())
        cut = (edge, int(last[-1]) + 1 if last.size else 0) if split else (edge + 1, 0)
        out.append((*cut, int(own.sum()), least(k[~own], t), int((k == 0).sum()), greatest(k)))
    return out


def ranks(n: int) -> list[int]:
    return sorted({1, min(2, n), max(1, n // 10), max(1, n // 2), max(1, n * 9 // 10), max(1, n - 1), max(1, n)})


@each_dtype
def test_picking_from_each_tensor_is_a_stable_sort(dtype: torch.dtype) -> None:
    tensors = [t for t in several(dtype) if t.numel()]
    for at in range(len(ranks(10**6))):
        asked = [ranks(t.numel())[min(at, len(ranks(t.numel())) - 1)] for t in tensors]
        found = native.pick_each(tensors, asked)
        for t, rank, pick in zip(tensors, asked, found, strict=True):
            if pick is None:  # allowed where a sixth of a large tensor may be tied
                assert t.numel() > 8192 and (dtype.itemsize == 1 or t.numel() == 70_000)
            else:
                assert pick == picked([t], rank)[0], (t.numel(), rank)


@each_dtype
def test_picking_from_all_tensors_is_one_stable_sort(dtype: torch.dtype) -> None:
    ordinary = [example(n, dtype) for n in SIZES]
    tied = [example(n, dtype, "few values") for n in (1000, 17, 0, 63)]
    for tensors in (ordinary, tied, [*tied, *ordinary[:-1]], ordinary[1:2]):
        for rank in ranks(sum(t.numel() for t in tensors)):
            found = native.pick_all(tensors, rank)
            assert found == picked(tensors, rank), (len(tensors), rank)


def test_picking_reaches_the_index_in_a_later_piece() -> None:
    """The r-th of many equal keys lies in another stretch of memory than the first."""
    t = example(400_000, torch.bfloat16)
    for share in (0.3, 0.77, 0.9):
        rank = int(share * t.numel())
        (pick,) = native.pick_each([t], [rank])
        assert pick == picked([t], rank)[0] and pick[1] > 0
        assert native.pick_all([t], rank) == [pick]


@each_dtype
@pytest.mark.parametrize("write", [False, True])
def test_cutting_each_is_cutting_one_by_one(dtype: torch.dtype, write: bool) -> None:
    tensors = several(dtype)
    middles = [int(np.sort(keys_of(t))[t.numel() // 2]) if t.numel() else 5 for t in tensors]
    indices = [t.numel() // 3 for t in tensors]
    copies = [t.clone() for t in tensors]
    wanted = [native.count(t, k, i) for t, k, i in zip(tensors, middles, indices, strict=True)]
    assert native.cut_each(copies, middles, indices, write) == wanted
    for t, c, k, i in zip(tensors, copies, middles, indices, strict=True):
        if write:
            native.fill(t, k, i)
        assert torch.equal(bits_of(t), bits_of(c))


@each_dtype
def test_bins_of_each_are_counts_of_keys(dtype: torch.dtype) -> None:
    bits = 8 * torch.empty(0, dtype=dtype).element_size() - 1
    for shift in {0, min(3, bits - 1), bits - 7} if bits < 16 else {bits - 16, bits - 1}:
        tensors = several(dtype)
        for t, (zeros, bins, counts) in zip(tensors, native.bins_of_each(tensors, shift), strict=True):
            keys = keys_of(t)
            wanted, times = np.unique((keys >> np.uint64(shift)).astype(np.int64), return_counts=True)
            assert zeros == (keys == 0).sum() and np.array_equal(bins, wanted) and np.array_equal(counts, times)


def test_keys_of_each_and_the_squares_above() -> None:
    tensors = [example(n, torch.float32, f) for n in SIZES for f in FILLS[:4]]
    tensors += [example(300_000, torch.float32), example(300_000, torch.float32, "equal")]
    for share, width in ((0.5, 0.1), (0.0, 0.3), (0.9, 0.0), (0.0, 1.0)):
        edges = [np.sort(keys_of(t)) if t.numel() else np.array([7], np.uint64) for t in tensors]
        lows = [int(k[int(share * (k.size - 1))]) for k in edges]
        highs = [int(k[int(min(1.0, share + width) * (k.size - 1))]) for k in edges]
        found = native.keys_of_each(tensors, lows, highs, [30] * len(tensors))
        for t, lo, hi, (keys, counts, above) in zip(tensors, lows, highs, found, strict=True):
            own = keys_of(t)
            wanted, times = np.unique(own[(own >= lo) & (own <= hi)], return_counts=True)
            over = t.numpy()[own > hi].astype(np.float64)
            assert np.array_equal(keys, wanted.astype(np.int64)) and np.array_equal(counts, times)
            assert above == int(np.rint(over * over * 2.0**30).astype(np.int64).sum())


def test_squares_are_rounded_once_and_halves_to_even() -> None:
    t = torch.tensor([1.0, 3.0, 5.0, 7.0] * 5)  # half their squares: 0.5, 4.5, 12.5, 24.5
    ((_, _, above),) = native.keys_of_each([t], [0], [0], [-1])
    assert above == 5 * (0 + 4 + 12 + 24)


def test_bad_arguments_are_refused() -> None:
    t = torch.ones(4)
    with pytest.raises(ValueError, match="one of each"):
        native.pick_each([t], [1, 2])
    with pytest.raises(ValueError, match="one of each"):
        native.pick_all([t, t.half()], 1)
    with pytest.raises(ValueError, match="one of each"):
        native.cut_each([t], [1], [], False)
    with pytest.raises(ValueError, match="within an element"):
        native.bins_of_each([t], 32)
    with pytest.raises(ValueError, match=r"float32 alone; got torch\.float16"):
        native.keys_of_each([t.half()], [0], [1], [0])
    with pytest.raises(ValueError, match="must not be empty"):
        native.keys_of_each([t], [2], [1], [0])


def test_every_width_is_there() -> None:
    assert sorted(all_ones(example(1, d)) for d in DTYPES) == [2**8 - 1, 2**16 - 1, 2**32 - 1, 2**64 - 1]
