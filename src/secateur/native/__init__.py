"""The compiled kernels, as functions of tensors. Each has a torch twin in `secateur.core` with the same results.

A kernel sees an element as an unsigned integer and knows its *key*: the bits without the sign, so that key 0 is a
zero weight and the order of keys is the order of magnitudes. That holds for float64, float32, float16, bfloat16,
float8_e5m2 and float8_e4m3fn; not for the "fnuz" formats, whose NaN is the sign bit alone.

Tensors must be contiguous and on the CPU; they may start at any element. Kernels run on as many threads as
``torch.get_num_threads()`` says, in torch's own pool, without the interpreter's lock; their results depend neither
on the number of threads nor on the instruction set. The smallest key of none is all ones in the width of an element.
Writes go past autograd, as writes to ``tensor.data`` do.

Where the package was built without a compiler `available` is false and the kernels raise ``RuntimeError``.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

try:
    if os.environ.get("SECATEUR_NATIVE") == "0":
        raise ImportError("not wanted")
    from secateur import _native as _compiled
except ImportError:  # installed without a compiler, or told to do without
    _compiled = None  # type: ignore[assignment]


def _join_torch_pool(kernels: ModuleType) -> None:
    """Gives the kernels torch's thread pool; where it cannot be reached they run in the caller's thread."""
    name = {"win32": "torch_cpu.dll", "darwin": "libtorch_cpu.dylib"}.get(sys.platform, "libtorch_cpu.so")
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        entries = (torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads)
    except (OSError, AttributeError):
        return
    kernels.set_pool(*(ctypes.cast(entry, ctypes.c_void_p).value or 0 for entry in entries))


if _compiled is not None:
    _join_torch_pool(_compiled)


def _kernels() -> ModuleType:
    if _compiled is None:
        raise RuntimeError("secateur was installed without its native kernels; ask native.available() first.")
    return _compiled


def _array(t: Tensor) -> tuple[int, int, int]:
    """Address, number of elements, and bytes of one."""
    if not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(
            f"native kernels take contiguous tensors on the CPU; got shape {tuple(t.shape)}, stride {t.stride()}, "
            f"on {t.device}: pass tensor.cpu().contiguous(), or use the torch twin."
        )
    return t.data_ptr(), t.numel(), t.element_size()


def _arrays(tensors: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Addresses, numbers of elements and widths of many tensors."""
    arrays = [_array(t) for t in tensors]
    return [a[0] for a in arrays], [a[1] for a in arrays], [a[2] for a in arrays]


def _ints(raw: bytes) -> Ints:
    return np.frombuffer(raw, np.int64)


def _table(t: Tensor) -> tuple[int, int]:
    """Address and length of an int64 table."""
    if t.dtype != torch.int64:
        raise ValueError(f"tables of native kernels are int64; got {t.dtype}.")
    ptr, n, _ = _array(t)
    return ptr, n


def available() -> bool:
    """Whether the kernels are there: false where the package was installed without a compiler."""
    return _compiled is not None


def isa() -> str:
    """The instruction set in use: ``"base"``, ``"avx2"`` or ``"avx512"``; the best there is, or ``SECATEUR_ISA``.

    Raises:
        ValueError: ``SECATEUR_ISA`` names one that this build or this processor does not have.
    """
    name: str = _kernels().isa()
    return name


def isas() -> list[str]:
    """The instruction sets this build holds and this processor runs, best last."""
    names: list[str] = _kernels().isas()
    return names


def use_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread; ``ValueError`` if it is not one of `isas`."""
    _kernels().use_isa(name)


def threads() -> int:
    """Threads that share the work on a large tensor."""
    n: int = _kernels().threads()
    return n


def scan(t: Tensor) -> tuple[int, int]:
    """``(zeros, max_key)``: one pass that reads ``t`` at the speed of memory."""
    zeros, max_key = _kernels().scan(*_array(t))
    return zeros, max_key


def bracket(t: Tensor, lo: int, hi: int, out: Tensor) -> tuple[int, int, int, int, int]:
    """Counts the keys below a bracket and collects those inside it, ``lo <= key <= hi``, in one pass.

    Args:
        t: the weights.
        lo, hi: first and last key of the bracket, 0 or more; with ``lo > hi`` it is empty.
        out: room for the keys, elements of the same size as those of ``t``; not part of ``t``.

    Returns:
        ``(below, inside, zeros, max_key, above_min)``. The keys are ``out[:inside]``, in no order; ``above_min`` is
        the smallest key above ``hi``. If ``out`` is too small ``inside`` is -1, ``out`` is undefined, and the other
        figures are right.
    """
    out_ptr, capacity, width = _array(out)
    if width != t.element_size():
        raise ValueError(f"keys of {t.dtype} take {t.element_size()} bytes; out has elements of {width}.")
    below, inside, zeros, max_key, above_min = _kernels().bracket(*_array(t), lo, hi, out_ptr, capacity)
    return below, inside, zeros, max_key, above_min


def fill(t: Tensor, cut_key: int, cut_index: int) -> tuple[int, int]:
    """Writes +0.0, in place, over every zero and every element whose (key, flat index) is below the cut.

    Returns:
        ``(zeros_after, min_survivor)``: the number of zeros in ``t`` now, and the smallest key that is left.
    """
    zeros, min_survivor = _kernels().fill(*_array(t), cut_key, cut_index)
    return zeros, min_survivor


def count(t: Tensor, cut_key: int, cut_index: int) -> tuple[int, int, int, int]:
    """What `fill` would do, without doing it.

    Returns:
        ``(pruned, zeros, min_survivor, max_key)``: the zeros that `fill` would leave and the smallest key it would
        spare; the zeros and the largest key of ``t`` as it is.
    """
    pruned, zeros, min_survivor, max_key = _kernels().count(*_array(t), cut_key, cut_index)
    return pruned, zeros, min_survivor, max_key


def histogram(t: Tensor, shift: int, prefix: int, bins: Tensor) -> None:
    """Counts the values of one digit of the keys, ``(key >> shift) & (nbins - 1)``.

    Args:
        t: the weights.
        shift: bits below the digit.
        prefix: only keys whose bits above the digit have this value are counted; 0 where there are none.
        bins: int64, a power of two of them; what they hold is added to.
    """
    _kernels().histogram(*_array(t), shift, prefix, *_table(bins))


Pick = tuple[int, int, int, int, int, int]
"""``(cut_key, cut_index, pruned, min_survivor, zeros, max_key)``: a cut, and what it does to one tensor; `fill` takes it."""


def pick_each(tensors: Sequence[Tensor], ranks: Sequence[int]) -> list[Pick | None]:
    """The cuts that prune the ``rank`` smallest of each of many tensors (or their zeros, where there are more).

    The tensors are shared out among the threads. Ranks count from 1. ``None`` where a sample misled.
    """
    found: list[Pick | None] = _kernels().pick_each(*_arrays(tensors), list(ranks))
    return found


def pick_all(tensors: Sequence[Tensor], rank: int) -> list[Pick]:
    """The cuts that prune the ``rank`` smallest (from 1) of all tensors together, which have one dtype.

    Of equal keys those of earlier tensors go first. Empty if the sample misled.
    """
    found: list[Pick] = _kernels().pick_all(*_arrays(tensors), rank)
    return found


def cut_each(
    tensors: Sequence[Tensor], keys: Sequence[int], indices: Sequence[int], write: bool
) -> list[tuple[int, int, int, int]]:
    """`fill` (with ``write``) or `count` of many tensors, each with a cut of its own, in one go.

    Returns:
        For each tensor ``(pruned, zeros, min_survivor, max_key)``, pruned including those that were zero.
    """
    found: list[tuple[int, int, int, int]] = _kernels().cut_each(*_arrays(tensors), list(keys), list(indices), write)
    return found


def bins_of_each(tensors: Sequence[Tensor], shift: int) -> list[tuple[int, Ints, Ints]]:
    """How many keys of each of many tensors lie in each bin ``key >> shift``.

    Returns:
        For each tensor ``(zeros, bins, counts)``: the keys that are 0, however wide the bins; the bins that occur, in
        ascending order, and how often each does, int64.
    """
    found = _kernels().bins_of_each(*_arrays(tensors), shift)
    return [(zeros, _ints(bins), _ints(counts)) for zeros, bins, counts in found]


def keys_of_each(
    tensors: Sequence[Tensor], lows: Sequence[int], highs: Sequence[int], scale_exps: Sequence[int]
) -> list[tuple[Ints, Ints, int]]:
    """The different keys of each of many tensors that lie in ``low … high``, and the squares of what lies above.

    Args:
        tensors: finite float32 weights.
        lows, highs: first and last key of each tensor's window.
        scale_exps: for each tensor, the squares are scaled by ``2 ** scale_exp`` and rounded once, half to even (a square
            is exact in float64), so that their sum does not depend on the order; it must not exceed int64.

    Returns:
        For each tensor ``(keys, counts, above)``: the keys that occur in ascending order and how often each does, int64,
        and the sum of the rounded squares of all weights with keys above ``high``.
    """
    for t in tensors:
        if t.dtype != torch.float32:
            raise ValueError(f"squares are added up of float32 alone; got {t.dtype}.")
    found = _kernels().keys_of_each(*_arrays(tensors), list(lows), list(highs), list(scale_exps))
    return [(_ints(keys), _ints(counts), above) for keys, counts, above in found]


def tie_index(t: Tensor, key: int, r: int) -> int:
    """One past the flat index of the ``r``-th element (``r`` >= 1) with this key; ``-1 - n`` if there are only ``n``."""
    index: int = _kernels().tie_index(*_array(t), key, r)
    return index


def keep(t: Tensor, bits: Tensor) -> None:
    """Writes +0.0, in place, over the elements whose bit is clear; of each byte of ``bits`` the lowest bit comes first."""
    _kernels().keep(*_array(t), _bits(t, bits))


def live(t: Tensor, bits: Tensor) -> None:
    """Sets the bits of the elements that are not zero (NaN is not) and clears the others; unused bits of the last byte too."""
    _kernels().live(*_array(t), _bits(t, bits))


def _bits(t: Tensor, bits: Tensor) -> int:
    ptr, n, width = _array(bits)
    if width != 1 or n != (t.numel() + 7) // 8:
        raise ValueError(f"{t.numel()} elements have {(t.numel() + 7) // 8} bytes of bits; got {n} of {bits.dtype}.")
    return ptr


def nm(t: Tensor, outer: int, groups: int, of: int, inner: int, prune: int, write: bool) -> tuple[int, int, int, int]:
    """Prunes the ``prune`` smallest (key, position) of every group, and every zero; or only counts them.

    Args:
        t: the weights, seen as ``(outer, groups, of, inner)``; a group is the ``of`` elements along the third dim.
        outer, groups, of, inner: sizes whose product is the size of ``t``.
        prune: elements that every group loses at least, 0 <= ``prune`` < ``of``.
        write: whether to write +0.0 over them, in place.

    Returns:
        ``(zeros_after, zeros_before, min_survivor, max_key)``; without ``write`` what it would come to.
    """
    ptr, n, width = _array(t)
    if outer * groups * of * inner != n:
        raise ValueError(f"{outer} x {groups} x {of} x {inner} is not the size of shape {tuple(t.shape)}.")
    after, before, min_survivor, max_key = _kernels().nm(ptr, outer, groups, of, inner, prune, width, write)
    return after, before, min_survivor, max_key
