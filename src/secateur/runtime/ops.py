"""The operators that packed modules run: `torch.ops.secateur.packed_linear` and `packed_weight`.

They are operators of torch, so that ``torch.compile``, ``torch.export`` and everything that watches operators know them by
name. A model that was exported with them needs ``import secateur`` before ``torch.export.load``.

Gradients are refused where they are asked for, in the forward pass, compiled or not: there are none for what is packed, and
an optimizer would have nothing to write to. No kernel is registered for autograd, since it would cost more than the rest of a
call: the kernels themselves look at ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from secateur.core.layouts import DTYPES, LAYOUTS, Layout, Parts, restore
from secateur.core.products import product
from secateur.errors import BadInput, NotDefined

INFERENCE_ONLY = (
    "Packed layers are for inference and have no gradients. Run the model under torch.inference_mode() or torch.no_grad(); to "
    "train it, take its weights back with secateur.unpack(model)."
)

_LIBRARY = torch.library.Library("secateur", "DEF")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor[] parts, Tensor? bias, str layout, int columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define("packed_weight(Tensor[] parts, str layout, int columns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _linear(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    """``x @ weight.T + bias`` along the last dim of ``x``."""
    rows = _check(x, parts, bias, layout, columns)
    flat = x.reshape(-1, columns).contiguous()
    return product(flat, cast(Parts, tuple(parts)), cast(Layout, layout), columns, bias).view(*x.shape[:-1], rows)


def _linear_shape(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    rows = _check(x, parts, bias, layout, columns)
    return x.new_empty((*x.shape[:-1], rows))


def _check(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> int:
    """Refuses what does not go together, by what costs nothing to look at; the number of rows of the weight."""
    asked = x.requires_grad or (bias is not None and bias.requires_grad)
    if (asked and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        raise NotDefined(INFERENCE_ONLY)
    rows = _check_parts(parts, layout, columns)
    values = parts[1]
    if x.device != values.device:
        raise BadInput(
            f"the packed weight is on {values.device}, and the input on {x.device}: packed layers run on the CPU."
        )
    if x.dtype != values.dtype:
        raise BadInput(
            f"the packed weight is {_named(values.dtype)}, and the input {_named(x.dtype)} of shape {tuple(x.shape)}: convert "
            f"one of them, input.to({values.dtype}) or model.to({x.dtype})."
        )
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BadInput(f"the packed weight takes {columns} features in the last dim; the input is {tuple(x.shape)}.")
    if bias is not None and (bias.shape != (rows,) or bias.dtype != values.dtype):
        raise BadInput(
            f"the packed weight has {rows} rows of {_named(values.dtype)}; the bias is {tuple(bias.shape)} of "
            f"{_named(bias.dtype)}."
        )
    return rows


def _check_parts(parts: list[Tensor], layout: str, columns: int) -> int:
    if layout not in LAYOUTS or len(parts) != 3:
        raise BadInput(
            f"a packed weight is three tensors, in layout {' or '.join(LAYOUTS)}; got {len(parts)}, {layout!r}."
        )
    where, values, starts = parts
    rows = starts.shape[0] - 1
    wrong = where.shape != (rows, -(-columns // 64) * 8) if layout == "bitmask" else where.shape != values.shape
    if wrong:
        raise BadInput(
            f"parts of shapes {[tuple(p.shape) for p in parts]} are no {layout} of {columns} columns: see secateur.core.layouts."
        )
    return rows


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weight(parts: list[Tensor], layout: str, columns: int) -> Tensor:
    """The weight ``(out, in)`` itself."""
    _check_parts(parts, layout, columns)
    return restore(cast(Parts, tuple(parts)), cast(Layout, layout), columns)


def _weight_shape(parts: list[Tensor], layout: str, columns: int) -> Tensor:
    return parts[1].new_empty((_check_parts(parts, layout, columns), columns))


def _transformed(*args: Any) -> NoReturn:
    raise NotDefined(f"packed layers do not run inside transforms of torch.func (grad, vmap, jvp, …). {INFERENCE_ONLY}")


def _autocast(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    """What a linear layer gives under ``torch.autocast``; the product itself has the precision of the weight."""
    lower = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        out = packed_linear(x.to(parts[1].dtype) if x.dtype in DTYPES else x, parts, bias, layout, columns)
    return out.to(lower)


def _nested(x: Tensor, parts: list[Tensor], bias: Tensor | None, layout: str, columns: int) -> Tensor:
    """Sequences of several lengths, as ``nn.TransformerEncoder`` makes of a padded batch."""
    return torch.nested.as_nested_tensor([packed_linear(t, parts, bias, layout, columns) for t in x.unbind()])


def _register(name: str, kernel: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Callable[..., Tensor]:
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    # Below this key a transform's tensors are plain ones, and its gradients would be zero without a word.
    _LIBRARY.impl(name, _transformed, "FuncTorchDynamicLayerFrontMode")
    torch.library.register_fake(f"secateur::{name}", shape, lib=_LIBRARY)
    return cast(Callable[..., Tensor], getattr(torch.ops.secateur, name).default)


packed_linear = _register("packed_linear", _linear, _linear_shape)
"""``(x, parts, bias, layout, columns) -> x @ weight.T + bias``; ``x`` of any rank and strides."""
_LIBRARY.impl("packed_linear", _autocast, "AutocastCPU")
_LIBRARY.impl("packed_linear", _nested, "NestedTensorCPU")

packed_weight = _register("packed_weight", _weight, _weight_shape)
"""``(parts, layout, columns) -> weight``."""
