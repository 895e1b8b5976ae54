"""SparseGPT: one pass over the columns, from the left; what a column loses, the columns to its right make up for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.allocate import Bounds, level_counts
from secateur.core.groups import group_ranks
from secateur.core.patterns import NM, Pattern
from secateur.errors import BadInput

from .base import Layer, Solution, check_damping, check_request, exactly, first, keys_of, lower, with_damping

Choose = Callable[[Tensor, int], Tensor]
"""From the columns at hand, transposed (some, out), and where they begin: which of their weights go; bool, same shape."""


@dataclass(frozen=True)
class SparseGPT:
    """SparseGPT: prunes block by block of columns, each time from weights already updated for all that went before.

    With ``U`` the upper Cholesky factor of the inverse, ``H^-1 = U^T U``, a weight of column ``j`` goes in the order of::

        w_j^2 / U_jj^2        and then        w_k -= w_j / U_jj * U_jk        for all k > j of its row

    **Counts are exact.** The count is spread over the column blocks by one common level (`level_counts`, integers alone):
    every block loses the same share, as near as whole numbers allow, but never less than is zero or dead in it, and no
    block gets a weight back when the count grows. Within a block weights go in the order (zero already, of a dead input,
    score, flat index). For N:M every group of M columns is ranked when the pass comes to it, and loses the M - N first.

    Where results differ from the paper's code: that prunes ``k + 1`` weights and all ties a block, sets every weight of a
    dead input to zero whatever the count, forgets zeros that were there (an update makes them nonzero again), and cuts N:M
    groups where M does not divide the block (here the block is rounded down to whole groups). It also inverts ``H`` and
    factors the inverse, in float32; here ``U`` comes from one Cholesky factorisation of ``H`` with its rows and columns in
    reverse, in float64, and only the pass over the columns runs in the dtype of the weights.

    Args:
        block: columns chosen from at once, >= 1; it may exceed the matrix. Smaller blocks see more updates before they
            choose, but compare fewer weights.
        damping: share of the mean diagonal added to the Hessian, >= 0.

    Raises:
        BadInput: another block or damping.

    Called as a `Solver`: float32 (float64 for float64 weights), without TF32; the same code on CPU and CUDA.

    Example:
        >>> import torch
        >>> from secateur.core.patterns import Unstructured
        >>> w, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> SparseGPT(damping=0.0)(w, hessian=h, pattern=Unstructured(), count=1)
        Solution(weight=tensor([[0.0000, 2.5000]]), mask=tensor([[False,  True]]), loss=0.75, damping=0.0)

    Frantar and Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot" (arXiv:2301.00774).
    """

    block: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise BadInput(f"block is how many columns are chosen from at once, an int >= 1; got {self.block!r}.")
        check_damping(self.damping)

    def __call__(self, weight: Tensor, *, hessian: Tensor, pattern: Pattern, count: int, name: str = "") -> Solution:
        """See `Solver`.

        Raises:
            BadInput: a count out of range.
            BadTensor: weights or a Hessian that cannot be used; see `Layer.of` and `with_damping`.
            NotDefined: see `check_request`.
        """
        with exactly():
            layer = Layer.of(weight, hessian, name)
            check_request(layer.spec, pattern, count)
            if not isinstance(pattern, NM) and count <= int(layer.zero.sum()):
                return layer.solved(layer.weight, layer.zero, 0.0)
            factor, damping = with_damping(layer, self.damping, upper_of_inverse)
            diagonal = factor.diagonal().clone()
            reach = factor.div_(diagonal[:, None]).to(layer.weight.dtype)
            columns = layer.weight.t().clone(memory_format=torch.contiguous_format)
            # Relative to the largest, so that equal diagonals leave |w| as it is, to the last bit.
            scale = diagonal.max() / diagonal
            if isinstance(pattern, NM):
                width = max(pattern.of, self.block // pattern.of * pattern.of)
                gone = sweep(columns, reach, width, pattern.of, choose_groups(layer, scale, pattern))
            else:
                choose = choose_blocks(layer, scale, self.block, count)
                gone = sweep(columns, reach, self.block, self.block, choose)
            return layer.solved(columns.t(), gone.t(), damping)


def upper_of_inverse(h: Tensor, noise: float) -> Tensor | None:
    """The upper ``U`` with ``h^-1 = U^T U``, or ``None`` where ``h`` is singular (see `lower`).

    With ``J`` the reversal of rows or columns and ``J h J = L L^T``, it is ``U = J L^-1 J``.
    """
    factor = lower(h.flip(0, 1), noise)
    if factor is None:
        return None
    inverse = torch.eye(len(h), dtype=h.dtype, device=h.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    return inverse.flip(0, 1)


def sweep(columns: Tensor, reach: Tensor, width: int, step: int, choose: Choose) -> Tensor:
    """The pass over the columns: what goes, and, in place, what that does to the columns that follow.

    Args:
        columns: (in, out): the weights transposed, so that a column is contiguous; what goes is left as it was when it went.
        reach: (in, in): how much a weight that goes moves those to its right, by row.
        width: columns whose updates reach those behind the block in one product, at its end.
        step: columns that are chosen from at once; divides ``width``.
        choose: which go.
    """
    gone = torch.empty_like(columns, dtype=torch.bool)
    for a in range(0, len(columns), width):
        b = min(a + width, len(columns))
        lost = torch.empty_like(columns[a:b])
        for i in range(a, b):
            if (i - a) % step == 0:
                to = min(i + step, b)
                gone[i:to] = choose(columns[i:to], i)
            torch.mul(columns[i], gone[i], out=lost[i - a])
            columns[i + 1 : b].addr_(reach[i, i + 1 : b], lost[i - a], alpha=-1)
        columns[b:].addmm_(reach[a:b, b:].t(), lost, alpha=-1)
    return gone


def _keys(layer: Layer, scale: Tensor, columns: Tensor, at: int) -> Tensor:
    """The order in which weights of some columns go: int64 keys, (out, some)."""
    some = slice(at, at + len(columns))
    score = columns.t().abs().to(torch.float64) * scale[some]
    return keys_of(score, layer.zero[:, some], layer.dead[some])


def choose_blocks(layer: Layer, scale: Tensor, width: int, count: int) -> Choose:
    """Chooses the lowest of a block, as many as its share of ``count``."""
    counts = block_counts(layer, width, count)

    def choose(columns: Tensor, at: int) -> Tensor:
        return first(_keys(layer, scale, columns, at), counts[at // width]).t()

    return choose


def choose_groups(layer: Layer, scale: Tensor, pattern: NM) -> Choose:
    """Chooses the M - N lowest of every group, and all that is zero."""

    def choose(columns: Tensor, at: int) -> Tensor:
        keys = _keys(layer, scale, columns, at)
        ranks = group_ranks(keys.reshape(-1), pattern.grouping(layer.spec)).view(keys.shape)
        return ((ranks < pattern.of - pattern.keep) | layer.zero[:, at : at + pattern.of]).t()

    return choose


def block_counts(layer: Layer, width: int, count: int) -> list[int]:
    """How many weights of each block of columns go: one level for all blocks, zeros and weights of dead inputs first."""
    rows, total = layer.spec.shape
    zeros = _per_block(layer.zero, width)
    dead = _per_block(layer.dead & ~layer.zero, width)
    free = [z + d for z, d in zip(zeros, dead, strict=True)]
    if count <= sum(free):
        more = level_counts(dead, [Bounds(0, d) for d in dead], count - sum(zeros))
        return [z + m for z, m in zip(zeros, more, strict=True)]
    sizes = [rows * (min(a + width, total) - a) for a in range(0, total, width)]
    return level_counts(sizes, [Bounds(f, s) for f, s in zip(free, sizes, strict=True)], count)


def _per_block(which: Tensor, width: int) -> list[int]:
    """How many elements of each block of columns are ``True``."""
    return [int(part.sum()) for part in which.sum(0).split(width)]
