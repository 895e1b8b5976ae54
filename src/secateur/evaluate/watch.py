"""What goes into layers while a model runs, added up a batch at a time.

Layers are recognised by the very weight that an operation gets, not by hooks on modules: a subclass with a forward of its own, a
transposed ``Conv1D`` and padding done by hand are all seen as they are, and there is nothing to take off the model afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.solve.base import exactly
from secateur.core.types import Spec
from secateur.errors import BadInput

AT_ONCE = 1 << 24
"""Elements of unfolded convolution inputs that are held at a time."""
OBSERVED = ("linear", "linear_transposed", "head", "router", "conv")
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

    @property
    def features(self) -> int:
        """Numbers in one input: of a convolution, for each kernel position and channel of a group."""
        conv = self.spec.role == "conv"
        return prod(self.spec.shape[1:]) if conv else self.spec.shape[self.spec.in_dim or 0]

    @property
    def short(self) -> bool:
        """Whether there are fewer inputs than features, so that the sum of products is singular."""
        return self.gram is not None and self.count < self.features

    def statistics(self) -> dict[str, Tensor]:
        """``input_norm`` and, if it was wanted, ``hessian``; with a leading dim of groups only where there are several.

        The sums are handed over, not copied: a Hessian is large.
        """
        if self.squares is None or self.count == 0:
            raise BadInput(
                f"no calibration batch reached {self.spec}, so its inputs are not known: its layer did not run, or does not "
                "multiply as linear layers and convolutions do. Leave it out with ignore=, or calibrate with batches that use it."
            )
        out = {"input_norm": _single((self.squares / self.count).sqrt().float())}
        if self.gram is not None:
            out["hessian"] = _single(self.gram.mul_(2.0 / self.count))
            self.gram = None
        return out


def _single(stacked: Tensor) -> Tensor:
    return stacked[0] if stacked.shape[0] == 1 else stacked


def too_few(short: Sequence[str]) -> list[str]:
    """A warning of layers whose Hessians are singular, if there are any.

    >>> too_few(["fc.weight: 3 of 8"])[0].partition(":")[0]
    'fewer inputs than features went into the Hessian of 1 layer (fc.weight'
    """
    if not short:
        return []
    some = ", ".join(short[:4]) + (", …" if len(short) > 4 else "")
    what = "Hessian of 1 layer" if len(short) == 1 else f"Hessians of {len(short)} layers"
    return [
        f"fewer inputs than features went into the {what} ({some}), so damping must make up for it: calibrate with more data."
    ]


class Watch(TorchFunctionMode):
    """While it is entered, adds up what goes into the layers of some weights.

    Args:
        weights: ``(spec, the model's own parameter)`` of each layer.
        gram: whether products of features are wanted (for Hessians): ``features²`` numbers a layer.
    """

    def __init__(self, weights: Sequence[tuple[Spec, Tensor]], *, gram: bool) -> None:
        super().__init__()
        self.seen = {spec.name: Seen(spec, gram) for spec, _ in weights}
        self.order: dict[str, None] = {}  # names of the weights, as their layers first ran
        self._by_id = {id(t): self.seen[spec.name] for spec, t in weights}
        self._last: _Shared | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            self._attended(inspect.signature(func).bind(*args, **kwargs).arguments)
        elif func in CALLS:
            self._note(dict(zip(CALLS[func], args, strict=False)) | dict(kwargs))
        return out

    @property
    def short(self) -> list[str]:
        """The layers with fewer inputs than features, and how many they have, where Hessians are wanted."""
        return [f"{s.spec.name}: {s.count} of {s.features}" for s in self.seen.values() if s.short]

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """`Seen.statistics` of every layer, by the name of its weight."""
        return {name: seen.statistics() for name, seen in self.seen.items()}

    def _attended(self, call: Mapping[str, Any]) -> None:
        """Attention runs its products where no operation is seen. The input of its last one is what it gives where that one
        changes nothing."""
        weight = call["out_proj_weight"]
        if id(weight) in self._by_id:
            same = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            x, _ = F.multi_head_attention_forward(**{**call, "out_proj_weight": same, "out_proj_bias": None})
            self._note({"input": x, "weight": weight})

    def _note(self, call: Mapping[str, Any]) -> None:
        """Adds up the input of an operation, if its weight is one of those that are watched."""
        seen = self._by_id.get(id(call.get("weight")))
        if seen is None:
            return
        self.order.setdefault(seen.spec.name)
        x: Tensor = call["input"].detach()
        # Sums are taken in the precision that was meant for them, whatever the model runs in.
        with torch.inference_mode(False), exactly(), torch.autocast(x.device.type, enabled=False):
            if seen.spec.role == "conv":
                for columns in _columns(x, call, seen.spec):
                    seen.add(*_sums(columns, seen))
                return
            if x.shape[-1] != seen.features:
                raise BadInput(
                    f"{seen.spec} is multiplied with {x.shape[-1]} input features where the role {seen.spec.role!r} says "
                    f"{seen.features}: give its role with roles=, or leave it out with ignore=."
                )
            if self._last is None or not self._last.is_of(x, seen):
                rows = x.reshape(1, -1, x.shape[-1])
                self._last = _Shared(x, _version(x), *_sums(rows, seen))
            seen.add(self._last.squares, self._last.gram, self._last.count)


@dataclass
class _Shared:
    """The sums of one input, for the layers that get the very same one: queries, keys and values, or gate and up.

    It holds the input, so that no other can come to lie in the same memory.
    """

    x: Tensor
    version: int | None
    squares: Tensor
    gram: Tensor | None
    count: int

    def is_of(self, x: Tensor, seen: Seen) -> bool:
        if self.version is None or _version(x) != self.version or x.dtype != self.x.dtype:
            return False
        same = x.data_ptr() == self.x.data_ptr() and x.shape == self.x.shape and x.stride() == self.x.stride()
        return same and (self.gram is None or self.gram.dtype == _working(seen.spec.dtype))


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to; not known of tensors made in inference mode."""
    return None if x.is_inference() else x._version


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
