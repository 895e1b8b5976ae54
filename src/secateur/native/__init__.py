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

import torch
from torch import Tensor

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


def kth_of_each(tensors: Sequence[Tensor], ranks: Sequence[int]) -> list[tuple[int, int, int, int, int, int] | None]:
    """The ``rank``-th smallest key of each of many tensors (ranks from 1), the tensors shared out among the threads.

    Returns:
        For each tensor ``(key, below, ties, above, zeros, max_key)``: how many keys are smaller and equal, and the
        smallest larger one; ``key`` is 0 if the rank lies among the zeros. ``None`` where a sample misled.
    """
    found: list[tuple[int, int, int, int, int, int] | None] = _kernels().kth_of_each(*_arrays(tensors), list(ranks))
    return found


def kth_of_all(tensors: Sequence[Tensor], rank: int) -> list[tuple[int, int, int, int, int, int]]:
    """The ``rank``-th smallest key of all tensors together (from 1); they have one dtype.

    Returns:
        For each tensor ``(key, below, ties, above, zeros, max_key)`` as `kth_of_each`, ``key`` being the same for all;
        empty if the sample misled.
    """
    found: list[tuple[int, int, int, int, int, int]] = _kernels().kth_of_all(*_arrays(tensors), rank)
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


def bins_of_each(tensors: Sequence[Tensor], shift: int, room: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """What `lamp_table` (4 and 8 bytes) or `histogram` (1 and 2 bytes) gives, for many tensors, without empty bins.

    Args:
        tensors: the weights, finite.
        shift: bits of the key below the bin.
        room: for each tensor, the squares are scaled by ``2 ** (room - 2 e)`` with ``|x| < 2**e`` for all of it.

    Returns:
        For each tensor ``(zeros, max_key, rows)``; rows are int64 triples ``(bin, count, sum)`` in ascending order.
    """
    found: list[tuple[int, int, bytes]] = _kernels().bins_of_each(*_arrays(tensors), shift, list(room))
    return found


def tie_index(t: Tensor, key: int, r: int) -> int:
    """One past the flat index of the ``r``-th element (``r`` >= 1) with this key; -1 if there are fewer."""
    index: int = _kernels().tie_index(*_array(t), key, r)
    return index


def lamp_table(t: Tensor, shift: int, scale_exp: int, counts: Tensor, sums: Tensor) -> None:
    """Counts the keys and adds up the squares of the values, in bins of keys.

    With ``b = key >> shift``: ``counts[b] += 1`` and ``sums[b] += rint(x * x * 2**scale_exp)``. The square is taken
    in float64 (exactly, for float32), scaled exactly and rounded once, half to even, so that the sums do not depend
    on the order. The caller chooses ``scale_exp`` such that no sum exceeds int64.

    Args:
        t: float32 or float64 weights.
        shift: bits of the key below the bin; every key of the dtype must have its bin.
        scale_exp: power of two that the squares are scaled by.
        counts, sums: int64, one of each a bin; what they hold is added to.
    """
    (counts_ptr, nbins), (sums_ptr, others) = _table(counts), _table(sums)
    if nbins != others:
        raise ValueError(f"a LAMP table has as many counts as sums; got {nbins} and {others}.")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a LAMP table is made of float32 or float64; got {t.dtype}.")
    _kernels().lamp_table(*_array(t), shift, scale_exp, counts_ptr, sums_ptr, nbins)


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
