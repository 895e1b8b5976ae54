"""Refusals: tensors that cannot be pruned as they are. Reads types, strides and flags, never a value.

Every message says which tensor of which shape it is about, what was found, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

from secateur.core.types import Spec
from secateur.errors import BadTensor

SUPPORTED = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip
"""Dtypes that can be pruned."""

PLAIN = (Tensor, Parameter)
"""Types whose values are the memory itself; subclasses may keep them elsewhere."""

_FP8 = SUPPORTED[4:]
_BAKE = "bake them first with secateur.from_torch_prune(model)"
_REMEDIES = {
    "torch.nn.utils.prune": f"it is still under torch.nn.utils.prune, as a parameter and a mask; {_BAKE}",
    "torch.nn.utils.parametrize": (
        "it is computed by a parametrisation, which would undo the zeros; make it plain first with "
        "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
    ),
    "torch.nn.utils.weight_norm": (
        "it is computed by weight_norm, which would undo the zeros; make it plain first with "
        "torch.nn.utils.remove_weight_norm(module)"
    ),
    "torch.nn.utils.spectral_norm": (
        "it is computed by spectral_norm, which would undo the zeros; make it plain first with "
        "torch.nn.utils.remove_spectral_norm(module)"
    ),
}


class Entry(NamedTuple):
    """A tensor in memory: its `Spec`, itself, and what else a check has to know.

    Attributes:
        held_by: what computes the weight that this tensor stands for, such as ``"torch.nn.utils.prune"``.
        scale: name of the tensor that scales this one, in a checkpoint quantised to fp8.
    """

    spec: Spec
    tensor: Tensor
    held_by: str | None = None
    scale: str | None = None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values in memory with strides: no lazy, meta, sparse or wrapped one."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_meta


def check(chosen: Sequence[Entry], everything: Sequence[Entry]) -> None:
    """Raises `BadTensor` for the first chosen tensor that cannot be pruned, alone or for what it shares."""
    for entry in chosen:
        reason = why_not(entry)
        if reason is not None:
            raise BadTensor(f"cannot prune {_shown(entry)}: {reason}.")
    _refuse_overlaps({e.spec.name for e in chosen}, [e for e in everything if is_plain(e.tensor)])


def _shown(entry: Entry) -> str:
    if not is_lazy(entry.tensor):
        return str(entry.spec)
    return f"{entry.spec.name!r} (shape not known yet, {str(entry.spec.dtype).removeprefix('torch.')})"


def why_not(entry: Entry) -> str | None:
    """What stands against pruning one tensor, and the way out; ``None`` if nothing does."""
    t = entry.tensor
    if entry.held_by is None:
        if is_lazy(t):
            return "it is lazy and has no values yet; run a forward pass first"
        if t.is_meta:
            return "it is on the meta device and has no values; load the weights first"
        if (reason := _of_type(t)) is not None:
            return reason
    return of_dtype(entry) or _of_memory(t)


def _of_type(t: Tensor) -> str | None:
    """Subclasses and layouts: zeros can be written only where the values are the memory itself."""
    if type(t) not in PLAIN and t.dtype in SUPPORTED:
        name = f"{type(t).__module__}.{type(t).__name__}"
        if type(t).__name__ == "PackedWeight":
            return "it is packed; take the weights back first with secateur.unpack(model)"
        if type(t).__name__ == "DTensor":
            return "it is a DTensor, cut over processes, and this looks at whole tensors; do it before the model is sharded"
        return (
            f"it is a {name}, whose values may be kept elsewhere than in plain memory; "
            "torch.Tensor and torch.nn.Parameter are supported"
        )
    if t.layout is not torch.strided:
        layout = str(t.layout).removeprefix("torch.")
        return f"its layout is {layout}, which keeps non-zeros only; pass t.to_dense()"
    return None


def of_dtype(entry: Entry) -> str | None:
    """What stands against pruning values of this dtype and origin, wherever they are kept."""
    t = entry.tensor
    if entry.held_by is not None:
        return _REMEDIES[entry.held_by]
    if t.is_quantized or t.dtype in _INTEGERS or (t.dtype not in SUPPORTED and type(t) not in PLAIN):
        return (
            "it holds integers or quantised values, whose magnitudes are not the weights'; "
            "prune the floating-point model and quantise afterwards, or leave it out with ignore="
        )
    if t.is_complex():
        return "it is complex; pass torch.view_as_real(t), or its parts, as real tensors"
    if t.dtype not in SUPPORTED:
        names = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED)
        return f"this dtype holds scales or packed values, not weights; supported are {names}"
    if t.dtype in _FP8 and entry.scale is not None:
        return (
            f"it is scaled by {entry.scale!r}, so that its values alone are not the weights; "
            "dequantise the model first, or leave it out with ignore="
        )
    return None


_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
             torch.uint16, torch.uint32, torch.uint64)  # fmt: skip


def _of_memory(t: Tensor) -> str | None:
    if t.is_inference():
        return "it was made under torch.inference_mode and cannot be written; clone it outside of that mode"
    if any(st == 0 and s > 1 for s, st in zip(t.shape, t.stride(), strict=True)):
        return "it is expanded: several of its elements are one place in memory; pass t.contiguous()"
    if overlaps_itself(t):
        return "several of its elements are one place in memory; pass t.contiguous()"
    return None


def overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of one tensor lie in one place. Exact."""
    if t.numel() == 0 or t.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((st, s) for s, st in zip(t.shape, t.stride(), strict=True) if s > 1):
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    marks = _Marks(t)
    return marks.add(t) < t.numel() * t.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte of memory in common. Exact, also where their bytes alternate."""
    (a_low, a_high), (b_low, b_high) = extent(a), extent(b)
    if a.device != b.device or a_high <= b_low or b_high <= a_low:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    marks = _Marks(a, b)
    marks.add(a)
    return marks.any(b)


def extent(t: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of the one after its last."""
    low, size = t.data_ptr(), t.element_size()
    if t.is_contiguous():
        return low, low + t.numel() * size
    last = sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return low, low + (last + 1) * size


class _Marks:
    """One mark for each byte between the first and the last of some tensors."""

    def __init__(self, *tensors: Tensor) -> None:
        extents = [extent(t) for t in tensors]
        self.low = min(low for low, _ in extents)
        self.bytes = torch.zeros(max(high for _, high in extents) - self.low, dtype=torch.bool)

    def _of(self, t: Tensor) -> Tensor:
        size = t.element_size()
        strides = [st * size for st in t.stride()]
        return self.bytes.as_strided((*t.shape, size), (*strides, 1), t.data_ptr() - self.low)

    def add(self, t: Tensor) -> int:
        """Marks a tensor's bytes; returns how many bytes are marked in all."""
        self._of(t).fill_(True)
        return int(self.bytes.sum())

    def any(self, t: Tensor) -> bool:
        """Whether a byte of the tensor is marked."""
        return bool(self._of(t).any())


def _refuse_overlaps(chosen: set[str], entries: Sequence[Entry]) -> None:
    """Raises for a chosen tensor that shares memory with another one; tied tensors are one entry already."""
    held = sorted((*extent(e.tensor), i) for i, e in enumerate(entries) if e.tensor.numel())
    end = 0
    active: list[tuple[int, int]] = []
    for low, high, i in held:
        if low < end:
            for _, j in (pair for pair in active if pair[0] > low):
                _refuse_overlap(chosen, entries[i], entries[j])
        else:
            active = []
        active.append((high, i))
        end = max(end, high)


def _refuse_overlap(chosen: set[str], one: Entry, other: Entry) -> None:
    involved = chosen & {one.spec.name, other.spec.name}
    if not involved or not overlap(one.tensor, other.tensor):
        return
    first, second = (one, other) if one.spec.name in involved else (other, one)
    raise BadTensor(
        f"cannot prune {first.spec}: it shares memory with {second.spec} but is not the same view of it, so "
        "zeros written to one would appear elsewhere in the other. Give one of them memory of its own "
        "(t.clone()), or leave both out with ignore=."
    )
