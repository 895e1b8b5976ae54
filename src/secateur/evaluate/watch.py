"""What goes into layers while a model runs, added up a batch at a time.

Layers are recognised by the very weight that an operation gets, not by hooks on modules: a subclass with a forward of its own, a
transposed ``Conv1D`` and padding done by hand are all seen as they are, and there is nothing to take off the model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.types import Spec
from secateur.errors import BadInput

AT_ONCE = 1 << 24
"""Elements of unfolded convolution inputs that are held at a time."""
OBSERVED = ("linear", "linear_transposed", "conv")
"""Roles of weights whose inputs an operation shows."""


def why_unseen(spec: Spec) -> str | None:
    """Why the inputs of a tensor's layer cannot be observed, or ``None`` if they can.

    >>> why_unseen(Spec("experts.up", (4, 8, 8), torch.float32, "experts"))
    'the inputs of a layer of the role experts cannot be observed'
    """
    if spec.role not in OBSERVED or (spec.role == "conv" and len(spec.shape) > 4):
        return f"the inputs of a layer of the role {spec.role} cannot be observed"
    return None


@dataclass
class Seen:
    """Sums over what went into one layer.

    Attributes:
        spec: its weight.
        wants_gram: whether products of features are added up too.
        count: inputs so far: tokens, or kernel positions.
        squares: Σ x_j², ``(groups, features)`` float64.
        gram: Σ x xᵀ, ``(groups, features, features)`` float32, or float64 where the weight is.
    """

    spec: Spec
    wants_gram: bool
    count: int = 0
    squares: Tensor | None = None
    gram: Tensor | None = None

    def add(self, squares: Tensor, gram: Tensor | None, count: int) -> None:
        """Adds one batch."""
        if not bool(torch.isfinite(squares).all()):
            raise BadInput(
                f"the inputs of {self.spec} hold NaN or infinite values: a calibration batch, or what the layers before made of "
                "it, is not finite. Look for NaN in the batches and in the weights."
            )
        self.count += count
        self.squares = squares if self.squares is None else self.squares + squares
        if gram is not None:
            self.gram = gram.clone() if self.gram is None else self.gram.add_(gram)

    def statistics(self) -> dict[str, Tensor]:
        """``input_norm`` and, if it was wanted, ``hessian``; with a leading dim of groups only where there are several."""
        if self.squares is None or self.count == 0:
            raise BadInput(
                f"no calibration batch reached {self.spec}, so nothing is known of its inputs. Leave it out with ignore=, or "
                "calibrate with batches that use it."
            )
        out = {"input_norm": _single((self.squares / self.count).sqrt().float())}
        if self.gram is not None:
            out["hessian"] = _single(self.gram * (2.0 / self.count))
        return out


def _single(stacked: Tensor) -> Tensor:
    return stacked[0] if stacked.shape[0] == 1 else stacked


class Watch(TorchFunctionMode):
    """While it is entered, adds up what goes into the layers of some weights.

    Args:
        weights: ``{spec: the model's own parameter}``.
        gram: whether products of features are wanted (for Hessians): ``features²`` numbers a layer.
    """

    def __init__(self, weights: Sequence[tuple[Spec, Tensor]], *, gram: bool) -> None:
        super().__init__()
        self.seen = {spec.name: Seen(spec, gram) for spec, _ in weights}
        self._by_id = {id(t): self.seen[spec.name] for spec, t in weights}
        self._last: _Shared | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = CALLS.get(func)
        if call is not None:
            named = dict(zip(call, args, strict=False)) | dict(kwargs)
            seen = self._by_id.get(id(named.get("weight")))
            if seen is not None:
                with torch.no_grad():
                    self._observe(seen, named)
        return func(*args, **kwargs)

    def _observe(self, seen: Seen, call: Mapping[str, Any]) -> None:
        x: Tensor = call["input"].detach()
        if seen.spec.role == "conv":
            for columns in _columns(x, call, seen.spec):
                seen.add(*_sums(columns, seen))
            return
        shared = self._last
        if shared is None or not shared.is_of(x, seen):
            rows = x.reshape(1, -1, x.shape[-1])
            shared = self._last = _Shared(x, x._version, *_sums(rows, seen))
        seen.add(shared.squares, shared.gram, shared.count)


@dataclass
class _Shared:
    """The sums of one input, for the layers that get the very same one: queries, keys and values, or gate and up."""

    x: Tensor
    version: int
    squares: Tensor
    gram: Tensor | None
    count: int

    def is_of(self, x: Tensor, seen: Seen) -> bool:
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        dtype = self.gram is None or self.gram.dtype == _working(seen.spec.dtype)
        return same and x.dtype == self.x.dtype and x._version == self.version and dtype


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sums(rows: Tensor, seen: Seen) -> tuple[Tensor, Tensor | None, int]:
    """(Σ x², Σ x xᵀ or ``None``, number of inputs) of ``(groups, inputs, features)``."""
    rows = rows.to(_working(seen.spec.dtype))
    squares = torch.linalg.vecdot(rows, rows, dim=1).double()
    return squares, rows.mT @ rows if seen.wants_gram else None, rows.shape[1]


def _columns(x: Tensor, call: Mapping[str, Any], spec: Spec) -> Iterator[Tensor]:
    """What a convolution multiplies its weight with: ``(groups, positions, features)``, some pictures at a time."""
    kernel = spec.shape[2:]
    if x.dim() == len(kernel) + 1:
        x = x.unsqueeze(0)
    if len(kernel) == 1:
        x = x.unsqueeze(2)
    kernel = (1, *kernel) if len(kernel) == 1 else tuple(kernel)
    stride, dilation = (_pair(call.get(k, 1), len(spec.shape) - 2, 1) for k in ("stride", "dilation"))
    x = F.pad(x, _padding(call.get("padding", 0), kernel, dilation, len(spec.shape) - 2))
    features = spec.shape[1] * kernel[0] * kernel[1]
    step = max(1, AT_ONCE // max(1, x[:1].numel() * kernel[0] * kernel[1]))
    for some in x.split(step):
        unfolded = F.unfold(some, kernel, dilation, 0, stride)
        yield unfolded.view(len(some), spec.groups, features, -1).permute(1, 0, 3, 2).reshape(spec.groups, -1, features)


def _pair(value: Any, dims: int, first: int) -> tuple[int, int]:
    """A setting of a convolution for two dims; ``first`` for the one that a 1-d convolution lacks."""
    values = (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
    return (first, values[0]) if dims == 1 else (values[0], values[1])


def _padding(value: Any, kernel: Sequence[int], dilation: Sequence[int], dims: int) -> tuple[int, int, int, int]:
    """The padding as `torch.nn.functional.pad` takes it: the last dim first."""
    if value == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2
    rows, columns = (0, 0) if value == "valid" else _pair(value, dims, 0)
    return columns, columns, rows, rows


CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
CALLS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.addmm: ("bias", "input", "weight"),
    torch.conv1d: CONV, torch.conv2d: CONV, F.conv1d: CONV, F.conv2d: CONV,
}  # fmt: skip
"""The operations of layers, and what their arguments are. ``addmm`` is how a transposed ``Conv1D`` multiplies."""
