"""Every native kernel against plain NumPy: all widths and instruction sets, 1 and 2 threads, awkward sizes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from secateur import native
from tests.unit.kernels import (
    ENGINES,
    VIEWS,
    Keys,
    all_ones,
    bits_of,
    each_dtype,
    example,
    examples,
    greatest,
    keys_of,
    least,
    running,
    thresholds,
)


@pytest.fixture(params=ENGINES, ids=lambda e: f"{e[0]}x{e[1]}", autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """An instruction set and a number of threads."""
    with running(request.param):
        yield request.param


@each_dtype
def test_scan_finds_zeros_and_the_largest_key(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        keys = keys_of(t)
        assert native.scan(t) == (int((keys == 0).sum()), greatest(keys))


@each_dtype
def test_bracket_counts_below_and_collects_inside(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        keys = keys_of(t)
        out = torch.empty(t.numel(), dtype=VIEWS[t.element_size()])
        for lo, hi in itertools.product(thresholds(keys, t), repeat=2):
            below, inside, zeros, max_key, above_min = native.bracket(t, lo, hi, out)
            wanted = np.sort(keys[(keys >= lo) & (keys <= hi)])
            assert (below, inside) == (int((keys < lo).sum()), wanted.size)
            assert np.array_equal(np.sort(keys_of(out[:inside])), wanted)
            assert (zeros, max_key) == (int((keys == 0).sum()), greatest(keys))
            assert above_min == least(keys[keys > hi], t)


@each_dtype
def test_bracket_says_when_there_is_too_little_room(dtype: torch.dtype) -> None:
    t = example(100_003, dtype)
    keys = keys_of(t)
    lo, hi = np.quantile(keys, [0.25, 0.75], method="lower").tolist()
    room = int(((keys >= lo) & (keys <= hi)).sum())
    guarded = torch.full((room + 8,), 77, dtype=VIEWS[t.element_size()])
    full = native.bracket(t, lo, hi, guarded[:room])
    assert full[1] == room
    tight = native.bracket(t, lo, hi, guarded[: room - 1])
    assert tight == (full[0], -1, *full[2:])
    assert torch.equal(guarded[room:], torch.full((8,), 77, dtype=guarded.dtype))


def pruned_by(keys: Keys, cut_key: int, cut_index: int) -> NDArray[np.bool_]:
    index = np.arange(keys.size)
    return (keys < cut_key) | ((keys == cut_key) & (index < cut_index)) | (keys == 0)


@each_dtype
def test_count_and_fill_prune_what_lies_below_the_cut(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        n, keys, original = t.numel(), keys_of(t), bits_of(t).clone()
        for cut_key, cut_index in itertools.product(thresholds(keys, t), [0, 1, n // 3, n, n + 5]):
            bits_of(t).copy_(original)
            pruned = pruned_by(keys, cut_key, cut_index)
            survivor = least(keys[~pruned], t)
            counted = native.count(t, cut_key, cut_index)
            assert counted == (int(pruned.sum()), int((keys == 0).sum()), survivor, greatest(keys))
            assert torch.equal(bits_of(t), original)
            assert native.fill(t, cut_key, cut_index) == (int(pruned.sum()), survivor)
            assert torch.equal(bits_of(t), torch.where(torch.from_numpy(pruned), 0, original))


def test_fill_stays_within_its_slice() -> None:
    base = torch.full((1000,), 3.0)
    native.fill(base[17:900], int(keys_of(base)[0]), 2000)
    assert (base[17:900] == 0).all() and (base[:17] == 3).all() and (base[900:] == 3).all()


@each_dtype
def test_histogram_counts_each_digit(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        n, keys, bits = t.numel(), keys_of(t), 8 * t.element_size() - 1
        for shift, digit in [
            (max(0, bits - 15), min(bits, 15)),
            (0, 4),
            (bits - 3, 3),
            (bits // 2, 3),
            (bits - 1, 8),
        ]:
            above = keys >> np.uint64(shift + digit) if shift + digit < 64 else np.zeros_like(keys)
            for prefix in {0, int(above[n // 2]) if n else 5, 1 << 40}:
                bins = torch.full((1 << digit,), 3, dtype=torch.int64)
                native.histogram(t, shift, prefix, bins)
                chosen = (keys[above == prefix] >> np.uint64(shift)) & np.uint64((1 << digit) - 1)
                wanted = 3 + np.bincount(chosen.astype(np.int64), minlength=1 << digit)
                assert np.array_equal(bins.numpy(), wanted), (shift, digit, prefix)


@each_dtype
def test_tie_index_finds_the_rth_equal_key(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        keys = keys_of(t)
        for key in {0, *keys[t.numel() // 2 :][:1].tolist(), all_ones(t) >> 1, all_ones(t)}:
            at = np.flatnonzero(keys == key)
            for r in {1, 2, max(1, at.size // 2), max(1, at.size), at.size + 1}:
                assert native.tie_index(t, key, r) == (int(at[r - 1]) + 1 if r <= at.size else -1 - at.size)


def test_tie_index_over_many_pieces_of_ties() -> None:
    t = torch.full((3_000_001,), 0.5, dtype=torch.bfloat16)
    key = int(keys_of(t)[0])
    assert [native.tie_index(t, key, r) for r in (1, 1_234_567, 3_000_001)] == [1, 1_234_567, 3_000_001]


def grouped(keys: Keys, shape: tuple[int, int, int, int], prune: int) -> NDArray[np.bool_]:
    """By a stable sort of every group: which elements are pruned, flat."""
    k = keys.reshape(shape)
    order = np.argsort(k, axis=2, kind="stable")
    pruned = np.zeros(k.shape, dtype=bool)
    np.put_along_axis(pruned, order[:, :, :prune], True, axis=2)
    return (pruned | (k == 0)).reshape(-1)


def check_nm(t: Tensor, shape: tuple[int, int, int, int], prune: int) -> None:
    keys = keys_of(t)
    pruned = grouped(keys, shape, prune)
    wanted = (int(pruned.sum()), int((keys == 0).sum()), least(keys[~pruned], t), greatest(keys))
    original = bits_of(t).clone()
    assert native.nm(t, *shape, prune, False) == wanted
    assert torch.equal(bits_of(t), original)
    assert native.nm(t, *shape, prune, True) == wanted
    assert torch.equal(bits_of(t), torch.where(torch.from_numpy(pruned), 0, original))


@each_dtype
def test_nm_matches_a_sort_of_every_group(dtype: torch.dtype) -> None:
    for of, inner in itertools.product([1, 2, 3, 4, 5, 8, 10, 16, 32, 33, 64], [1, 2, 9, 16, 25, 64, 100]):
        for prune in {0, 1, of // 2, of - 1} - {of}:
            check_nm(example(3 * of * inner, dtype, "few values"), (3, 1, of, inner), prune)
        groups = 1 + 3000 // (of * inner)
        check_nm(example(2 * groups * of * inner, dtype, "any bits"), (2, groups, of, inner), of // 2)


@each_dtype
def test_nm_on_tensors_that_are_shared_among_threads(dtype: torch.dtype) -> None:
    for of, inner in [(4, 1), (16, 1), (4, 9), (6, 25), (4, 600)]:
        groups = 70_000 // (of * inner)  # at least two pieces in every width
        check_nm(example(groups * of * inner, dtype, "few values"), (1, groups, of, inner), of // 2)


def test_nm_of_one_huge_group() -> None:
    t = example(3 * 65536, torch.float32)
    check_nm(t, (1, 3, 65536, 1), 60_000)
    check_nm(example(5 * 1000 * 4, torch.bfloat16, "few values"), (5, 1, 1000, 4), 700)


def test_nm_of_a_known_table() -> None:
    t = torch.tensor([[1.0, -2.0, 2.0, 3.0], [5.0, 5.0, -5.0, 5.0], [0.0, -0.0, 0.0, 1.0]])
    assert native.nm(t, 3, 1, 4, 1, 2, True)[0] == 7
    assert t.tolist() == [[0, 0, 2, 3], [0, 0, -5, 5], [0, 0, 0, 1]]
    assert not torch.signbit(t[2]).any()


class TestProperties:
    @given(
        values=st.lists(st.integers(0, 2**16 - 1) | st.sampled_from([0, 1 << 15, 0x3F80, 0xBF80]), max_size=300),
        lo=st.integers(0, 2**15),
        hi=st.integers(0, 2**15),
        cut=st.tuples(st.integers(0, 2**15), st.integers(0, 320)),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_bits(self, values: list[int], lo: int, hi: int, cut: tuple[int, int]) -> None:
        raw = np.array(values, dtype=np.uint16)
        t = torch.from_numpy(raw.copy().view(np.int16)).view(torch.bfloat16)
        keys = keys_of(t)
        out = torch.empty(len(values), dtype=torch.int16)
        below, inside, *_ = native.bracket(t, lo, hi, out)
        assert below == int((keys < lo).sum())
        assert sorted(keys_of(out[:inside]).tolist()) == sorted(keys[(keys >= lo) & (keys <= hi)].tolist())
        pruned = pruned_by(keys, *cut)
        assert native.fill(t, *cut)[0] == int(pruned.sum())
        assert np.array_equal(bits_of(t).numpy().view(np.uint16), np.where(pruned, 0, raw))

    @given(
        of=st.integers(1, 40),
        inner=st.integers(1, 70),
        blocks=st.integers(1, 12),
        part=st.floats(0, 1, exclude_max=True),
        levels=st.integers(1, 200),
        width=st.sampled_from([1, 2, 4, 8]),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_groups(
        self, of: int, inner: int, blocks: int, part: float, levels: int, width: int, seed: int
    ) -> None:
        raw = np.random.default_rng(seed).integers(-levels // 2, levels // 2 + 1, blocks * of * inner)
        t = torch.from_numpy(raw).to(VIEWS[width])
        check_nm(t, (1, blocks, of, inner), int(part * of))


def test_threads_follow_torch(engine: tuple[str, int]) -> None:
    assert (native.isa(), native.threads()) == engine


def test_other_tensors_are_refused() -> None:
    t = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"contiguous tensors on the CPU.*shape \(4, 4\).*stride \(1, 4\)"):
        native.scan(t.t())
    with pytest.raises(ValueError, match="on meta"):
        native.scan(torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match="4 bytes"):
        native.bracket(t, 0, 1, torch.empty(16, dtype=torch.int16))
    with pytest.raises(ValueError, match="int64"):
        native.histogram(t, 0, 0, torch.zeros(16))
    with pytest.raises(ValueError, match="power of two"):
        native.histogram(t, 0, 0, torch.zeros(15, dtype=torch.int64))
    with pytest.raises(ValueError, match="not the size"):
        native.nm(t, 1, 1, 4, 1, 2, True)
    with pytest.raises(ValueError, match="at least one"):
        native.nm(t, 4, 1, 4, 1, 4, True)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def once(engine: tuple[str, int]) -> None:
    if engine != ENGINES[0]:
        pytest.skip("does not depend on the engine")


def test_the_environment_chooses_the_instruction_set(engine: tuple[str, int]) -> None:
    once(engine)
    code = "import torch; from secateur import native; print(native.isa(), native.scan(torch.ones(3)))"
    done = run_python(code, SECATEUR_ISA="base")
    assert done.stdout == "base (0, 1065353216)\n", done.stderr


def test_an_instruction_set_that_is_not_there_is_refused(engine: tuple[str, int]) -> None:
    once(engine)
    with pytest.raises(ValueError, match=r'asks for the native kernels "mmx".*it has base'):
        native.use_isa("mmx")
    done = run_python("from secateur import native; print('imported'); native.isa()", SECATEUR_ISA="mmx")
    assert done.stdout == "imported\n" and 'SECATEUR_ISA asks for the native kernels "mmx"' in done.stderr


def test_import_without_the_extension(engine: tuple[str, int]) -> None:
    once(engine)
    code = (
        "import sys; sys.modules['secateur._native'] = None\n"
        "import torch; from secateur import native\n"
        "assert not native.available()\n"
        "try: native.scan(torch.ones(3))\n"
        "except RuntimeError as e: print(e)"
    )
    assert "without its native kernels" in run_python(code).stdout


@each_dtype
def test_keep_and_live_go_by_packed_bits(dtype: torch.dtype) -> None:
    for t in examples(dtype):
        n, keys, original = t.numel(), keys_of(t), bits_of(t).clone()
        live = torch.full(((n + 7) // 8,), 255, dtype=torch.uint8)
        native.live(t, live)
        assert np.array_equal(live.numpy(), np.packbits(keys != 0, bitorder="little"))
        assert torch.equal(bits_of(t), original)
        keep = np.random.default_rng(n).random(n) < 0.5
        native.keep(t, torch.from_numpy(np.packbits(keep, bitorder="little")))
        assert torch.equal(bits_of(t), torch.where(torch.from_numpy(keep), original, 0))


def test_keep_and_live_stay_within_their_slices() -> None:
    base, bits = torch.full((1000,), 3.0), torch.full((120,), 77, dtype=torch.uint8)
    native.live(base[17:900], bits[4:115])
    assert (bits[:4] == 77).all() and (bits[115:] == 77).all() and (bits[4:114] == 255).all() and bits[114] == 7
    native.keep(base[17:900], torch.zeros(111, dtype=torch.uint8))
    assert (base[17:900] == 0).all() and (base[:17] == 3).all() and (base[900:] == 3).all()
    with pytest.raises(ValueError, match="have 111 bytes"):
        native.keep(base[17:900], torch.zeros(110, dtype=torch.uint8))
