"""The compiled products, as functions of tensors; `secateur.core.products` is what calls them.

Instruction sets are chosen apart from those of selection: ``"base"``, ``"avx2"``, ``"avx512"`` (with VBMI2) and
``"avx512bf16"``. The best there is, or ``SECATEUR_PRODUCT_ISA``, or ``SECATEUR_ISA``. Results differ between them in how sums
are rounded, and do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _kernels

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
METHODS = {"direct": 0, "skip": 1, "tile": 2, "pairs": 3}


def isa() -> str:
    """The instruction set in use."""
    name: str = _kernels().product_isa()
    return name


def isas() -> list[str]:
    """The instruction sets this build holds and this processor runs, best last."""
    names: list[str] = _kernels().product_isas()
    return names


def use_isa(name: str) -> None:
    """Use this instruction set from now on, in every thread; ``ValueError`` if it is not one of `isas`."""
    _kernels().use_product_isa(name)


def product(
    x: Tensor,
    bitmask: bool,
    where: Tensor,
    values: Tensor,
    starts: Tensor,
    columns: int,
    bias: Tensor | None,
    method: str,
) -> Tensor:
    """``x @ weight.T + bias``, ``(n, out)``, with a weight in one of the layouts of `secateur.core.layouts`.

    Sums are float32, rounded once at the end.

    Args:
        x: ``(n, columns)``.
        bitmask: the layout: bits, or columns.
        where, values, starts: its parts. What ``starts`` and columns hold must have been checked: kernels believe it.
        columns: of the weight.
        bias: ``(out,)``, or ``None``.
        method: ``"direct"``, an input at a time or a few; ``"skip"``, inputs side by side, for the weights that are stored
            alone; ``"tile"``, the weights spread out, some rows at a time; ``"pairs"``, where `skips_pairs` says so, the
            same without the pairs of columns that are both zero. NaN and infinity are always tiled.
    """
    rows = starts.numel() - 1
    wrong = where.numel() != rows * (-(-columns // 64) * 8) if bitmask else where.numel() != values.numel()
    if wrong or x.dim() != 2 or x.shape[1] != columns or (bias is not None and bias.numel() != rows):
        shapes = [tuple(t.shape) for t in (where, values, starts)]
        raise ValueError(f"no product of {tuple(x.shape)} with {rows} x {columns}, parts {shapes}.")
    # Written out, since a small product takes no longer than a loop over its tensors.
    plain = x.is_contiguous() and where.is_contiguous() and values.is_contiguous() and starts.is_contiguous()
    here = x.is_cpu and where.is_cpu and values.is_cpu and starts.is_cpu
    if bias is not None:
        plain, here = plain and bias.is_contiguous() and bias.dtype == x.dtype, here and bias.is_cpu
    if not (plain and here and values.dtype == x.dtype):
        raise ValueError("native products take contiguous tensors on the CPU, values, inputs and bias of one dtype.")
    out = x.new_empty((x.shape[0], rows))
    _kernels().product(
        bitmask, DTYPES[x.dtype], where.data_ptr(), values.data_ptr(), starts.data_ptr(), rows, columns, x.data_ptr(),
        x.shape[0], 0 if bias is None else bias.data_ptr(), out.data_ptr(), METHODS[method],
    )  # fmt: skip
    return out


def skips_pairs(dtype: torch.dtype) -> bool:
    """Whether the instruction set in use has ``"pairs"`` for a dtype; elsewhere it is ``"tile"``."""
    skips: bool = _kernels().skips_pairs(DTYPES[dtype])
    return skips


def whole_dtype(dtype: torch.dtype) -> torch.dtype:
    """What `whole` writes of values of a dtype: bfloat16 where the kernels multiply it, else float32."""
    return torch.bfloat16 if _kernels().whole_is_bf16(DTYPES[dtype]) else torch.float32


def whole(
    bitmask: bool, where: Tensor, values: Tensor, starts: Tensor, columns: int, first: int, count: int, out: Tensor
) -> Tensor:
    """Some rows of a weight with its zeros, ``(count, columns)``, in the memory of ``out``.

    Args:
        bitmask, where, values, starts, columns: the weight, as `product` takes it.
        first, count: its rows.
        out: ``(at least count, columns up to a multiple of 64)``, of `whole_dtype`.
    """
    rows, padded = starts.numel() - 1, -(-columns // 64) * 64
    wrong = where.numel() != rows * (padded // 8) if bitmask else where.numel() != values.numel()
    fits = out.dim() == 2 and len(out) >= count and out.shape[1] == padded and out.dtype == whole_dtype(values.dtype)
    if wrong or not fits or first < 0 or count < 0 or first + count > rows:
        raise ValueError(
            f"rows {first} to {first + count} of {rows} x {columns} do not go into {tuple(out.shape)}, {out.dtype}."
        )
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in (where, values, starts, out)):
        raise ValueError("native products take contiguous tensors on the CPU.")
    _kernels().whole(
        bitmask, DTYPES[values.dtype], where.data_ptr(), values.data_ptr(), starts.data_ptr(), rows, columns, first, count,
        out.data_ptr(),
    )  # fmt: skip
    return out[:count, :columns]
